"""`cv2jax encode`: files and manifests to tokens, order, refusals, all or nothing, and what is no run."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import soundfile

from cv2jax.audio.io import load_waveform
from cv2jax.cli.main import run as run_cli
from cv2jax.config import UserError
from cv2jax.jobs.encode import encode_audio
from cv2jax.models.speech_tokenizer.config import SpeechTokenizerConfig
from cv2jax.models.speech_tokenizer.tokenize import make_encoder, tokenizer_hash
from cv2jax.tasks.encoders import load_tokenizer
from cv2jax.train.checkpoint import Checkpoints
from cv2jax.train.state import TrainState
from tests.data.speech_files import write_speech
from tests.small_model_directory import TOKENIZER, init_tokenizer


def make_run(workdir: pathlib.Path, config: SpeechTokenizerConfig, *, poison: bool = False) -> TrainState:
    """A workdir as `cv2jax train` leaves it, with random weights."""
    workdir.mkdir(parents=True)
    (workdir / "run.json").write_text(json.dumps({"config": {}, "facts": {"model": dataclasses.asdict(config)}}))
    params, model_state = jax.tree.map(lambda a: a, init_tokenizer(config))
    params["decoder"] = {"bias": jax.numpy.ones(5)}  # what encoding does not need
    if poison:
        params["encoder"]["conv1"]["bias"] += np.nan
    zero = jax.numpy.zeros((), jax.numpy.int32)
    state = TrainState(step=zero, num_skipped=zero, params=params, opt_state={}, model_state=model_state)
    with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(7, state)
    return state


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("runs") / "tokenizer"
    make_run(path, TOKENIZER)
    return path


def read_lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_manifest(path: pathlib.Path, rows: list[tuple[str, str, str]]) -> None:
    fields = {"text": None, "speaker": "s", "language": "en"}
    lines = [json.dumps({"id": i, "audio": audio, "split": split, **fields}) for i, audio, split in rows]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("quantizer", ["fsq", "vq"])
def test_only_the_tokenizer_is_loaded_and_files_become_tokens(tmp_path: pathlib.Path, quantizer: str) -> None:
    config = dataclasses.replace(TOKENIZER, quantizer=quantizer)
    state = make_run(tmp_path / "run", config)
    tokenizer = load_tokenizer(tmp_path / "run")
    assert set(tokenizer.params) == ({"encoder", "quantizer"} if quantizer == "fsq" else {"encoder"})
    assert tokenizer.hash == tokenizer_hash(config, state.params, state.model_state)
    names = []
    for i, (suffix, rate_hz, seconds) in enumerate([("wav", 16000, 0.3), ("flac", 44100, 1.2), ("ogg", 24000, 0.77)]):
        write_speech(tmp_path / f"{i}.{suffix}", i, rate_hz=rate_hz, seconds=seconds, channels=2)
        names.append(str(tmp_path / f"{i}.{suffix}"))
    waveforms = [load_waveform(name, 16000) for name in names]
    expected = make_encoder(config, state.params, state.model_state)(waveforms)
    result = encode_audio(tmp_path / "run", names, tmp_path / "new" / "tokens.jsonl")
    assert (result.num_utterances, result.num_refused) == (3, 0)
    for line, name, waveform, tokens in zip(
        read_lines(tmp_path / "new" / "tokens.jsonl"), names, waveforms, expected, strict=True
    ):
        assert line["id"] == line["audio"] == name
        assert line["tokenizer"] == result.tokenizer == tokenizer.hash
        assert line["num_frames"] == len(waveform) // 160
        assert line["seconds"] == pytest.approx(len(waveform) / 16000)
        assert line["speech_tokens"] == tokens.tolist()
        assert len(tokens) == -(-line["num_frames"] // 4)
    encode_audio(tmp_path / "run", names, tmp_path / "tokens.npz")
    with np.load(tmp_path / "tokens.npz") as arrays:
        assert list(arrays) == [*names, "metadata"]
        metadata = json.loads(str(arrays["metadata"]))
        assert metadata["tokenizer"] == tokenizer.hash
        assert metadata["num_codes"] == config.num_codes
        for name, tokens in zip(names, expected, strict=True):
            assert arrays[name].dtype == np.int32
            np.testing.assert_array_equal(arrays[name], tokens)


def test_bad_inputs_are_refused_and_the_rest_kept(
    workdir: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_speech(tmp_path / "good.wav", 1)
    write_speech(tmp_path / "slow.wav", 2, rate_hz=4000)
    write_speech(tmp_path / "tiny.wav", 3, seconds=0.004)
    soundfile.write(tmp_path / "nan.wav", np.full(8000, np.nan, np.float32), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 16000)
    (tmp_path / "text.wav").write_text("no sound")
    names = ["slow", "tiny", "nan", "empty", "text", "missing"]
    rows = [(f"id-{name}", f"{name}.wav", "train") for name in ("good", *names)]
    write_manifest(tmp_path / "all.jsonl", rows)
    with open(tmp_path / "all.jsonl", "a") as file:
        file.write("not json\n")
    inputs = [str(tmp_path / "all.jsonl"), str(tmp_path / "good.wav"), str(tmp_path / "good.wav"), str(tmp_path)]
    out = tmp_path / "tokens.jsonl"
    assert run_cli(["encode", str(workdir), *inputs, "--out", str(out)]) == 0
    assert [line["id"] for line in read_lines(out)] == ["id-good", str(tmp_path / "good.wav")]
    captured = capfd.readouterr()
    assert "2 utterances" in captured.out
    assert "9 refused" in captured.out
    reasons = (
        "4000 Hz",
        "10 ms",
        "NaN",
        "no samples",
        "cannot decode",
        "no such audio file",
        "not JSON",
        "duplicate id",
    )
    for reason in (*reasons, "not a file"):
        assert captured.err.count(reason) == 1, reason
    strict_out = tmp_path / "strict.jsonl"
    assert run_cli(["encode", str(workdir), *inputs, "--out", str(strict_out), "--strict"]) == 2
    bad = [str(tmp_path / f"{name}.wav") for name in names]
    assert run_cli(["encode", str(workdir), *bad, "--out", str(strict_out)]) == 2
    assert "none of the 6 inputs" in capfd.readouterr().err
    assert not strict_out.exists()
    assert not list(tmp_path.glob(".*tmp"))


def test_split_and_manifest_order(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    rows = []
    for i in range(9):
        write_speech(tmp_path / f"{i}.wav", i, seconds=0.2 + (i * 5 % 9) / 2)
        rows.append((f"u{i}", f"{i}.wav", "test" if i % 3 == 0 else "train"))
    write_manifest(tmp_path / "m.jsonl", rows)
    out, manifest = tmp_path / "t.jsonl", str(tmp_path / "m.jsonl")
    encode_audio(workdir, [manifest], out, batch_seconds=6.0, workers=2)
    assert [line["id"] for line in read_lines(out)] == [row[0] for row in rows]
    encode_audio(workdir, [manifest], out, split="test", compute_dtype="bfloat16")
    assert [line["id"] for line in read_lines(out)] == ["u0", "u3", "u6"]
    with pytest.raises(UserError, match="test, train"):
        encode_audio(workdir, [manifest], out, split="dev")


def test_compare_one_piece_prints_the_count(
    workdir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_speech(tmp_path / "long.flac", 1, seconds=61)
    write_speech(tmp_path / "short.flac", 2)
    inputs = [str(tmp_path / "long.flac"), str(tmp_path / "short.flac")]
    arguments = ["encode", str(workdir), *inputs, "--out", str(tmp_path / "t.npz"), "--compare_one_piece"]
    assert run_cli(arguments) == 0
    printed = capsys.readouterr().out
    assert "1 files beyond 30 s" in printed
    assert "of 1500 tokens differ" in printed
    with np.load(tmp_path / "t.npz") as arrays:
        assert [len(arrays[name]) for name in inputs] == [1525, 5]


def test_what_is_no_tokenizer_is_one_line(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    write_speech(tmp_path / "a.wav", 1)
    audio, out = [str(tmp_path / "a.wav")], tmp_path / "t.jsonl"
    (tmp_path / "none").mkdir()
    config = dataclasses.asdict(dataclasses.replace(TOKENIZER, quantizer="none"))
    (tmp_path / "none" / "run.json").write_text(json.dumps({"config": {}, "facts": {"model": config}}))
    make_run(tmp_path / "nan", TOKENIZER, poison=True)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "run.json").write_text((workdir / "run.json").read_text())
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    (tmp_path / "young" / "run.json").write_text((workdir / "run.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text(json.dumps({"config": {}, "facts": {"model": {"width": 3}}}))
    wrong = {
        "missing": "no run.json",
        "none": "quantizer=none",
        "nan": "NaN or infinite",
        "bare": "no checkpoint",
        "young": "no checkpoint",
        "other": "not a run of the speech tokenizer",
    }
    for name, message in wrong.items():
        with pytest.raises(UserError, match=message):
            encode_audio(tmp_path / name, audio, out)
    for bad_out in ("t.txt", "t", "."):
        with pytest.raises(UserError, match=r"\.jsonl"):
            encode_audio(workdir, audio, tmp_path / bad_out)
    for arguments, message in (
        ({"inputs": []}, "no inputs"),
        ({"inputs": [str(tmp_path / "none.jsonl")]}, "no such manifest"),
        ({"inputs": audio, "split": "train"}, "only manifests have splits"),
        ({"inputs": audio, "workers": -1}, "workers"),
        ({"inputs": audio, "batch_seconds": -1.0}, "batch_seconds"),
    ):
        with pytest.raises(UserError, match=message):
            encode_audio(workdir, out=out, **arguments)
    assert not out.exists()
    assert run_cli(["encode", str(workdir)]) == 2
    assert run_cli(["encode", str(workdir), *audio]) == 2


def test_an_input_is_never_replaced(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    write_speech(tmp_path / "a.wav", 1)
    write_manifest(tmp_path / "m.jsonl", [("a", "a.wav", "train")])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "m.jsonl")
    before = (tmp_path / "m.jsonl").read_bytes()
    for out in ("m.jsonl", "link.jsonl", "../" + tmp_path.name + "/m.jsonl"):
        with pytest.raises(UserError, match="is also an input; give another file"):
            encode_audio(workdir, [str(tmp_path / "a.wav"), str(tmp_path / "m.jsonl")], tmp_path / out)
    assert (tmp_path / "m.jsonl").read_bytes() == before


def test_a_killed_run_leaves_no_file_at_out(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pipe = tmp_path / "endless.wav"
    write_speech(tmp_path / "a.wav", 1)
    out = tmp_path / "t.jsonl"
    out.write_text("older\n")
    # The job waits for ever at its second input, and is killed there.
    code = (
        "import sys, time; import cv2jax.jobs.encode as e; import cv2jax.jobs.encode_inputs as i\n"
        "load = i.load_waveform\n"
        "def slow(path, rate):\n"
        "    if path.endswith('endless.wav'): time.sleep(600)\n"
        "    return load(path, rate)\n"
        "i.load_waveform = slow\n"
        "e.encode_audio(sys.argv[1], sys.argv[2:4], sys.argv[4], workers=1)\n"
    )
    command = [sys.executable, "-c", code, str(workdir), str(tmp_path / "a.wav"), str(pipe), str(out)]
    process = subprocess.Popen(
        command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=pathlib.Path(__file__).parents[2]
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".t.jsonl.*.tmp")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert out.read_text() == "older\n"
