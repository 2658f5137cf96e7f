"""The engine: modes, one and many sessions, whole and arriving text, seeds, speed, cancelling; results that do not lie."""

import dataclasses

import jax
import numpy as np
import pytest

from cv2jax.audio.mel import MelDefinition
from cv2jax.config import UserError
from cv2jax.nn.chunks import NO_CHUNK, ChunkMask
from cv2jax.synthesis.mel_solver import MelSolver
from cv2jax.synthesis.mel_stream import MelStreams
from cv2jax.synthesis.plan import HopPlan
from cv2jax.synthesis.prompt import MelRequest, Prompt
from cv2jax.synthesis.request import Request
from cv2jax.synthesis.sampling import RequestSampler, SamplingOptions
from cv2jax.synthesis.speech_stream import SpeechRequest, SpeechStreams
from cv2jax.synthesis.stages import FRAMES_PER_TOKEN, LOOKAHEAD
from cv2jax.synthesis.wave_stream import synthesise
from tests.synthesis.small_engine import (
    CHUNK,
    PER_TOKEN,
    TEXT,
    ask,
    hear,
    make_engine,
    speech_stage,
    stages,
    tokenizer,
    voice,
)

SOURCE = {"source_tokens": np.arange(3)}


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def by_hand(request: Request, prompt_text: list[int], prompt_speech: np.ndarray, recording: bool) -> np.ndarray:
    """What one piece sounds like by the stages' own whole functions, with the engine's keys."""
    key, ids = jax.random.key(request.seed), np.array(tokenizer().encode(request.text + "."), np.int32)
    of = lambda stage: jax.random.fold_in(key, stage)  # noqa: E731
    if request.source_tokens is None:
        asked = SpeechRequest(
            text_tokens=ids,
            prompt_text_tokens=np.array(prompt_text, np.int32),
            prompt_speech_tokens=prompt_speech,
            min_length=request.min_length,
            max_length=request.max_length,
        )
        alone = SpeechStreams(speech_stage(), options=speech_stage().sampler.row({}), arriving=False)
        alone.open(0, asked, jax.random.fold_in(of(0), 0), flushed=True)
        drawn = [alone.advance()[0]]
        while drawn[-1].status == "running":
            drawn.append(alone.advance()[0])
        tokens = np.concatenate([one.speech_tokens for one in drawn])
    else:
        tokens = request.source_tokens
    v, streams = request.voice, MelStreams(stages().mel, make_engine().mels.mask, hop_sizes=(10,))
    parts = {"speech_tokens": v.speech_tokens, "mel": v.mel} if recording else {}
    prompt = Prompt(speaker_embedding=v.speaker_embedding, key=jax.random.key(v.seed), **parts)
    mel = streams.start(streams.enroll(prompt), jax.random.fold_in(of(1), 0)).hop(tokens)
    return synthesise(stages().wave, mel, of(2))


def modes() -> dict[str, tuple[Request, list[int], bool, bool]]:
    """mode → (request, text in front, whether the language model and whether the flow has the recording)."""
    encode, source = tokenizer().encode, np.arange(33, dtype=np.int32)
    return {
        "zero_shot": (ask(), encode("two one"), True, True),
        "cross_lingual": (ask(mode="cross_lingual"), [], False, True),
        "instruct": (ask(mode="instruct", instruct="two"), encode("two<|endofprompt|>"), False, True),
        "speaker": (ask(mode="speaker"), [], False, False),
        "speaker's name": (ask(mode="speaker", speaker="A"), encode("Speaker A<|endofprompt|>"), False, False),
        "conversion": (ask(mode="conversion", text="", source_tokens=source), [], False, True),
    }


@pytest.mark.parametrize("name", modes())
def test_each_mode_gives_its_tensors_to_each_stage(engine, name):
    request, prompt, speaks, records = modes()[name]
    session = engine.open(request)
    got = hear(session)
    want = by_hand(request, prompt, voice().speech_tokens if speaks else np.zeros(0, np.int32), records)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    result = session.result
    assert len(got) == PER_TOKEN * result.num_speech_tokens == result.num_samples
    assert (result.status, result.mode, result.voice) == (result.status, request.mode, "ann")
    assert result.status in ("ok", "hit_limit")


def test_an_offline_request_hears_each_piece_whole_behind_its_last_token(engine):
    request, v = ask(offline=True, seed=5), voice()
    session = engine.open(request)
    [piece] = session.pieces
    first = next(session)
    assert piece.is_drawn
    got = np.concatenate([first.samples, *[frame.samples for frame in session]])
    of = lambda stage: jax.random.fold_in(jax.random.key(5), stage)  # noqa: E731
    prompt = Prompt(speaker_embedding=v.speaker_embedding, speech_tokens=v.speech_tokens, mel=v.mel)
    tokens = np.array(piece.tokens, np.int32)
    asked = MelRequest(voice=prompt, speech_tokens=tokens, key=jax.random.fold_in(of(1), 0))
    [mel] = MelSolver(stages().mel, ChunkMask(chunk=NO_CHUNK))([asked])
    np.testing.assert_allclose(got, synthesise(stages().wave, mel, of(2)), rtol=0, atol=1e-4)
    # Streamed, it has the same tokens and other samples; beside others it says what it says alone.
    streamed, beside = engine.open(ask(seed=5)), engine.open(request)
    [piece] = streamed.pieces
    samples, again = hear(streamed), hear(beside)
    assert piece.tokens == tokens.tolist()
    assert np.abs(samples - got).max() > 1e-3
    np.testing.assert_allclose(again, got, rtol=0, atol=1e-4)


def test_a_model_without_chunks_speaks_offline_alone(engine):
    request, without = ask(offline=True, seed=5), make_engine(mask=ChunkMask(chunk=NO_CHUNK))
    np.testing.assert_array_equal(hear(without.open(request)), hear(engine.open(request)))
    with pytest.raises(UserError, match=r"trained without chunks, .*--offline") as error:
        without.open(ask())
    assert "\n" not in str(error.value)
    assert without.num_open == 0


def test_no_bound_on_candidates_is_refused_where_there_is_one():
    bounded = dataclasses.replace(stages().speech, sampler=RequestSampler(num_candidates=30))
    of = dataclasses.replace(stages(), speech=bounded)
    with pytest.raises(UserError, match=r"sampling\.top_k=0: .* draw among 30 candidates; give 1 to 30"):
        make_engine(stages=of, sampling=SamplingOptions(top_k=0))
    with pytest.raises(UserError, match=r"sampling\.top_k=0: sets no bound"):
        make_engine(stages=of).open(ask(sampling={"top_k": 0}))
    every = dataclasses.replace(bounded, sampler=RequestSampler(num_candidates=bounded.num_speech_tokens))
    make_engine(stages=dataclasses.replace(of, speech=every), sampling=SamplingOptions(top_k=0)).open(ask()).cancel()


def test_offline_text_may_arrive_and_what_only_streams_refuses_it(engine):
    session = engine.open(ask(text="", arriving=True, offline=True))
    session.push_text(TEXT)
    assert list(session) == []  # the piece is not whole yet
    session.flush()
    assert len(hear(session)) == session.result.num_samples == PER_TOKEN * session.result.num_speech_tokens > 0
    streams = make_engine(stages=dataclasses.replace(stages(), mel=dataclasses.replace(stages().mel, solve=None)))
    with pytest.raises(UserError, match="only streams"):
        streams.open(ask(offline=True))
    assert streams.num_open == 0


def test_a_stream_is_bit_for_bit_the_whole_and_a_seed_is_a_seed(engine):
    whole, result = engine.speak(ask(seed=3))
    np.testing.assert_array_equal(hear(engine.open(ask(seed=3))), whole)
    assert np.std(whole) > 1e-2
    other, _ = engine.speak(ask(seed=4))
    assert not np.array_equal(other[:100], whole[:100])
    assert (result.seed, result.num_pieces, engine.num_open) == (3, 1, 0)
    assert result.first_audio is not None
    assert 0 < result.first_audio < result.total
    assert list(result.seconds) == ["voice", "tokenizer", "text", "lm", "flow", "vocoder"]
    assert all(result.seconds[name] > 0 for name in ("text", "lm", "flow", "vocoder"))


def test_sessions_side_by_side_say_what_they_say_alone(engine):
    requests = [
        ask(seed=1),
        ask(seed=2, mode="cross_lingual", text="five four", min_length=12),
        ask(seed=3, text="", mode="conversion", source_tokens=np.arange(28, dtype=np.int32)),
        ask(seed=4, voice=voice(0), mode="speaker"),  # waits for a slot
    ]
    alone = [engine.speak(request)[0] for request in requests]
    sessions, parts = [engine.open(request) for request in requests], [[] for _ in requests]
    while engine.advance():
        for session, frames in zip(sessions, parts, strict=True):
            frames += session.take()
    assert [session.ended for session in sessions] == [True] * 4
    for frames, want in zip(parts, alone, strict=True):
        # Rows of two round otherwise than one alone: the same tokens, samples within what shapes may differ by.
        np.testing.assert_allclose(np.concatenate([frame.samples for frame in frames]), want, rtol=0, atol=1e-4)
    assert engine.num_open == 0


def test_who_has_no_sound_yet_comes_first(engine):
    first = engine.open(ask(text="", mode="conversion", source_tokens=np.arange(60, dtype=np.int32)))
    next(first)
    second = engine.open(ask())
    made = first.num_samples
    while not second.num_samples:
        assert engine.advance()
    assert first.num_samples == made
    first.cancel()
    second.cancel()


def test_the_first_hop_waits_for_no_more_tokens_than_it_needs(engine):
    session = engine.open(ask(mode="speaker"))  # no recording: chunks count from the first token
    first = next(session)
    drawn = session.result.num_speech_tokens
    heard = engine.waves.hold_back / PER_TOKEN
    assert drawn == 2 * CHUNK + LOOKAHEAD  # one chunk would be held back
    assert len(first.samples) == round((2 * CHUNK - heard) * PER_TOKEN)
    session.cancel()


def test_arriving_text_is_the_same_for_any_pushes_and_waits_in_between(engine):
    text, found = "one two three four five six seven", []
    for pieces in ([text], [text[:9], text[9:10], "", text[10:30], text[30:]], list(text)):
        session = engine.open(ask(text="", arriving=True, min_length=50, max_length=50))
        assert list(session) == []
        assert session.waits
        parts = []
        for piece in pieces:
            session.push_text(piece)
            parts += list(session)
        assert not session.ended
        session.flush()
        [piece] = session.pieces
        found.append((piece, np.concatenate([frame.samples for frame in parts + list(session)])))
        assert session.result.status == "hit_limit"
    for piece, waveform in found[1:]:
        assert piece.tokens == found[0][0].tokens
        np.testing.assert_allclose(waveform, found[0][1], rtol=0, atol=1e-4)


def test_arriving_text_is_heard_before_it_ends(engine):
    text = "one two three four five six seven eight nine"
    session = engine.open(ask(text=text, arriving=True, min_length=70, max_length=70))
    early = list(session)
    assert early
    assert session.waits
    num_text = session.result.num_text_tokens + len(tokenizer().encode("two one"))
    assert session.result.num_speech_tokens == num_text // 5 * 15 - 12 >= 15  # the recording fills groups, too
    session.push_text(" ten two")
    early += list(session)
    session.flush()
    rest = list(session)
    assert rest
    assert rest[0].first_sample == sum(len(frame.samples) for frame in early)
    assert session.result.num_text_tokens == len(tokenizer().encode(text + " ten two"))


def test_a_long_text_is_split_and_its_pieces_are_joined_by_the_vocoder(engine):
    sentence = " ".join([TEXT] * 2) + ". "
    session = engine.open(ask(text=sentence * 10, min_length=6, max_length=11))
    pieces = list(session.pieces)
    got, result = hear(session), session.result
    assert result.num_pieces >= 2
    assert len(got) == PER_TOKEN * result.num_speech_tokens
    mels = [np.zeros((0, 5), np.float32)]
    hop = make_engine().mels
    solved, key = hop.enroll(Prompt(**_recording())), jax.random.fold_in(jax.random.key(0), 1)
    for piece in pieces:
        mels.append(hop.start(solved, jax.random.fold_in(key, piece.number)).hop(np.array(piece.tokens, np.int32)))
    want = synthesise(stages().wave, np.concatenate(mels), jax.random.fold_in(jax.random.key(0), 2))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    # No seam: the step from one piece to the next is no larger than steps elsewhere.
    border = PER_TOKEN * len(pieces[0].tokens)
    steps = np.abs(np.diff(got))
    assert steps[border - 1] <= steps.max()
    assert len({tuple(piece.tokens) for piece in pieces}) == result.num_pieces


def _recording():
    v = voice()
    return {"speaker_embedding": v.speaker_embedding, "speech_tokens": v.speech_tokens, "mel": v.mel}


def test_twenty_thousand_characters_are_split(engine):
    text = (TEXT + ". ") * 800
    assert len(text) >= 20_000
    session = engine.open(ask(text=text, max_length=3, min_length=1))
    assert session.pieces.num > 30
    next(session)
    session.cancel()
    with pytest.raises(UserError, match=r"^request: text, prompt and at least .* positions, more than 32768; split"):
        engine.open(ask(min_length=40_000, max_length=None))
    assert engine.num_open == 0
    for text in ("one " * 5_000, "一" * 20_000, "a" * 20_000):  # without an end of a clause
        with engine.open(ask(text=text)) as session:
            assert session.pieces.num > 30


@pytest.mark.parametrize("speed", [0.8, 1.25])
def test_speed_changes_the_length_and_streams(engine, speed):
    tokens = np.arange(40, dtype=np.int32)
    request = ask(text="", mode="conversion", source_tokens=tokens, speed=speed)
    got = hear(engine.open(request))
    assert len(got) == int(FRAMES_PER_TOKEN * 40 / speed) * PER_TOKEN // FRAMES_PER_TOKEN
    other = make_engine(plan=HopPlan(real_time_factor=0.01, max_chunks=1))
    np.testing.assert_allclose(hear(other.open(request)), got, rtol=0, atol=1e-4)


def test_a_source_is_tokenised(engine):
    wave = np.zeros(16_000, np.float32)
    got, result = engine.speak(ask(text="", mode="conversion", source=wave))
    want, _ = engine.speak(ask(text="", mode="conversion", source_tokens=np.arange(25, dtype=np.int32)))
    np.testing.assert_array_equal(got, want)
    assert result.seconds["tokenizer"] > result.seconds["text"]
    assert (result.num_speech_tokens, result.num_text_tokens, result.seconds["lm"]) == (25, 0, 0.0)


def test_cancelling_before_the_first_frame_and_in_the_middle(engine):
    session = engine.open(ask())
    session.cancel()
    assert (list(session), session.result.status, session.result.num_samples) == ([], "cancelled", 0)
    assert engine.num_open == 0
    session = engine.open(ask())
    next(session)
    session.cancel()
    session.cancel()
    assert (list(session), session.result.status) == ([], "cancelled")
    assert not engine.advance()
    arriving = engine.open(ask(arriving=True))
    arriving.cancel()
    arriving.push_text("one")
    arriving.flush()
    assert arriving.result.status == "cancelled"
    np.testing.assert_array_equal(engine.speak(ask(seed=3))[0], make_engine().speak(ask(seed=3))[0])


def test_a_limit_and_nothing_at_all_are_reported(engine):
    _, result = engine.speak(ask(min_length=7, max_length=7))
    assert (result.status, result.num_speech_tokens) == ("hit_limit", 7)
    drawn = engine._speech.advance
    session = engine.open(ask(min_length=0))
    engine._speech.advance = lambda limit: {
        slot: dataclasses.replace(found, speech_tokens=found.speech_tokens[:0], status="ok")
        for slot, found in drawn(limit).items()
    }
    try:
        assert list(session) == []
    finally:
        engine._speech.advance = drawn
    assert (session.result.status, session.result.num_samples) == ("empty", 0)
    assert session.result.message == "request: piece 1 of 1: nothing was drawn"


def test_what_is_not_finite_ends_with_what_was_heard_before():
    good = stages().wave

    def step(state, mel, key, num_valid, total):
        waveform, state = good.step(state, mel, key, num_valid, total)
        return (waveform * np.nan if float(np.asarray(state.num_frames)[0]) > 45 else waveform), state

    engine = make_engine(stages=dataclasses.replace(stages(), wave=dataclasses.replace(good, step=step)))
    session = engine.open(ask(text="", mode="conversion", source_tokens=np.arange(60, dtype=np.int32)))
    heard = hear(session)
    assert 0 < len(heard) < 60 * PER_TOKEN
    assert np.isfinite(heard).all()
    assert session.result.status == "non_finite"
    assert "waveform is not finite" in session.result.message
    assert engine.num_open == 0


def test_scores_that_are_not_finite_are_reported():
    speech = stages().speech
    poisoned = dataclasses.replace(
        speech, prefill=lambda *given: dataclasses.replace(s := speech.prefill(*given), logits=s.logits * np.nan)
    )
    engine = make_engine(stages=dataclasses.replace(stages(), speech=poisoned))
    waveform, result = engine.speak(ask())
    assert (result.status, len(waveform), engine.num_open) == ("non_finite", 0, 0)
    assert "language model" in result.message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": ""}, r"nothing to speak \(it is empty\)"),
        ({"text": " \n\t"}, r"nothing to speak \(it is empty\)"),
        ({"text": "🎉 …!"}, "nothing to speak"),
        ({"text": "one \ud83d"}, "half of a surrogate pair"),
        ({"text": "one <strong>two"}, "is never closed by"),
        ({"mode": "sing"}, "mode 'sing': choose one of zero_shot"),
        ({"mode": "instruct"}, "give an instruction"),
        ({"instruct": "softly"}, "choose mode instruct"),
        ({"speaker": "A"}, "belongs to mode speaker"),
        ({"seed": -1}, "seed -1: give a whole number"),
        ({"speed": 3.0}, "speed=3.0: give a number"),
        ({"voice": voice(0)}, "needs a voice with a recording, ann has none"),
        ({"voice": dataclasses.replace(voice(), text="")}, "needs what the recording of ann says"),
        (
            {"voice": dataclasses.replace(voice(), speech_tokenizer="other")},
            "speech tokenizer other, the model's is tok",
        ),
        ({"sampling": {"top_k": 99}}, "sampling.top_k=99"),
        ({"min_length": 50}, "must be 0 <= min <= max"),
        (
            {"max_length": 1 << 64},
            "max_length=18446744073709551616: must be 0 <= min <= max and 1 <= max <= 2147483647$",
        ),
        ({"max_length": 1 << 64, "text": "", "arriving": True}, "must be 0 <= min <= max"),
        ({"mode": "conversion"}, "needs a recording to convert"),
        ({"mode": "conversion", "text": "", "arriving": True}, "cannot be converted while it arrives"),
        ({"mode": "conversion", "text": "", "min_length": 3, **SOURCE}, "draws no tokens; leave min_length out"),
        ({"mode": "conversion", "text": "", "sampling": {"top_k": 3}, **SOURCE}, "leave sampling out"),
        ({"arriving": True, "language": "en"}, "language en: text that arrives is read as it is"),
        ({"source_tokens": np.arange(3)}, "for the source choose mode conversion"),
        ({"mode": "conversion", "source_tokens": np.arange(3)}, "has no text; leave it out"),
        ({"mode": "conversion", "text": "", "source_tokens": np.array([61])}, "speech token 61 at place 0 is outside"),
        ({"mode": "conversion", "text": "", "source": np.zeros(0, np.float32)}, "the source has no speech tokens"),
        ({"mode": "conversion", "text": "", "source": np.zeros(500_000, np.float32)}, "lasts 31.2 s, .* cut it"),
        ({"mode": "conversion", "text": "", "source": np.full(9, np.nan, np.float32)}, "one row of finite samples"),
    ],
)
def test_what_cannot_be_is_one_line_and_opens_nothing(engine, settings, message):
    before = engine.num_open
    with pytest.raises(UserError, match=message) as error:
        engine.open(ask(**settings))
    assert "\n" not in str(error.value)
    assert engine.num_open == before


def test_misuse_of_text_that_arrives(engine):
    whole = engine.open(ask())
    with pytest.raises(UserError, match="its text was whole from the start"):
        whole.push_text("more")
    whole.cancel()
    session = engine.open(ask(text=" ... ", arriving=True))
    with pytest.raises(UserError, match="nothing to speak"):
        session.flush()
    with pytest.raises(UserError, match="surrogate"):
        session.push_text("one \ud83d")
    session.push_text("one two")
    session.flush()
    session.flush()
    with pytest.raises(UserError, match="text behind its end"):
        session.push_text("more")
    assert len(hear(session)) > 0


@pytest.mark.parametrize("name", ["num_slots", "max_voices"])
def test_an_engine_has_a_slot_and_a_voice_at_least(name):
    with pytest.raises(UserError, match=rf"^{name}=0: the engine needs 1 or more; give that many$"):
        make_engine(**{name: 0})


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("speech", {"num_speech_tokens": 60}, "60 and 61 speech tokens"),
        ("speech", {"text_vocabulary_size": 100}, "the language model 100; take"),
        ("speech", {"speech_tokenizer": "abc"}, r"know different speech tokenizers \(flow tok, language model abc"),
        ("mel", {"mel_definition": MelDefinition()}, "flow and vocoder: the mel of one"),
    ],
)
def test_stages_of_different_models_are_refused(stage, changes, message):
    changed = dataclasses.replace(getattr(stages(), stage), **changes)
    with pytest.raises(UserError, match=message):
        make_engine(stages=dataclasses.replace(stages(), **{stage: changed}))


def test_a_model_without_a_language_model_converts_only():
    engine = make_engine(stages=dataclasses.replace(stages(), speech=None, tokenizer=None))
    with pytest.raises(UserError, match="has no language model, it can only convert"):
        engine.open(ask())
    with pytest.raises(UserError, match="no speech tokenizer to convert with"):
        engine.open(ask(text="", mode="conversion", source=np.zeros(900, np.float32)))
    request = ask(text="", mode="conversion", source_tokens=np.arange(9, dtype=np.int32))
    assert len(engine.speak(request)[0]) == 9 * PER_TOKEN


def test_voices_are_solved_once_and_few_are_kept():
    engine = make_engine(max_voices=1)
    first = engine.enroll(voice())
    assert engine.enroll(dataclasses.replace(voice(), mel=voice().mel.copy())) is first  # read anew, it is the same
    engine.enroll(voice(7))
    assert len(engine._voices) == 1
    assert engine.enroll(voice()) is not first
