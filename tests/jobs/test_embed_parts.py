"""`cv2jax embed --part`: parts put together are the one machine's bytes, whatever was killed, refused or done twice."""

import hashlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from cv2jax.cli.main import run as run_cli
from cv2jax.config import UserError
from cv2jax.data.embeddings import EmbeddingFile, pack_embeddings, unpack_embeddings
from cv2jax.jobs.embed import embed_manifest
from cv2jax.models.speaker_encoder.batching import WaveformEmbedder
from cv2jax.tasks.encoders import load_speaker_encoder
from tests.jobs.test_embed import make_run, write_manifest
from tests.run_record import Killed
from tests.small_speaker_run import make_voice

ROOT = pathlib.Path(__file__).parents[2]
OPTIONS = {"batch_seconds": 6.0, "block_rows": 2, "workers": 2}
FLAGS = [f"--{name}={value}" for name, value in OPTIONS.items()]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "speaker"
    make_run(path)
    return path


@pytest.fixture(scope="module")
def manifest(run_dir):
    """Nine utterances of three speakers, one of them silent, a missing one and a bad line; and one machine's file."""
    root = run_dir.parent
    names = {f"u{i}": f"s{i % 3}" for i in range(9)}
    for i, name in enumerate(names):
        waveform = make_voice(i, 0, 0.5 + 0.2 * i, 16_000) if i != 4 else np.zeros(16_000, np.int16)
        soundfile.write(root / f"{name}.wav", waveform, 16_000)
    path = write_manifest(root, names | {"missing": "s0"}, ["not json\n"])
    embed_manifest(run_dir, path, root / "whole.npz", **OPTIONS)
    return path


@pytest.mark.parametrize("count", [1, 3, 6])
def test_merged_parts_are_the_one_machines_bytes(run_dir, manifest, tmp_path, capfd, count):
    out = tmp_path / "e.npz"
    command = ["embed", str(run_dir), str(manifest), f"--out={out}", *FLAGS]
    for number in range(count, 0, -1):
        assert run_cli([*command, f"--part={number}/{count}"]) == 0
        assert not out.exists()
    told = capfd.readouterr()
    assert told.err.count("not JSON") == told.err.count("nearly silent") == told.err.count("no such audio") == 1
    assert run_cli([*command, "--merge"]) == 0
    assert digest(out) == digest(manifest.with_name("whole.npz"))
    assert "8 utterances of 3 speakers (0 with one)" in (printed := capfd.readouterr().out)
    assert "3 refused" in printed
    made = embed_manifest(run_dir, manifest, out, part=f"1/{count}", **OPTIONS)
    assert made.num_kept == made.num_blocks > 0
    assert made.embedded_seconds == made.num_programs == 0


def test_a_part_that_is_stopped_in_the_middle_goes_on(run_dir, manifest, tmp_path, monkeypatch):
    out, loaded = tmp_path / "e.npz", []

    def stop(path):
        loaded.append(path)
        if path.endswith("u7.wav"):
            raise Killed
        return read(path)

    from cv2jax.jobs import embed

    read = embed.read_audio
    with monkeypatch.context() as patch:
        patch.setattr(embed, "read_audio", stop)
        with pytest.raises(Killed):
            embed_manifest(run_dir, manifest, out, part="1/1", **OPTIONS)
    result = embed_manifest(run_dir, manifest, out, part="1/1", **OPTIONS)
    assert (result.num_kept, result.num_blocks, result.num_utterances) == (3, 5, 8)
    embed_manifest(run_dir, manifest, out, merge=True)
    assert digest(out) == digest(manifest.with_name("whole.npz"))


@pytest.mark.slow
def test_a_killed_part_goes_on_where_it_was(run_dir, manifest, tmp_path):
    out, blocks = tmp_path / "e.npz", tmp_path / "e.npz.part-1-of-1.blocks"
    code = (
        "import time; import cv2jax.jobs.embed as e\n"
        "read = e.read_audio\n"
        "e.read_audio = lambda path: time.sleep(600) if path.endswith('u7.wav') else read(path)\n"
        f"e.embed_manifest({str(run_dir)!r}, {str(manifest)!r}, {str(out)!r}, part='1/1', **{OPTIONS})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=ROOT)
    try:
        deadline = time.monotonic() + 180
        while not (blocks / "000002").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert embed_manifest(run_dir, manifest, out, part="1/1", **OPTIONS).num_kept == 3
    embed_manifest(run_dir, manifest, out, merge=True)
    assert digest(out) == digest(manifest.with_name("whole.npz"))


def test_parts_of_another_encoder_or_options_do_not_mix(run_dir, manifest, tmp_path):
    out = tmp_path / "e.npz"
    embed_manifest(run_dir, manifest, out, part="1/2", **OPTIONS)
    with pytest.raises(UserError, match=r"1 of 2 parts are missing or not finished: 2/2"):
        embed_manifest(run_dir, manifest, out, merge=True)
    embed_manifest(run_dir, manifest, out, part="2/2", **OPTIONS | {"batch_seconds": 7.0})
    with pytest.raises(UserError, match=r"part-2-of-2: is of batch_seconds=7.0"):
        embed_manifest(run_dir, manifest, out, merge=True)
    with pytest.raises(UserError, match=r"is of split=None, this command of train"):
        embed_manifest(run_dir, manifest, out, merge=True, split="train")


def test_vectors_do_not_depend_on_the_rows_of_a_batch(run_dir):
    """Bit by bit: batches of one length have one shape, full or not."""
    encoder = load_speaker_encoder(run_dir)
    embedder = WaveformEmbedder(encoder.config, encoder.params, encoder.model_state, batch_seconds=12.0)
    waveforms = [make_voice(i, 0, 0.4 + 0.3 * i, 16_000).astype(np.float32) / 32768 for i in range(8)]
    expected = dict(embedder(enumerate(waveforms[:4])))
    generator = np.random.default_rng(0)
    for size in (1, 3, 8, 8, 8):
        mixed = dict(embedder((int(i), waveforms[i]) for i in generator.permutation(8)[:size]))
        for number in expected.keys() & mixed.keys():
            np.testing.assert_array_equal(mixed[number], expected[number])
    assert embedder.shapes_used == {(3, 4)}


def test_packed_vectors_come_back(manifest):
    file = EmbeddingFile(manifest.with_name("whole.npz"))
    ids, speakers, vectors = unpack_embeddings(pack_embeddings(file.ids, ["a"] * len(file), file.embeddings))
    assert (ids, speakers) == (file.ids, ["a"] * 8)
    np.testing.assert_array_equal(vectors, file.embeddings)
    assert unpack_embeddings(pack_embeddings([], [], np.zeros((0, 8), np.float32)))[0] == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--part=0/3"], "--part 0/3: give i/n"),
        (["--part=4/3"], "--part 4/3: give i/n"),
        (["--part=a/b"], "--part a/b: give i/n"),
        (["--part=auto"], "--part auto: no launcher"),
        (["--part=1/2", "--merge"], "first run every part"),
        (["--merge"], "no part lies beside it"),
        (["--block_rows=-1"], "block_rows=-1: give a number of rows"),
    ],
)
def test_wrong_flags_are_one_line(run_dir, manifest, tmp_path, capfd, flags, message):
    assert run_cli(["embed", str(run_dir), str(manifest), f"--out={tmp_path / 'e.npz'}", *flags]) == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("cv2jax embed:")]
    assert message in line
    assert not list(tmp_path.iterdir())
