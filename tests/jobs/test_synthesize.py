"""`cv2jax synthesize`: files and pipes hold the same samples, arriving text is heard as it comes, mistakes are one line."""

import io
import sys
import types
import weakref

import numpy as np
import pytest
import soundfile

from cv2jax.cli.main import run as run_cli
from cv2jax.config import UserError
from cv2jax.jobs import synthesize as job
from cv2jax.jobs.synthesize import SynthesizeOptions, make_request, read_lines, synthesize
from cv2jax.synthesis.request import Request
from cv2jax.synthesis.result import Pcm
from cv2jax.synthesis.voice import save_voice
from tests.small_model import make_small_model, make_small_voice
from tests.synthesis.small_engine import TEXT, make_engine, voice

LENGTHS = ["--min_length=20", "--max_length=20"]


@pytest.fixture
def said(tmp_path, monkeypatch):
    """Runs the command on the small engine: (exit code, samples of the pipe, standard error)."""
    engine = make_engine()
    save_voice(tmp_path / "voices" / "ann.safetensors", voice())
    save_voice(tmp_path / "voices" / "bare.safetensors", voice(0))
    monkeypatch.setattr(job, "load_engine", lambda model, options: engine)

    def run(*words, stdin=b"", name="ann"):
        pipe = io.BytesIO()
        out = types.SimpleNamespace(buffer=pipe, write=lambda text: len(text), flush=lambda: None)
        errors = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(stdin)))
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", errors)
            code = run_cli(["synthesize", *words, f"--model={tmp_path}", f"--voice={name}"])
        assert engine.num_open == 0
        return code, np.frombuffer(pipe.getvalue(), "<i2"), errors.getvalue()

    return run


def test_a_file_and_a_pipe_hold_the_same_samples(said, tmp_path):
    out = tmp_path / "a.wav"
    code, none, _ = said(TEXT, f"--out={out}", *LENGTHS)
    assert (code, len(none)) == (3, 0)  # cut by --max_length
    written, rate = soundfile.read(out, dtype="int16")
    code, piped, errors = said(TEXT, "--out=-", "--stream", *LENGTHS)
    np.testing.assert_array_equal(piped, written)
    assert (code, rate, len(piped)) == (3, 1200, 20 * 48)
    assert errors.startswith("standard output: raw PCM, 16-bit little-endian, mono, 1200 Hz\n")
    lines = errors.splitlines()
    assert ": samples 0 to " in lines[1]
    assert lines[-1].startswith("hit_limit: 0.80 s of speech, 20 speech tokens; first audio after ")
    assert "real-time factor" in lines[-1]
    assert all(f"{stage} " in lines[-1] for stage in ("text", "lm", "flow", "vocoder"))
    assert list(tmp_path.glob(".*")) == []


def test_text_on_standard_input_whole_and_as_it_comes(said, tmp_path):
    whole = said("-", "--out=-", *LENGTHS, stdin=TEXT.encode())
    np.testing.assert_array_equal(whole[1], said(TEXT, "--out=-", *LENGTHS)[1])
    lengths = ["--min_length=30", "--max_length=30"]
    code, piped, errors = said("-", "--out=-", "--stream", *lengths, stdin=b"one two\nthree four five one\n\ntwo")
    assert (code, len(piped)) == (3, 3 * 30 * 48)
    drawn = [int(line.split()[-3]) for line in errors.splitlines() if "tokens drawn" in line]
    assert drawn[0] < 90  # heard before the last token was drawn
    assert errors.splitlines()[-1].split("; ")[0].endswith("90 speech tokens in 3 pieces")


def test_a_line_is_heard_to_its_end_before_the_next_one_comes(said, monkeypatch):
    heard = []

    def lines(_):
        yield "one two three\n"
        heard.append(sum(len(frame.samples) for frame in frames))
        yield "four\n"
        heard.append(sum(len(frame.samples) for frame in frames))

    frames, send = [], job._send
    monkeypatch.setattr(job, "read_lines", lines)
    monkeypatch.setattr(job, "_send", lambda pipe, frame: (frames.append(frame), send(pipe, frame)))
    said("-", "--out=-", "--stream", *LENGTHS)
    assert heard == [20 * 48, 40 * 48]


def test_a_line_break_is_no_text_to_speak(monkeypatch):
    engine, got = make_engine(), []
    open_, push_text = engine._speech.open, engine._speech.push_text

    def open_slot(slot, request, key, **settings):
        got.append(request.text_tokens.tolist())
        open_(slot, request, key, **settings)

    def push(slot, tokens):
        got[-1] += tokens.tolist()
        push_text(slot, tokens)

    monkeypatch.setattr(engine._speech, "open", open_slot)
    monkeypatch.setattr(engine._speech, "push_text", push)
    session = engine.open(Request(voice=voice(), arriving=True, min_length=6, max_length=6))
    lines = ["one two.\r\n", "\n", " \r\n", "...\n", "three\n", "one ", "two", " \n", "four five"]
    frames = list(job._frames(session, iter(lines)))
    assert got == [engine.tokenizer.encode(text) for text in ("one two.", "three", "one two", "four five")]
    assert (session.result.num_pieces, sum(len(frame.samples) for frame in frames)) == (4, 4 * 6 * 48)


def test_samples_are_kept_for_a_file_only(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "_open_pipe", io.BytesIO)
    engine, request = make_engine(), Request(voice=voice(), text=TEXT, min_length=60, max_length=60)

    def most_kept(out):
        seen, kept = [], []

        def look(frame, _):
            seen.append(weakref.ref(frame.samples))
            kept.append(sum(samples() is not None for samples in seen))

        job.speak(engine, request, iter(()), out, look)
        return max(kept), len(seen)

    kept, num_frames = most_kept(job.PIPE)
    assert kept <= 2 < num_frames
    assert most_kept(str(tmp_path / "a.wav")) == (num_frames, num_frames)


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        ([TEXT], {}, "--out is missing"),
        ([TEXT, "--out=a.mp3"], {}, "give a file that ends in .wav"),
        (["--out=-"], {}, 'expected one TEXT (quoted), or "-", got 0'),
        (["a", "b", "--out=-"], {}, "got 2"),
        (["a", "--out=-", "--source=x.wav"], {}, "expected no TEXT beside --source, got 1"),
        ([" ", "--out=-"], {}, "nothing to speak"),
        (["🎉", "--out=-"], {}, "nothing to speak"),
        (["-", "--out=-", "--stream"], {"stdin": b""}, "nothing to speak"),
        (["-", "--out=-", "--stream"], {"stdin": b"one\n\xff\n"}, "standard input: line 2, byte 1: no UTF-8"),
        (["-", "--out=-"], {"stdin": b"\xc3"}, "standard input: line 1, byte 1: no UTF-8"),
        ([TEXT, "--out=-", "--mode=sing"], {}, "mode 'sing': choose one of"),
        ([TEXT, "--out=-", "--speed=9"], {}, "speed=9.0: give a number"),
        ([TEXT, "--out=-"], {"name": "nobody"}, "no voice 'nobody'; it has ann, bare"),
        ([TEXT, "--out=-", "--mode=zero-shot"], {"name": "bare"}, "needs a voice with a recording"),
        (
            [TEXT, "--out=-"],
            {"name": __file__},
            "test_synthesize.py: is no voice (.safetensors); make one of a recording",
        ),
        ([TEXT, "--out=-", "--chunk=-3"], {}, "chunk=-3: give the tokens of a chunk, 1 or more"),
        ([TEXT, "--out=-", "--chunk=0"], {}, "chunk=0: give the tokens of a chunk, 1 or more"),
        ([TEXT, "--out=-", "--left=-2"], {}, "left=-2: give tokens of left context"),
        (
            ["-", "--out=-", "--stream", "--normalizer=wetext"],
            {},
            "normalizer wetext: text that arrives is read as it is",
        ),
        (["-", "--out=-", "--stream", "--language=en"], {}, "language en: text that arrives is read as it is"),
        (
            ["-", "--out=-", "--stream"],
            {"stdin": b"one <|im_start|>\n"},
            "text: <|im_start|> does not belong in a text",
        ),
        (["-", "--out=-", "--stream"], {"stdin": b"one <strong>two\n"}, "text: <strong> is never closed by </strong>"),
        ([TEXT, "--out=-", f"--max_length={1 << 64}"], {}, "max_length=18446744073709551616: must be 0 <= min <= max"),
        ([TEXT, "--out=-", "--real_time_factor=0"], {}, "real_time_factor=0.0: must be positive"),
    ],
)
def test_mistakes_are_one_line(said, words, settings, message):
    code, _, errors = said(*words, **settings)
    assert code == 2
    assert message in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_a_broken_pipe_ends_quietly(said, monkeypatch):
    def broken(pipe, frame):
        raise BrokenPipeError

    monkeypatch.setattr(job, "_send", broken)
    monkeypatch.setattr("cv2jax.cli.main._silence_closed_outputs", lambda: True)
    code, piped, errors = said(TEXT, "--out=-", *LENGTHS)
    assert (code, len(piped)) == (141, 0)
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--temperature=0.5", "temperature, top_p, top_k: mode conversion draws no tokens; leave them out"),
        ("--normalizer=auto", "normalizer auto: mode conversion reads no text; leave it out"),
        ("--max_length=9", "mode conversion reads no text and draws no tokens; leave max_length out"),
        ("--language=en", "mode conversion reads no text and draws no tokens; leave language out"),
    ],
)
def test_a_conversion_refuses_what_it_has_no_use_for(said, tmp_path, flag, message):
    soundfile.write(tmp_path / "s.wav", 0.1 * np.sin(np.arange(16_000) / 9), 16_000)
    code, _, errors = said("--out=-", f"--source={tmp_path / 's.wav'}", flag)
    assert (code, message in errors) == (2, True)


def test_a_full_disk_is_one_line():
    line = r"^--out -: standard output cannot be written \(No space left on device\)$"
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(UserError, match=line):
        job._send(full, Pcm(samples=np.zeros(9, np.float32), first_sample=0))


def test_a_model_that_is_not_there_is_told_and_makes_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such model directory; give one, with voices in .*nowhere/voices"):
        synthesize(tmp_path / "nowhere", "one", str(tmp_path / "new/a.wav"), SynthesizeOptions(voice="ann"))
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written"):
        job.check_out(str(tmp_path / "file/a.wav"))


def test_what_a_stage_failed_at_is_not_written(said, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "WHOLE", ())
    assert said(TEXT, f"--out={tmp_path / 'b.wav'}", *LENGTHS)[0] == 3
    assert not (tmp_path / "b.wav").exists()


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ({}, "zero_shot"),
        ({"instruct": "softly"}, "instruct"),
        ({"speaker": "A"}, "speaker"),
        ({"mode": "cross-lingual"}, "cross_lingual"),
    ],
)
def test_the_mode_follows_from_what_is_given(settings, mode):
    assert make_request(voice(), "one", SynthesizeOptions(**settings)).mode == mode


def test_a_voice_without_text_or_recording_has_a_mode_too(tmp_path):
    assert make_request(voice(0), "one", SynthesizeOptions()).mode == "speaker"
    assert make_request(make_small_voice(0), iter(["one"]), SynthesizeOptions()).arriving
    soundfile.write(tmp_path / "s.wav", 0.1 * np.sin(np.arange(24_000) / 9), 24_000)
    source = make_request(voice(), "", SynthesizeOptions(source=str(tmp_path / "s.wav")))
    assert (source.mode, len(source.source)) == ("conversion", 16_000)


def test_lines_come_one_by_one():
    lines = read_lines(io.BytesIO("één\ntwee".encode()))
    assert next(lines) == "één\n"
    assert list(lines) == ["twee"]


@pytest.mark.full
def test_a_model_directory_speaks(tmp_path):
    model = make_small_model(tmp_path / "model")
    options = SynthesizeOptions(voice="ann", min_length=30, max_length=30)
    result = synthesize(model, "one two three", str(tmp_path / "a.wav"), options)
    assert (result.status, result.num_speech_tokens, result.num_samples) == ("hit_limit", 30, 30 * 960)
    assert soundfile.info(tmp_path / "a.wav").samplerate == 24_000
    frames = []
    again = synthesize(
        model,
        iter(["one two ", "three"]),
        str(tmp_path / "b.wav"),
        options,
        on_frame=lambda frame, _: frames.append(frame),
    )
    assert again.num_samples == sum(len(frame.samples) for frame in frames) == 30 * 960
    (model / "hift_vocoder").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="has no hift_vocoder; train it there"):
        synthesize(model, "one", str(tmp_path / "a.wav"), options)
    with pytest.raises(UserError, match="no voice 'eve'"):
        synthesize(model, "one", str(tmp_path / "a.wav"), SynthesizeOptions(voice="eve"))
