"""`cv2jax export --to bundle` and `cv2jax selftest`: what they refuse, what they print, and a bundle made and used by them."""

import dataclasses

import pytest
import soundfile

from cv2jax.cli.main import run as run_cli
from cv2jax.config import UserError
from cv2jax.jobs import export_bundle as job
from cv2jax.jobs import selftest as selftest_job
from cv2jax.synthesis import bundle_files as files
from cv2jax.synthesis.bundle import MEL, WAVE
from cv2jax.synthesis.gate import Check
from cv2jax.tasks import engine
from cv2jax.tasks.bundle import BundleReport
from tests.small_model import make_small_model

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


def test_an_engine_is_made_of_a_bundle_or_of_a_model_directory(tmp_path):
    with pytest.raises(UserError, match="has no text_speech_lm; train it there"):
        engine.load_engine(tmp_path)
    (tmp_path / files.MANIFEST).write_text("{}")
    with pytest.raises(UserError, match=r"bundle\.json: is damaged"):
        engine.load_engine(tmp_path)


@pytest.mark.full
def test_a_model_directory_becomes_a_bundle_that_says_the_same(tmp_path, capsys):
    model, bundle = make_small_model(tmp_path / "model"), tmp_path / "bundle"
    words = ["--slots=1", "--seconds=8", "--platforms=cpu"]
    assert run_cli(["export", str(model), "--to=bundle", f"--out={bundle}", *words]) == 0
    assert run_cli(["selftest", str(bundle)]) == 0
    assert "passes in" in capsys.readouterr().out
    heard = []
    for place in (model, bundle):
        out = tmp_path / f"{place.name}.wav"
        said = ["one two three", f"--model={place}", "--voice=ann", f"--out={out}", "--max_length=40"]
        assert run_cli(["synthesize", *said]) in (0, 3)
        heard.append(soundfile.read(out, dtype="int16")[0].tolist())
    assert heard[0] == heard[1]
    assert len(heard[0]) > 1000
