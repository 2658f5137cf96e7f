"""`cv2jax embed`: a manifest to embeddings of utterances and speakers; refusals, warnings, all or nothing, what is no run."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import soundfile

from cv2jax.audio.fbank import kaldi_fbank
from cv2jax.audio.io import load_waveform
from cv2jax.cli.main import run as run_cli
from cv2jax.config import UserError, to_dict
from cv2jax.data.embeddings import EmbeddingFile
from cv2jax.jobs.embed import embed_manifest
from cv2jax.models.speaker_encoder.batching import WaveformEmbedder
from cv2jax.models.speaker_encoder.model import MIN_SAMPLES, embed, encoder_hash
from cv2jax.tasks.encoders import load_speaker_encoder
from cv2jax.train.checkpoint import Checkpoints
from cv2jax.train.state import TrainState
from tests.models.golden_speaker import SMALL_CONFIG, random_tree
from tests.small_speaker_run import make_voice

CONFIG = dataclasses.replace(SMALL_CONFIG, num_mels=80, block_layers=(1, 1), dilations=(1, 2))
SECONDS = {"a": 1.2, "b": 0.8, "c": 3.4, "d": 2.0, "e": 0.5}
SPEAKERS = {"a": "ann", "b": "bo", "c": "ann", "d": "ann", "e": "bo"}


def make_run(workdir, task="speaker_encoder", poison=False):
    workdir.mkdir()
    described = {"config": {"task": task}, "facts": {"model": to_dict(CONFIG)}}
    (workdir / "run.json").write_text(json.dumps(described))
    tree = random_tree(CONFIG)
    params = {"encoder": tree["encoder"], "classes": jax.numpy.ones((6, 3))}  # classes are not for embedding
    state = {"norms": tree["norms"], "num_batches": tree["num_batches"]}
    if poison:
        params["encoder"]["dense"]["kernel"] += np.nan
    zero = jax.numpy.zeros((), jax.numpy.int32)
    with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(7, TrainState(step=zero, num_skipped=zero, params=params, opt_state={}, model_state=state))
    return tree


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "speaker"
    make_run(path)
    return path


def write_manifest(root, speakers, extra=()):
    lines = [
        {"id": name, "audio": f"{name}.wav", "text": None, "speaker": speaker, "language": "en", "split": "train"}
        for name, speaker in speakers.items()
    ]
    path = root / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "".join(extra))
    return path


@pytest.fixture
def manifest(tmp_path):
    for number, (name, seconds) in enumerate(SECONDS.items()):
        rate = (16_000, 24_000, 44_100)[number % 3]
        soundfile.write(tmp_path / f"{name}.wav", make_voice(number, 0, seconds, rate), rate)
    return write_manifest(tmp_path, SPEAKERS)


@pytest.mark.slow
def test_each_utterance_is_as_alone_and_speakers_are_means_of_raw_vectors(run_dir, manifest, tmp_path):
    out = tmp_path / "made" / "e.npz"
    result = embed_manifest(run_dir, manifest, out, batch_seconds=6.0)
    assert (result.num_utterances, result.num_speakers, result.num_refused) == (5, 2, 0)
    assert result.num_programs == 2  # of 3 and of 6 s
    encoder, file = load_speaker_encoder(run_dir), EmbeddingFile(out)
    assert (
        file.encoder == result.encoder == encoder.hash == encoder_hash(CONFIG, random_tree(CONFIG), random_tree(CONFIG))
    )
    assert file.ids == list(SECONDS)
    vectors = {}
    for name in SECONDS:
        features, num_frames = kaldi_fbank(load_waveform(tmp_path / f"{name}.wav", 16_000)[None], subtract_mean=True)
        arguments = (encoder.params, encoder.model_state, jax.numpy.asarray(features), jax.numpy.asarray(num_frames))
        vectors[name] = np.asarray(embed(CONFIG, *arguments)[0])
        np.testing.assert_allclose(file.utterance(name), vectors[name], atol=2e-3)  # the features differ by 5e-4
    for speaker in ("ann", "bo"):
        own = [file.utterance(name) for name in SECONDS if SPEAKERS[name] == speaker]
        np.testing.assert_allclose(file.speaker(speaker), np.mean(own, axis=0), atol=1e-6)
    again = tmp_path / "again.npz"
    embed_manifest(run_dir, manifest, again, batch_seconds=6.0)
    np.testing.assert_array_equal(EmbeddingFile(again).embeddings, file.embeddings)


def test_bad_utterances_are_named_and_the_rest_kept(run_dir, manifest, tmp_path, capfd, caplog):
    rate = 16_000
    soundfile.write(tmp_path / "silent.wav", np.zeros(rate, np.int16), rate)
    soundfile.write(tmp_path / "short.wav", make_voice(0, 0, 0.05, rate), rate)
    soundfile.write(tmp_path / "brief.wav", make_voice(0, 0, 0.08, rate), rate)
    loud = np.clip(make_voice(1, 0, 1.0, rate).astype(np.int32) * 20, -32768, 32767).astype(np.int16)
    soundfile.write(tmp_path / "clipped.wav", loud, rate)
    (tmp_path / "text.wav").write_text("no sound")
    bad = dict.fromkeys(("silent", "short", "brief", "clipped", "text", "missing"), "cy")
    path = write_manifest(tmp_path, {"a": "ann", "b": "bo", "d": "ann"} | bad, ["not json\n"])
    out = tmp_path / "e.npz"
    assert run_cli(["embed", str(run_dir), str(path), "--out", str(out)]) == 0
    captured = capfd.readouterr()
    assert "5 utterances of 3 speakers (1 with one)" in captured.out
    assert "5 refused, 2 warned of" in captured.out
    for name, reason in (
        ("refused silent", "nearly silent"),
        ("refused short", "lasts 50 ms; an embedding takes 55 ms or more"),
        ("refused text", "cannot decode"),
        ("refused missing", "no such audio file"),
        ("refused", "not JSON"),
        ("warning of clipped", "at full scale"),
        ("warning of brief", "lasts only 80 ms"),
    ):
        assert any(name in line and reason in line for line in captured.err.splitlines()), name
    assert "1 speakers have one utterance, whose vector is their mean: bo" in caplog.text
    file = EmbeddingFile(out)
    assert file.ids == ["a", "b", "d", "brief", "clipped"]
    np.testing.assert_array_equal(file.speaker("bo"), file.utterance("b"))
    strict = tmp_path / "strict.npz"
    assert run_cli(["embed", str(run_dir), str(path), "--out", str(strict), "--strict"]) == 2
    assert not strict.exists()


def test_where_nothing_can_be_embedded_nothing_is_written(run_dir, tmp_path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(16_000, np.int16), 16_000)
    with pytest.raises(UserError, match=r"none of the 1 utterances can be embedded; first: .*nearly silent"):
        embed_manifest(run_dir, write_manifest(tmp_path, {"silent": "s"}), tmp_path / "e.npz")
    assert not (tmp_path / "e.npz").exists()


def test_what_is_no_run_of_a_speaker_encoder_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        load_speaker_encoder(tmp_path)
    make_run(tmp_path / "flow", task="flow_matching")
    with pytest.raises(UserError, match="is a run of flow_matching; give the --workdir of a speaker_encoder"):
        load_speaker_encoder(tmp_path / "flow")
    make_run(tmp_path / "nan", poison=True)
    with pytest.raises(UserError, match="NaN or infinite numbers"):
        load_speaker_encoder(tmp_path / "nan")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--out is missing"),
        (("--out=e.jsonl",), "embeddings are written as .npz"),
        (("--out=e.npz", "--split=dev"), "split=dev: .* has no such split; it has train"),
        (("--out=e.npz", "--workers=-1"), "workers=-1: give a number of threads"),
        (("--out=e.npz", "--batch_seconds=0"), "batch_seconds=0.0: must be positive"),
    ],
)
def test_wrong_flags_are_one_line(run_dir, manifest, capfd, flags, message):
    assert run_cli(["embed", str(run_dir), str(manifest), *flags]) == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("cv2jax embed:")]
    assert re.search(message, line)


def test_what_is_too_short_to_embed_is_a_defect_of_the_caller(run_dir):
    encoder = load_speaker_encoder(run_dir)
    embedder = WaveformEmbedder(encoder.config, encoder.params, encoder.model_state)
    with pytest.raises(ValueError, match="879 samples, at least 880"):
        list(embedder([("x", np.zeros(MIN_SAMPLES - 1, np.float32))]))
