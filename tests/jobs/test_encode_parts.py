"""`cv2jax encode --part`: parts put together are the one machine's bytes, whatever was killed, refused or done twice."""

import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from cv2jax.cli.main import run as run_cli
from cv2jax.config import UserError
from cv2jax.data.tokens import read_speech_tokens
from cv2jax.jobs.encode import encode_audio
from cv2jax.models.speech_tokenizer.tokenize import WaveformEncoder, make_encoder
from cv2jax.tasks.encoders import load_tokenizer
from tests.data.speech_files import make_waveform, write_speech
from tests.jobs.test_encode import make_run, write_manifest
from tests.small_model_directory import TOKENIZER

ROOT = pathlib.Path(__file__).parents[2]
OPTIONS = {"batch_seconds": 6.0, "block_rows": 2, "workers": 2}
FLAGS = [f"--{name}={value}" for name, value in OPTIONS.items()]


def digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("runs") / "tokenizer"
    make_run(path, TOKENIZER)
    return path


@pytest.fixture(scope="module")
def manifest(workdir: pathlib.Path) -> pathlib.Path:
    """Eleven utterances in two piece lengths, three of them bad, and a bad line; and what one machine makes of it."""
    root = workdir.parent
    rows = [(f"u{i}", f"{i}.wav", "test" if i % 4 == 0 else "train") for i in range(9)]
    for i in range(9):
        write_speech(root / f"{i}.wav", i, seconds=0.3 + (i * 5 % 9) / 2)
    rows[5:5] = [("metadata", "0.wav", "train"), ("missing", "none.wav", "train")]
    write_manifest(root / "m.jsonl", rows)
    with open(root / "m.jsonl", "a") as file:
        file.write("not json\n")
    for suffix in ("jsonl", "npz"):
        encode_audio(workdir, [str(root / "m.jsonl")], root / f"whole.{suffix}", **OPTIONS)
    return root / "m.jsonl"


@pytest.mark.parametrize(("suffix", "count"), [("jsonl", 1), ("jsonl", 3), ("npz", 3), ("jsonl", 7)])
def test_merged_parts_are_the_one_machines_bytes(workdir, manifest, tmp_path, capfd, suffix, count):
    out = tmp_path / f"t.{suffix}"
    command = ["encode", str(workdir), str(manifest), f"--out={out}", *FLAGS]
    for number in range(count, 0, -1):
        assert run_cli([*command, f"--part={number}/{count}"]) == 0
        assert not out.exists()
    told = capfd.readouterr()
    assert told.err.count("not JSON") == told.err.count("refused missing") == 1
    assert run_cli([*command, "--merge"]) == 0
    assert digest(out) == digest(manifest.with_name(f"whole.{suffix}"))
    refused = 3 if suffix == "npz" else 2
    assert f"{out}: {12 - refused} utterances" in (printed := capfd.readouterr().out)
    assert f"{refused} refused" in printed
    made = encode_audio(workdir, [str(manifest)], out, part=f"1/{count}", **OPTIONS)
    assert made.num_kept == made.num_blocks > 0
    assert made.encoded_seconds == made.num_programs == 0


def test_parts_run_the_batches_of_one_machine(workdir, manifest, tmp_path, monkeypatch):
    """Why their tokens are the same: a batch of another shape would round differently, and near ties would flip."""
    ran, run = [], WaveformEncoder.run

    def record(self, kind, frames, signals, rows):
        ran.append((kind, frames, rows, tuple(len(signal) for signal in signals)))
        return run(self, kind, frames, signals, rows)

    monkeypatch.setattr(WaveformEncoder, "run", record)
    encode_audio(workdir, [str(manifest)], tmp_path / "whole.jsonl", **OPTIONS)
    whole, ran[:] = sorted(ran), []
    for number in (3, 1, 2):
        encode_audio(workdir, [str(manifest)], tmp_path / "t.jsonl", part=f"{number}/3", **OPTIONS)
    assert sorted(ran) == whole
    assert len({rows for _, _, rows, _ in whole}) > 1  # full and unfilled batches


def test_a_split_in_parts(workdir, manifest, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "t.jsonl"
    arguments = {"run": workdir, "inputs": [str(manifest)], "split": "test", **OPTIONS}
    encode_audio(out=whole, **arguments)
    for part in ("1/2", "2/2"):
        encode_audio(out=out, part=part, **arguments)
    with pytest.raises(UserError, match=r"is of split=test, this command of None"):
        encode_audio(workdir, [str(manifest)], out, merge=True)
    assert encode_audio(out=out, merge=True, **arguments).num_utterances == 3
    assert digest(out) == digest(whole)


def start_slow_part(
    workdir: pathlib.Path, manifest: pathlib.Path, out: pathlib.Path, *stops_at: str
) -> subprocess.Popen:
    """Part 1/1 in a process of its own that waits for ever at one file."""
    code = (
        "import sys, time; import cv2jax.jobs.encode as e; import cv2jax.jobs.encode_inputs as i\n"
        "load = i.load_waveform\n"
        "def slow(path, rate):\n"
        f"    if path.endswith({stops_at!r}): time.sleep(600)\n"
        "    return load(path, rate)\n"
        "i.load_waveform = slow\n"
        f"e.encode_audio({str(workdir)!r}, [{str(manifest)!r}], {str(out)!r}, part='1/1', **{OPTIONS})\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=ROOT)


def test_a_killed_part_goes_on_where_it_was(workdir, manifest, tmp_path):
    out = tmp_path / "t.jsonl"
    blocks = tmp_path / "t.jsonl.part-1-of-1.blocks"
    process = start_slow_part(workdir, manifest, out, "7.wav")
    try:
        deadline = time.monotonic() + 120
        while not (blocks / "000003").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "t.jsonl.part-1-of-1").exists()
    result = encode_audio(workdir, [str(manifest)], out, part="1/1", **OPTIONS)
    assert (result.num_kept, result.num_blocks) == (4, 6)
    assert (result.num_utterances, result.num_refused) == (10, 1)
    encode_audio(workdir, [str(manifest)], out, merge=True)
    assert digest(out) == digest(manifest.with_name("whole.jsonl"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.jsonl", "t.jsonl.part-1-of-1"]


def test_two_machines_that_run_the_same_part_at_once(workdir, manifest, tmp_path):
    out, results = tmp_path / "t.jsonl", []

    def make() -> None:
        results.append(encode_audio(workdir, [str(manifest)], out, part="1/1", **OPTIONS))

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.num_utterances for result in results] == [10, 10, 10]
    encode_audio(workdir, [str(manifest)], out, merge=True)
    assert digest(out) == digest(manifest.with_name("whole.jsonl"))


def test_parts_of_another_manifest_tokenizer_or_options_do_not_mix(workdir, manifest, tmp_path):
    out, inputs = tmp_path / "t.jsonl", [str(manifest)]
    make_run(tmp_path / "vq", dataclasses.replace(TOKENIZER, quantizer="vq"))
    encode_audio(workdir, inputs, out, part="1/2", **OPTIONS)
    with pytest.raises(UserError, match=r"1 of 2 parts are missing or not finished: 2/2"):
        encode_audio(workdir, inputs, out, merge=True)
    for other, options, name in (
        (tmp_path / "vq", OPTIONS, "tokenizer"),
        (workdir, OPTIONS | {"batch_seconds": 7.0}, "batch_seconds"),
        (workdir, OPTIONS | {"compute_dtype": "bfloat16"}, "compute_dtype"),
        (workdir, OPTIONS | {"block_rows": 3}, "block_rows"),
    ):
        encode_audio(other, inputs, out, part="2/2", **options)
        with pytest.raises(
            UserError, match=f"part-2-of-2: is of {name}=.*give every part and --merge the same command"
        ):
            encode_audio(workdir, inputs, out, merge=True)
    encode_audio(workdir, inputs, out, part="2/2", **OPTIONS)
    longer = manifest.with_name("longer.jsonl")
    longer.write_text(manifest.read_text() + "\n")
    with pytest.raises(UserError, match=r"is of manifest=.*, this command of"):
        encode_audio(workdir, [str(longer)], out, merge=True)
    encode_audio(workdir, inputs, out, merge=True)
    assert digest(out) == digest(manifest.with_name("whole.jsonl"))


def test_where_nothing_can_be_encoded_the_merge_says_so(workdir, tmp_path):
    write_manifest(tmp_path / "m.jsonl", [("a", "none.wav", "train"), ("b", "none.wav", "train")])
    arguments = {"run": workdir, "inputs": [str(tmp_path / "m.jsonl")], "out": tmp_path / "t.jsonl"}
    assert encode_audio(part="1/1", **arguments).num_refused == 2
    with pytest.raises(UserError, match="none of the 2 inputs can be encoded"):
        encode_audio(merge=True, **arguments)
    assert not (tmp_path / "t.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--part=0/3"], "--part 0/3: give i/n"),
        (["--part=4/3"], "--part 4/3: give i/n"),
        (["--part=a/b"], "--part a/b: give i/n"),
        (["--part=auto"], "--part auto: no launcher"),
        (["--part=1/2", "--merge"], "first run every part"),
        (["--merge"], "no part lies beside it"),
        (["--part=1/2", "--compare_one_piece"], "take one .jsonl manifest as the only input"),
        (["--part=1/2", "--block_rows=-1"], "block_rows=-1: give a number of rows"),
    ],
)
def test_wrong_flags_are_one_line(workdir, manifest, tmp_path, capfd, flags, message):
    out = tmp_path / "t.jsonl"
    assert run_cli(["encode", str(workdir), str(manifest), f"--out={out}", *flags]) == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("cv2jax encode:")]
    assert message in line
    assert not list(tmp_path.iterdir())


def test_parts_take_one_manifest(workdir, manifest, tmp_path):
    for inputs in ([str(manifest), str(manifest)], [str(manifest.with_name("0.wav"))]):
        for flags in ({"part": "1/2"}, {"merge": True}):
            with pytest.raises(UserError, match=r"take one .jsonl manifest as the only input"):
                encode_audio(workdir, inputs, tmp_path / "t.jsonl", **flags)


def test_tokens_do_not_depend_on_the_rows_of_a_batch(workdir):
    """Bit by bit within a shape; what an unfilled last batch makes of them is why blocks are the same for all parts."""
    tokenizer = load_tokenizer(workdir)
    encoder = make_encoder(tokenizer.config, tokenizer.params, tokenizer.model_state, batch_seconds=12.0)
    waveforms = [make_waveform(i, 20_000 + 1700 * i) for i in range(8)]
    expected = encoder(waveforms[:4])
    assert encoder.shapes_used == {("waveform", 300, 4)}
    generator = np.random.default_rng(0)
    for _ in range(6):
        order = generator.permutation(8)
        mixed = dict(zip(order.tolist(), encoder([waveforms[i] for i in order]), strict=True))
        for number, tokens in enumerate(expected):
            np.testing.assert_array_equal(mixed[number], tokens)
    assert encoder.shapes_used == {("waveform", 300, 4)}


def test_blocks_hold_the_tokens_in_order(workdir, manifest):
    ids = [identity for identity, _ in read_speech_tokens(manifest.with_name("whole.jsonl"))]
    assert ids == ["u0", "u1", "u2", "u3", "u4", "metadata", "u5", "u6", "u7", "u8"]
    lines = manifest.with_name("whole.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ids
