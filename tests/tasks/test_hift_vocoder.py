"""The vocoder task: both networks learn, resume and agree on every mesh; what it refuses."""

import json

import jax
import numpy as np
import pytest

from cv2jax.audio.mel import FLOW_MEL, mel_spectrogram
from cv2jax.config import MeshConfig, UserError, load_config, override
from cv2jax.data.shards import Corpus
from cv2jax.jobs.f0 import compute_f0
from cv2jax.jobs.report import write_report
from cv2jax.parallel.distributed import global_batch
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state
from cv2jax.synthesis.wave_stream import WaveStreams, synthesise
from cv2jax.tasks import make_task
from cv2jax.tasks.stages import make_wave_stage
from cv2jax.tasks.trained import load_vocoder
from cv2jax.train.gan_step import DISCRIMINATORS, GENERATOR
from cv2jax.train.loop import train
from cv2jax.train.state import make_state
from cv2jax.train.step import compile_steps
from tests.run_record import Killed, first_steps, record, stopping_at
from tests.small_corpus import make_small_corpus
from tests.small_vocoder_run import SMALL_VOCODER, make_small_vocoder_corpus

SMALL = (*SMALL_VOCODER, "num_steps=6", "log_every=1", "evaluate_every=3", "save_every=3", "data.num_buckets=1")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_small_vocoder_corpus(tmp_path_factory.mktemp("vocoder") / "corpus")


def config_of(corpus, *sets):
    return override(load_config("hift_vocoder_tiny"), [f"data.corpus={corpus}", *SMALL, *sets])


def losses_of_both(*arguments):
    """Of each step: losses and gradients of generator and discriminators, and the batch's hash."""
    names = ("loss", "discriminator_loss", "grad_norm", "discriminator_grad_norm", "batch_hash")
    return np.array([[float(metrics[name]) for name in names] for metrics in first_steps(*arguments)[0]])


@pytest.mark.full
def test_losses_and_gradients_are_the_same_on_every_mesh(corpus):
    config = config_of(corpus, "model.adversarial_from=0")
    want = losses_of_both(config, MeshConfig(), 1)
    got = losses_of_both(config, MeshConfig(data=2, fsdp=2, tensor=2), 8)
    np.testing.assert_array_equal(got[:, -1], want[:, -1])
    np.testing.assert_allclose(got[:, :-1], want[:, :-1], rtol=1e-3)


LEARNS = ("model.adversarial_from=3", "optimizer.ema_decay=0.5", "evaluate_every=6")


@pytest.mark.full
@pytest.mark.parametrize("at", [2, 3, 4])  # before, at and after the first step of the contest
def test_a_killed_run_resumes_bit_for_bit(corpus, tmp_path, at):
    config = config_of(corpus, *LEARNS, "save_every=1")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(make_task(config), config, whole) == 0
    with pytest.raises(Killed):
        train(stopping_at(make_task(config), at), config, broken)
    assert train(make_task(config), config, broken) == 0
    assert record(broken) == record(whole)


@pytest.mark.slow
def test_it_learns_reports_and_speaks(corpus, tmp_path):
    """What a training saved is a vocoder."""
    config, whole = config_of(corpus, *LEARNS), tmp_path / "whole"
    assert train(make_task(config), config, whole) == 0
    lines = record(whole)
    steps, [last] = ([line for line in lines if line["kind"] == kind] for kind in ("train", "evaluate"))
    assert [line["discriminator_loss"] > 0 for line in steps] == [False] * 3 + [True] * 3
    assert steps[-1]["mel_l1"] < steps[0]["mel_l1"]
    assert all(line["num_skipped"] == 0 for line in steps)
    assert {"mel_l1", "log_spectral_distance", "voicing_error", "num_non_finite"} <= set(last)
    assert len(last["spectrograms"]) == 2
    page = write_report(whole).read_text()
    assert "Held-out mel" in page
    assert "log-spectral distance" in page

    generator, params = load_vocoder(whole, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert generator == make_task(config).model_config.generator
    wave = Corpus(corpus).split("test").read(0).waveform.astype(np.float32) / 32768
    mel = np.asarray(mel_spectrogram(wave[None])[0])[0].T
    stage = make_wave_stage(generator, params)
    made = synthesise(stage, mel, jax.random.key(3))
    assert made.shape == (480 * len(mel),)
    stream = WaveStreams(stage).start(jax.random.key(3))
    hops = [stream.hop(mel[:7]), stream.hop(mel[7:], last=True)]
    np.testing.assert_allclose(np.concatenate(hops), made, atol=1e-4)

    warm = override(config, [f"init_from={whole}", "num_steps=1", "evaluate_every=1"])
    task = make_task(warm)
    _, shardings = abstract_state(task.init_state, make_mesh(MeshConfig(), jax.devices()[:1]))
    state = make_state(task.init_state, shardings, jax.random.key(0))
    kept = jax.tree.map(np.asarray, state.params[DISCRIMINATORS])
    state = task.warm_start(state)
    jax.tree.map(np.testing.assert_array_equal, state.params[GENERATOR], params)
    jax.tree.map(np.testing.assert_array_equal, state.params[DISCRIMINATORS], kept)
    with pytest.raises(UserError, match=r"is another vocoder \(model.generator.width: 32 → 16\)"):
        make_task(override(warm, ["model.generator.width=32"])).warm_start(state)
    # Units are no other vocoder: official weights, of log-mel from 0, start one that counts from elsewhere.
    counts = make_task(override(warm, ["model.generator.mel_origin=0.5", "model.generator.upsampling_unit=2.0"]))
    moved = counts.warm_start(state).params[GENERATOR]["generator"]
    old = params["generator"]
    want = 2 / generator.upsampling_unit * old["upsample_1"]["kernel"]
    np.testing.assert_array_equal(moved["upsample_1"]["kernel"], want)
    shift = (0.5 - generator.mel_origin) / 4 * np.sum(old["conv_in"]["kernel"], axis=(0, 1))
    np.testing.assert_allclose(moved["conv_in"]["bias"], old["conv_in"]["bias"] + shift, atol=1e-5)

    described = json.loads((whole / "run.json").read_text())
    described["facts"]["mel"]["mel_fmax_hz"] = 12000.0
    (whole / "run.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"mel_fmax_hz 12000 \(the vocoder's: 8000\)"):
        load_vocoder(whole, make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.mark.full
def test_both_networks_overfit_four_utterances(tmp_path):
    """Spectral steps bring the mel down by more than half, and the contest does not lose it again."""
    make_small_corpus(tmp_path / "four", 4, 4, rate_hz=24000)
    compute_f0(tmp_path / "four", method="dio", workers=1)
    sets = ("num_steps=240", "model.adversarial_from=160", "log_every=20", "evaluate_every=240", "save_every=240")
    config = config_of(tmp_path / "four", *sets, "data.batch_seconds=4", "optimizer.warmup_steps=10")
    assert train(make_task(config), config, tmp_path / "run") == 0
    lines = [line for line in record(tmp_path / "run") if line["kind"] == "train"]
    mel, f0 = ([line[name] for line in lines] for name in ("mel_l1", "f0_l1_hz"))
    assert min(mel[:8]) < mel[0] / 2
    assert mel[-1] < 1.2 * min(mel)
    assert f0[-1] < f0[0] / 2
    assert all(0 < line["discriminator_loss"] < 4 for line in lines[8:])


@pytest.mark.full
def test_a_window_that_is_not_finite_skips_both_networks(corpus):
    config = config_of(corpus, "model.adversarial_from=0")
    mesh, task = make_mesh(MeshConfig(), jax.devices()[:1]), make_task(config)
    abstract, shardings = abstract_state(task.init_state, mesh)
    state = make_state(task.init_state, shardings, jax.random.key(0))
    before = jax.tree.map(np.asarray, state.params)
    steps = compile_steps(task.make_step(), abstract, shardings, task.batch_specs(), mesh)
    [(_, size, local)] = task.batches(0, 1, mesh)
    local["f0"][3] = np.nan
    batch = global_batch(mesh, local, size)
    state, metrics = steps.for_batch(batch)(state, batch, jax.random.key(1))
    assert bool(metrics["skipped"])
    assert not bool(metrics["row_finite"][3])
    assert np.asarray(metrics["row_finite"]).sum() == size - 1
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state.params), before)


def test_facts_record_the_mel(corpus):
    facts = make_task(config_of(corpus)).facts()
    assert facts["mel"] == vars(FLOW_MEL)
    assert {"corpus_hash", "f0_hash", "plan_hash", "model"} <= set(facts)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("model.generator.mel_fmax_hz=12000.0",), "mel_fmax_hz 8000"),
        (("model.generator.num_mels=40",), "num_mels 80"),
        (("model.generator.rate_hz=48000",), "rate_hz 24000"),
        (("lora.rank=2",), "is for the language model"),
        (("model.generator.width=12",), "is halved 3 times"),
        (("model.target_f0_share=1.5",), "must lie in"),
        (("model.window_frames=0",), "must be positive"),
    ],
)
def test_what_does_not_fit_is_refused(corpus, sets, message):
    with pytest.raises(UserError, match=message):
        make_task(config_of(corpus, *sets))


def test_a_corpus_without_f0_or_of_another_rate_is_refused(tmp_path):
    plain = make_small_corpus(tmp_path / "plain", 4, 2, rate_hz=24000)
    with pytest.raises(UserError, match="run `cv2jax f0"):
        make_task(config_of(plain))
    slow = make_small_corpus(tmp_path / "slow", 4, 2, rate_hz=16000)
    with pytest.raises(
        UserError, match="has 16000 Hz, the vocoder needs 24000 Hz; run `cv2jax prepare` with --rate_hz"
    ):
        make_task(config_of(slow))


def test_a_run_of_another_stage_is_no_vocoder(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"config": {"task": "flow_matching"}, "facts": {"model": {}}}))
    with pytest.raises(UserError, match="is a run of flow_matching; give the --workdir of a hift_vocoder"):
        load_vocoder(tmp_path, make_mesh(MeshConfig()))
