"""`cv2jax enroll`: recordings of any kind to voices, what they hold exactly, refusals, and that nothing is written then."""

import dataclasses
import functools
import hashlib
import io
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import soundfile

from cv2jax.audio.io import load_waveform, read_audio
from cv2jax.audio.mel import mel_spectrogram
from cv2jax.cli.main import run as run_cli
from cv2jax.config import UserError
from cv2jax.data.embeddings import save_embeddings
from cv2jax.jobs.enroll import EnrollOptions, describe_chunks, enroll
from cv2jax.models.flow_matching.config import FlowMatchingConfig
from cv2jax.models.speech_tokenizer.tokenize import make_encoder
from cv2jax.nn.chunks import stream_mask
from cv2jax.synthesis.voice import load_voice, require_voice
from cv2jax.tasks import model_encoders
from cv2jax.tasks.encoders import embed_recordings, load_speaker_encoder, load_tokenizer
from cv2jax.tasks.model_encoders import streaming_chunk
from tests.small_model_directory import add_flow, make_model_directory, make_speech

TEXT = "a quick brown fox"
_load_tokenizer, _load_speaker_encoder = functools.cache(load_tokenizer), functools.cache(load_speaker_encoder)
NOISE = 0.1 * np.random.default_rng(0).normal(size=48000)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model_directory(tmp_path_factory.mktemp("models") / "mine")


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model / "speech_tokenizer")


@pytest.fixture(scope="module")
def encoder(model):
    return load_speaker_encoder(model / "speaker_encoder")


@pytest.fixture
def loaded_once(monkeypatch):
    """Runs are read once for all tests that look at other things."""
    monkeypatch.setattr(model_encoders, "load_tokenizer", _load_tokenizer)
    monkeypatch.setattr(model_encoders, "load_speaker_encoder", _load_speaker_encoder)


def write(path, waveform, rate_hz=16000, **options):
    soundfile.write(path, waveform, rate_hz, **options)
    return str(path)


def refused(capfd, *words):
    assert run_cli(["enroll", *map(str, words)]) == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("cv2jax enroll:")]
    return line


@pytest.mark.parametrize(
    ("suffix", "rate_hz", "channels", "seconds"),
    [("flac", 44100, 2, 2.51), ("ogg", 24000, 1, 2.9)],
)
def test_a_recording_becomes_what_the_encoders_say_of_it(
    model, tokenizer, encoder, tmp_path, suffix, rate_hz, channels, seconds
):
    speech = make_speech(seconds, rate_hz, seed=rate_hz)
    audio = write(tmp_path / f"a.{suffix}", np.stack([speech] * channels, axis=1), rate_hz)
    out = tmp_path / "new" / "ann.safetensors"
    options = EnrollOptions(text=TEXT, language="en", seed=5)
    result = enroll(model, audio, out, options)
    voice = load_voice(out)
    wave = load_waveform(audio, 24000)
    count = min(len(wave) // 960, -(-(len(load_waveform(audio, 16000)) // 160) // 4))
    assert count == len(voice.speech_tokens) == int(seconds * 25 + 1e-6)
    [expected] = make_encoder(tokenizer.config, tokenizer.params, tokenizer.model_state)([load_waveform(audio, 16000)])
    np.testing.assert_array_equal(voice.speech_tokens, expected[:count])
    np.testing.assert_array_equal(voice.mel, mel_spectrogram(wave[None])[0][0].T[: 2 * count])
    np.testing.assert_allclose(voice.speaker_embedding, embed_recordings(encoder, [read_audio(audio)])[0], atol=1e-6)
    with open(audio, "rb") as file:
        assert voice.audio_sha256 == hashlib.sha256(file.read()).hexdigest()
    assert (voice.text, voice.language, voice.name, voice.seed, voice.warnings) == (TEXT, "en", "ann", 5, ())
    assert (result.cut_start, result.cut_end, result.chunk, result.findings) == (0.0, 0.0, None, ())
    require_voice(voice, speech_tokenizer=tokenizer.hash, speaker_encoder=encoder.hash)


def test_the_verb_says_what_it_made_and_what_is_odd(model, tokenizer, tmp_path, capfd, caplog, loaded_once):
    caplog.set_level(logging.INFO, logger="absl")
    audio = write(tmp_path / "a.wav", make_speech(1.5, 8000), 8000)
    out = tmp_path / "v.safetensors"
    assert run_cli(["enroll", audio, "--model", str(model), "--out", str(out), "--name", "Ann"]) == 0
    printed = capfd.readouterr().out
    assert printed.startswith(f"{out}: 'Ann', 1.48 s, 37 tokens; 2 warnings; tokenizer {tokenizer.hash[:16]}, encoder ")
    voice = load_voice(out)
    assert [text.partition(":")[0] for text in voice.warnings] == [
        "sampled at 8000 Hz",
        "lasts only 1.5 s; the voice is steadier with a sentence of 3 to 10 s",
    ]
    for line in (*voice.warnings, "no --text: zero-shot needs it; cross-lingual, instruct and conversion do without"):
        assert f"{audio}: {line}" in caplog.text
    assert (voice.text, voice.name) == ("", "Ann")


def test_silence_is_cut_so_that_a_whole_chunk_and_the_look_ahead_stay(model, tokenizer, tmp_path, capfd, loaded_once):
    shutil.copytree(model, tmp_path / "m")
    add_flow(tmp_path / "m", tokenizer.hash, chunks=(0, 1, 20))
    audio = write(tmp_path / "a.flac", make_speech(3.0, 44100, lead=0.1, trail=0.65), 44100)
    out = tmp_path / "v.safetensors"
    arguments = ["enroll", audio, "--model", str(tmp_path / "m"), "--out", str(out)]
    assert run_cli(arguments) == 0
    printed = capfd.readouterr().out
    assert "2.52 s, 63 tokens, 0.00 s and 0.48 s of silence cut off its ends; 0 warnings" in printed
    assert "in chunks of 20, 60 tokens are solved once and 3 again with each first hop\n" in printed
    assert len(load_voice(out).speech_tokens) == 63
    assert run_cli([*arguments, "--notrim"]) == 0
    printed = capfd.readouterr().out
    assert "75 tokens; 0 warnings" in printed
    assert "60 tokens are solved once and 15 again with each first hop; with 2.52 or 3.32 s it would be 3" in printed
    assert run_cli([*arguments, "--chunk", "25"]) == 0  # a whole chunk fewer would cut into the speech
    assert "in chunks of 25, 50 tokens are solved once and 1" in capfd.readouterr().out
    result = enroll(tmp_path / "m", audio, out, EnrollOptions(trim=False, chunk=80))
    assert (result.num_fed_again, describe_chunks(result)) == (
        75,
        "in chunks of 80, 0 tokens are solved once and 75 again with each first hop; with 3.32 s it would be 3",
    )


def test_the_embedding_is_the_mean_of_several_recordings(model, encoder, tmp_path, capfd, loaded_once):
    names = [write(tmp_path / f"{i}.wav", make_speech(2 + i / 3, seed=i)) for i in range(3)]
    out = tmp_path / "v.safetensors"
    more = [f"--embedding_from={name}" for name in names[1:]]
    assert run_cli(["enroll", names[0], "--model", str(model), "--out", str(out), *more]) == 0
    vectors = embed_recordings(encoder, [read_audio(name) for name in names])
    voice = load_voice(out)
    np.testing.assert_allclose(voice.speaker_embedding, vectors.mean(axis=0), atol=1e-6)
    assert len(voice.speech_tokens) == 50  # of the first alone
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    like = ", ".join(f"{cosine:.2f}" for cosine in unit[1:] @ unit[0])
    assert f"like the recording, of 1: {like}\n" in capfd.readouterr().out
    bad = write(tmp_path / "bad.wav", np.zeros(16000))
    with pytest.raises(UserError, match=r"bad\.wav: nearly silent"):
        enroll(model, names[0], out, EnrollOptions(embedding_from=(bad,)))


def test_a_place_of_any_name_is_printed_and_names_the_voice(tmp_path):
    save_embeddings(tmp_path / "e.npz", ["u:0"], ["ann"], np.ones((1, 8), np.float32), {"encoder": "f" * 64})
    out = os.fsdecode(os.fsencode(tmp_path) + b"/an\xff.safetensors")
    try:
        pathlib.Path(out).touch()
    except OSError:
        pytest.skip("a file system of UTF-8 names alone")
    words = ["enroll", f"--speaker_embedding={tmp_path / 'e.npz'}:ann", "--out", out]
    command = [sys.executable, "-m", "cv2jax.cli.main", *words]
    done = subprocess.run(
        command, capture_output=True, timeout=60, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(os.fsencode(tmp_path) + rb"/an\udcff.safetensors: 'an\xff', an embedding of 8;")
    assert load_voice(out).name == r"an\xff"


def test_a_speaker_without_a_recording(model, encoder, tmp_path, capfd, loaded_once):
    vectors = np.random.default_rng(0).normal(size=(3, encoder.config.embedding_dim)).astype(np.float32)
    table = tmp_path / "e.npz"
    save_embeddings(table, ["u:0", "u:1", "u:2"], ["ann", "ann", "bo"], vectors, {"encoder": encoder.hash})
    out = tmp_path / "v.safetensors"
    for identity, expected in (("ann", vectors[:2].mean(axis=0)), ("u:1", vectors[1])):
        arguments = ["enroll", f"--speaker_embedding={table}:{identity}", "--out", str(out), "--language=en"]
        assert run_cli(arguments) == 0
        voice = load_voice(out)
        np.testing.assert_array_equal(voice.speaker_embedding, expected)
        assert (voice.speech_tokens.shape, voice.mel.shape, voice.language) == ((0,), (0, 80), "en")
        require_voice(voice, speech_tokenizer="x", speaker_encoder=encoder.hash)
    # Of a recording the tokens, of the file the embedding.
    audio = write(tmp_path / "a.wav", make_speech(2))
    enroll(model, audio, out, EnrollOptions(speaker_embedding=f"{table}:bo"))
    assert len(load_voice(out).speech_tokens) == 50
    np.testing.assert_array_equal(load_voice(out).speaker_embedding, vectors[2])
    assert "has no speaker or utterance 'cy'; its speakers are ann, bo" in refused(
        capfd, f"--speaker_embedding={table}:cy", "--out", out
    )
    assert "give FILE.npz:ID" in refused(capfd, f"--speaker_embedding={table}", "--out", out)
    save_embeddings(table, ["u"], ["ann"], vectors[:1], {"encoder": "f" * 64})
    line = refused(capfd, audio, f"--speaker_embedding={table}:ann", "--model", model, "--out", out)
    assert re.search(
        rf"is of speaker encoder f{{12}}, .*speaker_encoder is {encoder.hash[:12]}; run `cv2jax embed`", line
    )


def linked(model, root, tokenizer, **facts):
    """The encoders of a model directory beside a flow with such facts."""
    root.mkdir()
    for stage in ("speech_tokenizer", "speaker_encoder"):
        (root / stage).symlink_to(model / stage)
    return add_flow(root, tokenizer.hash, **facts)


def test_a_flow_that_learnt_from_another_encoder_is_refused(model, tokenizer, encoder, tmp_path, capfd, loaded_once):
    other = linked(model, tmp_path / "m", tokenizer, speaker_embeddings={"encoder": "d" * 64, "of": "utterance"})
    audio, out, table = write(tmp_path / "a.wav", make_speech(2)), tmp_path / "v.safetensors", tmp_path / "e.npz"
    vectors = np.ones((1, encoder.config.embedding_dim), np.float32)
    save_embeddings(table, ["u"], ["ann"], vectors, {"encoder": encoder.hash})
    said = (
        f"{other}/flow_matching: learnt from embeddings of speaker encoder {'d' * 12}, but {other}/speaker_encoder is"
    )
    for words in ([audio], [f"--speaker_embedding={table}:ann"], [audio, f"--speaker_embedding={table}:ann"]):
        line = refused(capfd, *words, "--model", other, "--out", out)
        assert f"{said} {encoder.hash[:12]}; put the run that made its embeddings there, or train a flow" in line
    assert not out.exists()


@pytest.mark.parametrize("trained_on", ["stand-in", "embeddings", "not known"])
def test_a_flow_that_knows_no_embeddings_is_told(
    model, tokenizer, encoder, tmp_path, caplog, loaded_once, monkeypatch, trained_on
):
    learnt = {"stand-in": "stand-in", "embeddings": {"encoder": encoder.hash, "of": "speaker"}}.get(trained_on)
    facts = {"speaker_embeddings": learnt} if learnt else {}
    directory = linked(model, tmp_path / "m", tokenizer, **facts)
    with caplog.at_level(logging.WARNING):
        enroll(directory, write(tmp_path / "a.wav", make_speech(2)), tmp_path / "v.safetensors")
    told = [line for line in caplog.messages if "stand-ins" in line]
    assert len(told) == (trained_on == "stand-in")
    for line in told:
        assert line.startswith(
            f"{directory}/flow_matching: was trained on stand-ins made of names and knows no embedding"
        )
        assert "\n" not in line


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (make_speech(0.2, lead=0, trail=0), "lasts 0.2 s; give a sentence of 3 to 10 s"),
        (make_speech(60), "lasts 60 s; at most 30 s fit"),
        (np.zeros(48000), "nobody speaks in it: record it again"),
        (NOISE, "no speech stands out of it; record it in a quiet place"),
    ],
)
def test_bad_clips_are_one_line_and_nothing_is_written(model, tmp_path, capfd, waveform, message):
    audio, out = write(tmp_path / "bad.wav", waveform), tmp_path / "v.safetensors"
    assert f"{audio}: " in (line := refused(capfd, audio, "--model", model, "--out", out, "--text", TEXT))
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["bad.wav"]


def test_clips_that_are_odd_but_fit_are_told(model, tmp_path, caplog, loaded_once):
    speech = make_speech(3.0)
    stereo = write(tmp_path / "stereo.wav", np.stack([speech, -0.9 * speech], axis=1))
    enroll(model, stereo, tmp_path / "s.safetensors", EnrollOptions(text=TEXT))
    assert "its 2 channels differ or cancel in their mean" in caplog.text
    narrow = write(tmp_path / "narrow.wav", make_speech(3.0, 8000), 8000)
    enroll(model, narrow, tmp_path / "n.safetensors", EnrollOptions(text=TEXT))
    assert "sampled at 8000 Hz: what lies above 4000 Hz is missing" in caplog.text


def test_a_clip_that_is_no_number_is_refused(model, tmp_path, capfd):
    audio = write(tmp_path / "nan.wav", np.full(48000, np.nan, np.float32), subtype="FLOAT")
    assert "nan.wav: " in refused(capfd, audio, "--model", model, "--out", tmp_path / "v.safetensors", "--text", TEXT)
    assert not (tmp_path / "v.safetensors").exists()


@pytest.mark.parametrize(
    ("chunks", "chunk"), [((0, 10, 25), 10), ((0, 5, 50), 5), ((0, 1, 25, 50), 25), ((0, 1), 1), ((0,), None)]
)
def test_a_prompt_is_cut_for_the_chunk_that_the_engine_streams_in(tmp_path, chunks, chunk):
    add_flow(tmp_path, "abc", chunks=chunks)
    every = (-1,) * len(chunks)
    config = FlowMatchingConfig(mask_chunks=chunks, mask_lefts=every, mask_prompts=(0,) * len(chunks))
    assert streaming_chunk(tmp_path) == chunk
    assert chunk in (None, stream_mask(config.masks).chunk)


def test_what_the_model_directory_lacks_is_told_before_the_work(model, tokenizer, tmp_path, capfd):
    audio, out = write(tmp_path / "a.wav", make_speech(2)), tmp_path / "v.safetensors"
    shutil.copytree(model / "speech_tokenizer", tmp_path / "m" / "speech_tokenizer")
    line = refused(capfd, audio, "--model", tmp_path / "m", "--out", out)
    assert re.search(
        r"m: has no speaker_encoder; train it there .* or link a run: ln -s RUN .*m/speaker_encoder$", line
    )
    (tmp_path / "m" / "speaker_encoder").symlink_to(model / "speaker_encoder")
    add_flow(tmp_path / "m", "d" * 64)
    line = refused(capfd, audio, "--model", tmp_path / "m", "--out", out)
    assert f"flow_matching: learnt from tokens of {'d' * 12}, but the speech tokenizer is {tokenizer.hash[:12]}" in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model=m", "--out=v.safetensors"], "no AUDIO: give a recording, or --speaker_embedding FILE.npz:ID"),
        (["a.wav", "b.wav"], "expected one AUDIO, got 2; more recordings of the speaker go to --embedding_from"),
        (["a.wav", "--model=m"], "--out is missing"),
        (["a.wav", "--out=v.safetensors"], "--model is missing"),
        (["a.wav", "--model=m", "--out=v.npz"], "v.npz: a voice is a .safetensors file"),
        (["a.wav", "--model=m", "--out=v.safetensors"], "m: no such model directory"),
        (["a.wav", "--model=m", "--out=v.safetensors", "--text= "], "--text is empty"),
        (["a.wav", "--model=m", "--out=v.safetensors", "--text=a<|endofprompt|>b"], "modes add their prefixes"),
        (["a.wav", "--model=m", "--out=v.safetensors", "--text=<laughter>ha"], "never closed by </laughter>"),
        (["a.wav", "--model=m", "--out=v.safetensors", "--chunk=0"], "--chunk 0: give the tokens of a chunk"),
        (["--speaker_embedding=e.npz:a", "--out=v.safetensors", "--text=a"], "--text without AUDIO"),
        (["a.wav", "--speaker_embedding=e.npz:a", "--embedding_from=b.wav", "--out=v.safetensors"], "both: give one"),
        (["--speaker_embedding=e.npz:a", "--out=v.safetensors"], "e.npz: cannot read"),
    ],
)
def test_wrong_flags_are_one_line(words, message, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capfd, *words)
    assert not list(tmp_path.iterdir())


def test_missing_and_broken_files_are_one_line(model, tmp_path, capfd):
    (tmp_path / "text.wav").write_text("no sound")
    arguments = ["--model", model, "--out", tmp_path / "v.safetensors"]
    assert "no such audio file" in refused(capfd, tmp_path / "none.wav", *arguments)
    assert "cannot decode the audio" in refused(capfd, tmp_path / "text.wav", *arguments)
    broken = write(tmp_path / "nan.wav", np.full(16000, np.nan, np.float32), subtype="FLOAT")
    assert "nan.wav: holds NaN or infinite samples" in refused(capfd, broken, *arguments)


def test_a_member_of_a_tar_is_a_recording_too(model, tmp_path, loaded_once):
    data = io.BytesIO()
    soundfile.write(data, make_speech(2), 16000, format="WAV")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        item = tarfile.TarInfo("x.wav")
        item.size = len(data.getvalue())
        archive.addfile(item, io.BytesIO(data.getvalue()))
    voice = enroll(model, f"{tmp_path}/a.tar::x.wav", tmp_path / "v.safetensors").voice
    assert voice.audio_sha256 == hashlib.sha256(data.getvalue()).hexdigest()
    assert len(voice.speech_tokens) == 50
    enroll(model, f"{tmp_path}/a.tar::x.wav", tmp_path / "w.safetensors", EnrollOptions(name="v"))
    assert (tmp_path / "w.safetensors").read_bytes() == (tmp_path / "v.safetensors").read_bytes()


def test_a_text_of_another_recording_is_told_and_kept(model, tmp_path, caplog, loaded_once):
    audio = write(tmp_path / "a.wav", make_speech(2))
    result = enroll(model, audio, tmp_path / "v.safetensors", EnrollOptions(text=TEXT * 9))
    assert [finding.kind for finding in result.findings] == ["transcript"]
    assert load_voice(tmp_path / "v.safetensors").warnings == tuple(finding.message for finding in result.findings)
    assert "give exactly the words of the recording" in caplog.text
    fits = enroll(model, audio, tmp_path / "v.safetensors", EnrollOptions(text=TEXT))
    assert dataclasses.replace(fits, voice=result.voice).findings == ()
