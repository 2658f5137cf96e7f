"""Sessions: slots and turns, lines and tags of arriving text, cancelling, damage that stays with its request, any mask."""

import dataclasses

import jax
import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.nn.chunks import ChunkMask
from cv2jax.synthesis.arriving import ArrivingPieces
from cv2jax.synthesis.mel_solver import MelSolver
from cv2jax.synthesis.plan import HopPlan
from cv2jax.synthesis.prompt import MelRequest, Prompt
from cv2jax.synthesis.request import Request
from cv2jax.synthesis.session import make_speech_request
from cv2jax.synthesis.wave_stream import synthesise
from tests.synthesis.small_engine import PER_TOKEN, TEXT, ask, hear, make_engine, speech_stage, stages, tokenizer, voice


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def test_a_piece_that_says_nothing_is_reported_and_the_rest_is_heard(engine):
    session, drawn = engine.open(ask(text="", arriving=True, min_length=6, max_length=6)), engine._speech.advance

    def advance(limit):
        holders = dict(engine._holders)
        nothing = lambda found: dataclasses.replace(found, speech_tokens=found.speech_tokens[:0], status="ok")  # noqa: E731
        return {slot: nothing(found) if holders[slot][1].number == 1 else found for slot, found in drawn(limit).items()}

    for word in ("one", "two", "three"):
        session.push_text(word)
        session.end_piece()
    session.flush()
    pieces = list(session.pieces)
    engine._speech.advance = advance
    try:
        heard = hear(session)
    finally:
        engine._speech.advance = drawn
    assert [len(piece.tokens) for piece in pieces] == [6, 0, 6]
    assert (session.result.status, len(heard)) == ("empty", 12 * PER_TOKEN)
    assert session.result.message == "request: piece 2 of 3: nothing was drawn"


def test_slots_that_wait_for_text_are_told(engine):
    words = {"text": "one two three ", "arriving": True}
    with engine.open(ask(**words)) as first, engine.open(ask(**words)) as other:
        assert (list(first), list(other)) == ([], [])
        assert engine.num_open == 2
        with pytest.raises(UserError, match=r"^request: all 2 slots are held by requests that wait for text; push it"):
            engine.speak(ask())
        assert engine.num_open == 2
        session = engine.open(ask(seed=3))
        with pytest.raises(UserError, match="all 2 slots are held"):
            next(session)
        other.cancel()  # then it goes on
        np.testing.assert_allclose(hear(session), engine.speak(ask(seed=3))[0], rtol=0, atol=1e-4)
    assert (engine.num_open, first.result.status) == (0, "cancelled")
    waveform, result = engine.speak(ask(text="one two", arriving=True))  # no more of it can come
    assert (result.status, len(waveform)) == ("hit_limit", 40 * PER_TOKEN)


def test_a_long_text_does_not_keep_a_later_request_waiting(engine):
    long = {"text": (" ".join([TEXT] * 2) + ". ") * 120, "min_length": 4, "max_length": 4}
    sessions = [engine.open(ask(seed=seed, **long)) for seed in (1, 2)]
    pieces = [list(session.pieces) for session in sessions]
    short = engine.open(ask(seed=3, min_length=12))
    samples = hear(short)
    assert max(sum(piece.is_drawn for piece in those) for those in pieces) < 10
    assert min(map(len, pieces)) > 15
    np.testing.assert_allclose(samples, engine.speak(ask(seed=3, min_length=12))[0], rtol=0, atol=1e-4)
    for session in sessions:
        session.cancel()


def test_a_line_is_an_utterance_of_its_own(engine):
    lines = ["one two three", "four five"]
    session, parts, pieces = engine.open(ask(text="", arriving=True)), [], []
    for line in lines:
        session.push_text(line + "\n")
        session.end_piece()
        session.end_piece()
        pieces += session.pieces
        parts.append(np.concatenate([frame.samples for frame in session]))
        assert len(parts[-1]) == PER_TOKEN * len(pieces[-1].tokens)  # nothing is held back
    session.push_text("\n")
    session.end_piece()
    session.flush()
    assert (list(session), session.result.num_pieces, session.num_samples) == ([], 2, sum(map(len, parts)))
    alone = engine.open(ask(text=lines[0], arriving=True))
    alone.flush()
    assert alone.result.num_text_tokens == pieces[0].num_text - len(tokenizer().encode("\n"))
    alone.cancel()
    # The vocoder begins each anew, with noise of its own.
    key = jax.random.key(0)
    for number, part in enumerate(parts):
        tokens = np.array(pieces[number].tokens, np.int32)
        stream = engine.mels.start(engine.enroll(voice()), jax.random.fold_in(jax.random.fold_in(key, 1), number))
        wave_key = jax.random.fold_in(key, 2)
        want = synthesise(stages().wave, stream.hop(tokens), jax.random.fold_in(wave_key, 1) if number else wave_key)
        np.testing.assert_allclose(part, want, rtol=0, atol=1e-4)


def test_the_end_of_a_line_whose_words_are_all_heard_lets_the_rest_out(engine):
    session = engine.open(ask(text="one two ", arriving=True, min_length=20, max_length=20))
    session._append([("", True)])  # as where the bound of a piece was reached
    session._text = ArrivingPieces(len)
    early = np.concatenate([frame.samples for frame in session])
    assert len(early) == 20 * PER_TOKEN - engine.waves.hold_back
    session.end_piece()
    assert len(np.concatenate([frame.samples for frame in session])) == engine.waves.hold_back
    session.flush()
    assert (list(session), session.result.status, session.result.num_pieces) == ([], "hit_limit", 1)


def test_what_is_heard_is_let_go_of_and_still_counted(engine):
    session, pieces = engine.open(ask(text="", arriving=True, min_length=6, max_length=6)), []
    for number in range(1, 9):
        session.push_text("one two")
        session.end_piece()
        pieces += session.pieces
        list(session)
        assert (list(session.pieces), session.result.num_pieces) == ([], number)
        assert session.result.num_speech_tokens == 6 * number
        assert session.result.num_text_tokens == number * len(tokenizer().encode("one two"))
    session.flush()
    list(session)
    assert [piece.number for piece in pieces] == list(range(8))
    assert session.result.num_speech_tokens == session.num_samples / PER_TOKEN == sum(len(p.tokens) for p in pieces)


def test_text_that_arrives_behind_the_last_token_of_its_piece_is_counted(engine):
    session = engine.open(ask(text="one two three four ", arriving=True, min_length=3, max_length=3))
    list(session)
    assert (list(session.pieces), session.result.num_speech_tokens) == ([], 3)
    session.push_text("five")
    session.end_piece()
    session.push_text("one")
    session.flush()
    list(session)
    result, words = session.result, ("one two three four five", "one")
    assert result.num_text_tokens == sum(len(tokenizer().encode(text)) for text in words)
    assert (result.status, result.num_speech_tokens, result.num_pieces) == ("hit_limit", 6, 2)


@pytest.mark.parametrize("text", ["1" * 1_300, "12345678901234567 " * 40], ids=["digits", "long words"])
def test_text_that_arrives_without_clauses_fits_the_context(text):
    speech = dataclasses.replace(speech_stage(), max_positions=2048, cache_lengths=(512, 1024, 2048))
    engine = make_engine(stages=dataclasses.replace(stages(), speech=speech))
    with engine.open(Request(voice=voice(200), text=text, arriving=True)) as session:
        session.flush()
        assert session.pieces.num > 4
        ids = [i for piece in session.pieces for i in piece.ids]
        assert tokenizer().decode(ids).replace(" ", "") == text.replace(" ", "")
        for piece in session.pieces:  # none is refused, which is told when it gets its slot
            engine._speech.check(make_speech_request(session._prepared, piece.ids))
        assert (engine.advance(), session.result.status) == (True, "running")


def test_tags_of_text_that_arrives_are_checked(engine):
    session = engine.open(ask(text="one <strong>two <|im_", arriving=True))
    with pytest.raises(UserError, match=r"^text: <\|im_start\|> does not belong in a text"):
        session.push_text("start|>")
    with pytest.raises(UserError, match=r"^text: <strong> at character 28 is opened inside another"):
        session.push_text("x three<strong>")
    with pytest.raises(UserError, match=r"^text: <strong> is never closed by </strong>"):
        session.flush()
    session.push_text(" three</strong>")
    session.flush()
    assert session.result.num_text_tokens == len(tokenizer().encode("one <strong>two <|im_ three</strong>"))
    session.cancel()
    with pytest.raises(UserError, match="does not belong"):
        engine.open(ask(text="<|im_end|>", arriving=True))
    assert engine.num_open == 0


def test_cancelling_behind_the_last_hop_drops_what_waits(engine):
    session = engine.open(ask())
    while not session.ended:
        engine.advance()
    assert session.result.status in ("ok", "hit_limit")
    session.cancel()
    assert (session.take(), session.result.status) == ([], "cancelled")
    with engine.open(ask()) as session:
        hear(session)
    assert session.result.status in ("ok", "hit_limit")


def test_a_new_length_compiles_nothing(engine):
    engine.warm_up(voice(), 3.0)
    engine.speak(ask())
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: compiled.append(name) if "backend_compile" in name else None
    )
    for number in (7, 22, 33):
        engine.speak(ask(text="", mode="conversion", source_tokens=np.arange(number, dtype=np.int32)))
        engine.speak(ask(min_length=number, max_length=number))
    assert compiled == []
    jax.jit(lambda x: x * 3.25)(np.zeros(3)).block_until_ready()
    assert len(compiled) == 1  # it would have been seen


def test_the_first_request_behind_a_warm_up_compiles_no_stage(caplog):
    engine = make_engine()
    engine.warm_up(voice(), 3.0)
    with jax.log_compiles():
        engine.speak(ask(min_length=60, max_length=60))
        engine.speak(ask())
        jax.jit(lambda x: x * 7.125)(np.zeros(3))
    found = {program for program in ("prefill", "decode", "reset", "grow", "step") if f"jit({program})" in caplog.text}
    assert (found, "Compiling" in caplog.text) == (set(), True)  # it would have been seen


def test_what_is_not_finite_in_a_slot_is_gone_with_its_request():
    good = make_engine()
    request = ask(text="one two", mode="cross_lingual")
    want = good.speak(request)[0]
    spoilt = next(iter(set(tokenizer().encode("five one two.")) - set(tokenizer().encode("one two."))))
    engine = make_engine(stages=dataclasses.replace(stages(), speech=speech_stage(spoilt=spoilt)))
    for _ in range(2):  # whichever slot it gets
        waiting = engine.open(ask(text="five one two", mode="cross_lingual"))
        list(waiting)
        assert (waiting.result.status, engine.num_open) == ("non_finite", 0)
        np.testing.assert_allclose(engine.speak(request)[0], want, rtol=0, atol=1e-5)


def test_the_caches_of_a_mel_that_is_not_finite_are_not_kept(engine):
    good = stages().mel
    bad = dataclasses.replace(good, step=lambda *given: (lambda mel, state: (mel * np.nan, state))(*good.step(*given)))
    broken = make_engine(stages=dataclasses.replace(stages(), mel=bad))
    request = ask(text="", mode="conversion", source_tokens=np.arange(9, dtype=np.int32))
    broken._voices[voice().digest] = dataclasses.replace(engine.enroll(voice()), owner=broken.mels)
    assert broken.speak(request)[1].status == "non_finite"
    assert len(broken.mels._kept) == 0


def test_two_voices_side_by_side_sound_as_they_do_alone(engine):
    requests = [ask(seed=1), ask(seed=1, voice=voice(7))]
    alone = [engine.speak(request)[0] for request in requests]
    assert not np.array_equal(alone[0][:200], alone[1][:200])
    sessions, parts = [engine.open(request) for request in requests], [[], []]
    while engine.advance():
        for session, frames in zip(sessions, parts, strict=True):
            frames += [frame.samples for frame in session.take()]
    for frames, want in zip(parts, alone, strict=True):
        assert len(frames) > 1
        np.testing.assert_allclose(np.concatenate(frames), want, rtol=0, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("mask", [ChunkMask(chunk=10), ChunkMask(chunk=5, left=10)], ids=str)
def test_a_stream_is_the_whole_under_any_mask(mask):
    engine, tokens, v = (
        make_engine(mask=mask, plan=HopPlan(real_time_factor=0.1)),
        np.arange(33, dtype=np.int32),
        voice(),
    )
    session = engine.open(ask(text="", mode="conversion", source_tokens=tokens))
    frames = [frame.samples for frame in session]
    assert len(frames) > 2
    prompt = Prompt(speaker_embedding=v.speaker_embedding, speech_tokens=v.speech_tokens, mel=v.mel)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), 0)
    [mel] = MelSolver(stages().mel, mask)([MelRequest(voice=prompt, speech_tokens=tokens, key=key)])
    want = synthesise(stages().wave, mel, jax.random.fold_in(jax.random.key(0), 2))
    np.testing.assert_allclose(np.concatenate(frames), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", 1.5, "seed 1.5: give a whole number"),
        ("seed", "3", "seed '3': give a whole number"),
        ("max_length", 2.0, "max_length 2.0: give a whole number"),
        ("speed", "1", "speed '1': give a number"),
        ("text", None, "text is None; give a str"),
        ("text", b"one", "text is of type bytes; give a str"),
        ("voice", "ann", "voice is of type str; give what `load_voice` returns"),
    ],
)
def test_wrong_types_are_one_line(engine, field, value, message):
    request = ask()
    object.__setattr__(request, field, value)  # past the check of the tests
    with pytest.raises(UserError, match=rf"^request: {message}"):
        request.check()
