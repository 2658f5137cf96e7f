"""`cv2jax export --to bundle` and `cv2jax selftest`: what they refuse, what they print, and a bundle made and used by them."""

import dataclasses

import numpy as np
import pytest
import soundfile

from cv2jax.cli.main import run as run_cli
from cv2jax.config import UserError
from cv2jax.jobs import export_bundle as job
from cv2jax.jobs import selftest as selftest_job
from cv2jax.nn.chunks import NO_CHUNK, ChunkMask
from cv2jax.synthesis import bundle_files as files
from cv2jax.synthesis.bundle import MEL, SPEAKER, SPEECH, TOKENS, WAVE
from cv2jax.synthesis.gate import Check
from cv2jax.synthesis.voice import load_voice
from cv2jax.tasks import engine
from cv2jax.tasks.bundle import BundleReport
from cv2jax.tasks.bundle_programs import make_sizes
from cv2jax.tasks.encoders import load_tokenizer
from tests import small_bundle
from tests import small_model_directory as small
from tests.only_packages import run_command
from tests.small_model import make_small_model
from tests.small_model_directory import make_model_directory
from tests.small_token_corpus import NUM_CODES

SMALLEST = ("--slots=1", "--seconds=8")

PASSES = Check(stage=MEL, quantity="mel", error=0.0, bound=1e-3, seconds=0.5)
DRIFTS = dataclasses.replace(PASSES, stage=WAVE, quantity="waveform", error=0.5)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["export", "--to=bundle", "--out=x"], "expected one RUN, got 0"),
        (["export", "model", "--to=bundle", "--out=x", "--from_bundle=old"], "expected one RUN, got 1"),
        (["export", "model", "--to=bundle"], "--out is missing"),
        (["export", "model", "--to=bundle", "--out=x", "--step=3"], "--step is not for --to bundle; leave it out"),
        (["export", "run", "--to=qwen2", "--out=x", "--slots=2"], "--slots is for --to bundle; leave it out"),
        (["export", "nowhere", "--to=bundle", "--out=x"], "nowhere: no such model directory"),
        (["export", "--to=bundle", "--out=x", "--from_bundle=nowhere"], "nowhere: no bundle"),
        (["selftest"], "expected one BUNDLE, got 0"),
        (["selftest", "nowhere"], "nowhere: no bundle"),
    ],
)
def test_mistakes_are_one_line(words, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_cli(words) == 2
    printed = capsys.readouterr().err
    assert line in printed
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_asked_on_the_command_line_is_what_the_job_gets(monkeypatch, capsys):
    asked = []

    def export_bundle(*arguments):
        asked.append(arguments)
        return BundleReport(num_programs=7, num_bytes=2_000_000, export_seconds=3.0, gate_seconds=1.0, checks=[PASSES])

    monkeypatch.setattr(job, "export_bundle", export_bundle)
    words = ["--dtype=bfloat16", "--platforms=cpu,tpu", "--slots=2", "--seconds=20", "--voice=a", "--voice=b"]
    assert run_cli(["export", "model", "--to=bundle", "--out=x", *words]) == 0
    assert run_cli(["export", "--to=bundle", "--out=x", "--from_bundle=old"]) == 0
    options = job.BundleOptions(dtype="bfloat16", platforms=("cpu", "tpu"), slots=2, seconds=20.0, voices=("a", "b"))
    assert asked == [("model", "x", options), (None, "x", job.BundleOptions(from_bundle="old"))]
    assert "x: bundle, 7 programs, 2.0 MB; written in 3 s, tried in 1 s" in capsys.readouterr().out


@pytest.mark.parametrize(("checks", "code"), [([PASSES], 0), ([PASSES, DRIFTS], 2)])
def test_selftest_prints_a_table_and_names_the_first_stage_that_drifts(checks, code, monkeypatch, capsys):
    report = selftest_job.SelftestReport(
        checks=checks, drift=checks[1] if code else None, check_seconds=0.1, seconds=2.0
    )
    monkeypatch.setattr(selftest_job, "selftest", lambda bundle: report)
    assert run_cli(["selftest", "x"]) == code
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1].split()[:2] == ["flow_matching", "mel"]
    if code:
        assert "x: hift_vocoder drifts first (waveform: relative error 5.00e-01, bound 0.001)" in printed.err
    else:
        assert printed.out.splitlines()[-1] == "x: passes in 2.0 s, of which 0.1 s to check all files"


def test_a_bundle_that_is_written_again_keeps_its_sizes_where_none_are_asked(monkeypatch):
    old = dataclasses.replace(make_sizes(ChunkMask(chunk=25), slots=2, seconds=20.0), recordings=(5,))
    recorded = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(old).items()}
    monkeypatch.setattr(job, "sizes_for", lambda parts, **asked: make_sizes(ChunkMask(chunk=25), **asked))
    parts = small_bundle.make_parts()
    find = lambda sizes, **asked: job._find_sizes(dataclasses.replace(parts, sizes=sizes), job.BundleOptions(**asked))  # noqa: E731
    assert find(recorded) == old
    assert find(recorded, slots=3) == dataclasses.replace(old, slot_counts=(1, 3))
    assert find(recorded, seconds=8.0) == make_sizes(ChunkMask(chunk=25), slots=2, seconds=8.0)
    assert find(None) == make_sizes(ChunkMask(chunk=25), slots=4, seconds=60.0)


def test_a_model_that_never_streams_is_refused_before_any_work(monkeypatch, tmp_path, capsys):
    parts = dataclasses.replace(small_bundle.make_parts(), mask=ChunkMask(chunk=NO_CHUNK))
    monkeypatch.setattr(job, "parts_of_model", lambda model: parts)
    assert run_cli(["export", "model", "--to=bundle", f"--out={tmp_path}/new"]) == 2
    printed = capsys.readouterr().err
    assert "trained without chunks, and a bundle only streams; train one with chunks in model.mask_chunks" in printed
    assert "cv2jax synthesize --offline" in printed
    assert (printed.count("\n"), list(tmp_path.iterdir())) == (1, [])


def test_an_engine_is_made_of_a_bundle_or_of_a_model_directory(tmp_path):
    with pytest.raises(UserError, match="has no text_speech_lm; train it there"):
        engine.load_engine(tmp_path)
    (tmp_path / files.MANIFEST).write_text("{}")
    with pytest.raises(UserError, match=r"bundle\.json: is damaged"):
        engine.load_engine(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """All five stages, and a recording."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = dataclasses.replace(small.TOKENIZER, quantizer="vq", codebook_size=NUM_CODES)
    make_model_directory(root / "model", tokenizer, dataclasses.replace(small.ENCODER, embedding_dim=8))
    make_small_model(root / "model", load_tokenizer(root / "model" / "speech_tokenizer").hash)
    soundfile.write(root / "clip.wav", small.make_speech(3.1, 24000), 24000)
    return root / "model"


@pytest.fixture(scope="module")
def bundle(model):
    place = model.with_name("bundle")
    assert run_cli(["export", str(model), "--to=bundle", f"--out={place}", *SMALLEST]) == 0
    return place


def pcm(path):
    return soundfile.read(path, dtype="int16")[0].astype(int)


@pytest.mark.full
def test_a_bundle_serves_without_flax_what_its_model_says(model, bundle, tmp_path):
    done = run_command("selftest", bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert "passes in" in done.stdout
    said = ["synthesize", "one two three", "--voice=ann", "--max_length=40"]
    for name, words in (("streamed", ["--stream"]), ("whole", [])):
        done = run_command(*said, f"--model={bundle}", f"--out={tmp_path / name}.wav", *words)
        assert done.returncode in (0, 3), done.stderr
    assert run_cli([*said, f"--model={model}", f"--out={tmp_path}/model.wav"]) in (0, 3)
    wanted = pcm(tmp_path / "model.wav")
    assert len(wanted) > 1000
    for name in ("streamed", "whole"):
        found = pcm(tmp_path / f"{name}.wav")
        assert len(found) == len(wanted)
        assert np.abs(found - wanted).max() <= 4  # 1e-4 of full scale


@pytest.mark.full
def test_a_bundle_enrolls_as_its_model_does(model, bundle, tmp_path):
    words = ["enroll", str(model.with_name("clip.wav")), "--text=one two"]
    out = tmp_path / "eve.safetensors"
    done = run_command(*words, f"--model={bundle}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert run_cli([*words, f"--model={model}", f"--out={tmp_path}/wanted.safetensors"]) == 0
    found, wanted = load_voice(out), load_voice(tmp_path / "wanted.safetensors")
    np.testing.assert_array_equal(found.speech_tokens, wanted.speech_tokens)
    np.testing.assert_allclose(found.mel, wanted.mel, atol=1e-3)
    np.testing.assert_allclose(found.speaker_embedding, wanted.speaker_embedding, atol=1e-4)
    for name in ("speech_tokenizer", "speaker_encoder", "text", "warnings"):
        assert getattr(found, name) == getattr(wanted, name)


@pytest.mark.full
def test_a_bundle_is_written_again_from_itself_alone(bundle, tmp_path, capsys):
    again = tmp_path / "again"
    words = ["export", "--to=bundle", f"--from_bundle={bundle}", f"--out={again}", "--platforms=cpu", *SMALLEST]
    # Parameters of this size make of bfloat16 another model.
    assert run_cli([*words, "--dtype=bfloat16"]) == 2
    assert "again: not written: text_speech_lm drifts from the float32 model (logits" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert run_cli(words) == 0
    assert run_command("selftest", again).returncode == 0
    assert files.read_manifest(again)["platforms"] == ["cpu"]
    for stage in (SPEECH, MEL, WAVE, TOKENS, SPEAKER):
        name = f"{files.PARAMETERS}/{stage}.safetensors"
        assert files.hash_file(again / name) == files.hash_file(bundle / name)
