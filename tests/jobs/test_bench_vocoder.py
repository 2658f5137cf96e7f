"""`cv2jax bench vocoder`: small runs give every figure, hops say what one piece says, early samples are near."""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import numpy as np
import pytest

from cv2jax.audio.io import write_wav
from cv2jax.config import UserError
from cv2jax.jobs import bench_vocoder
from cv2jax.jobs.bench import bench
from cv2jax.jobs.bench_options import BenchOptions
from cv2jax.jobs.bench_vocoder import Workload, make_mel, make_workload, measure_vocoder
from cv2jax.models.hift_vocoder.config import HiftVocoderConfig
from cv2jax.models.hift_vocoder.model import hold_back, init_params

SMALL = HiftVocoderConfig(width=16, f0_width=8, block_kernels=(3,), source_kernels=(3, 3, 3), dilations=(1,))
OPTIONS = BenchOptions(repeats=2, seconds=3.0)


@pytest.fixture(scope="module")
def work() -> Workload:
    params = jax.jit(lambda key: nn.unbox(init_params(SMALL, key)))(jax.random.key(0))
    return Workload(name="small", config=SMALL, params=params, mel=make_mel(SMALL, OPTIONS), batch_sizes=(2,))


@pytest.fixture(scope="module")
def figures(work: Workload) -> list[bench_vocoder.Figure]:
    """Of a small vocoder, everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_vocoder, "make_workload", lambda options: work)
        return measure_vocoder(OPTIONS)


def of(figures: list[bench_vocoder.Figure], *words: str) -> list[list[float]]:
    """The values of the figures in whose case or unit all words are."""
    return [values for case, unit, values in figures if all(word in f"{case} [{unit}]" for word in words)]


@pytest.mark.slow
def test_whole_utterances_and_hops_are_measured_by_batch(figures: list[bench_vocoder.Figure]) -> None:
    hop, rows = "2 x hop of 50 frames", 2
    (seconds,), (factor,) = (of(figures, "2 x 3 s in one piece", f"[{unit}]") for unit in ("s", "real-time factor"))
    np.testing.assert_allclose(np.multiply(factor, 3 * rows), seconds)
    (near,), (far,), (growth,) = (of(figures, hop, end) for end in ("after 5 s [ms]", "after 60 s [ms]", "[x]"))
    np.testing.assert_allclose(growth, np.divide(far, near))
    (factor,) = of(figures, hop, "[real-time factor]")
    np.testing.assert_allclose(np.multiply(factor, 1e3 * rows), near)
    (flush,) = of(figures, "2 x flush")
    assert min(flush) > 0
    (first,) = of(figures, "first hop of 50 frames")
    assert len(first) == 2


@pytest.mark.slow
def test_an_utterance_in_hops_is_compared(figures: list[bench_vocoder.Figure]) -> None:
    case = "3 s in 3 hops and a flush"
    (ours,), (whole,), (anew,) = (of(figures, case, f"{name} [ms]") for name in (": ours", ": in one piece", " anew"))
    ratios = of(figures, case, "ours against", "[x]")
    np.testing.assert_allclose(ratios, [np.divide(whole, ours), np.divide(anew, ours)])
    ((decibels,),) = of(figures, case, "off one piece", "[dB]")
    assert decibels > 80


def test_hops_that_say_something_else_are_not_compared(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_vocoder, "_TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="waveforms of the two sides differ"):
        bench_vocoder._utterance(work, 1)


@pytest.mark.slow
def test_sizes_are_those_of_the_model(figures: list[bench_vocoder.Figure]) -> None:
    ((size,),) = of(figures, "state of a stream", "[kB]")
    assert 1 < size < 1000
    for look_ahead in (5, 0):
        late = hold_back(dataclasses.replace(SMALL, f0_look_ahead=look_ahead))
        ((samples,), (milliseconds,)) = of(figures, f"hold-back with {look_ahead} of 5 layers")
        assert samples == late
        assert milliseconds == pytest.approx(late / 24)


@pytest.mark.slow
def test_a_smaller_hold_back_is_measured_where_it_is_one(figures: list[bench_vocoder.Figure]) -> None:
    own = hold_back(SMALL)
    smaller = [size for size in bench_vocoder._HOLD_BACKS if size < own]
    assert smaller
    for size in smaller:
        ((decibels,), (largest,)) = of(figures, f"early samples at a hold-back of {size} (exact: {own})")
        assert decibels < 150
        assert 0 < largest < 100
    assert len(of(figures, "early samples")) == 2 * len(smaller)
    ((voiced,),) = of(figures, "taken for voiced")
    assert 0 <= voiced <= 100


def test_differences_are_decibels_and_shares_of_full_scale() -> None:
    exact = np.array([0.5, -0.5], np.float32)
    (_, unit, (decibels,)), (_, _, (largest,)) = bench_vocoder._differences("", exact + np.float32(0.005), exact)
    assert unit == "dB"
    assert decibels == pytest.approx(40, abs=0.01)
    assert largest == pytest.approx(0.5, abs=0.01)
    assert bench_vocoder._differences("", exact, exact)[0][2] == [200.0]


def test_the_mel_of_a_recording_is_cut_to_seconds(tmp_path: pathlib.Path) -> None:
    for seconds in (1.5, 3.4):
        noise = np.random.default_rng(0).normal(0, 0.1, int(24000 * seconds)).astype(np.float32)
        write_wav(tmp_path / f"{seconds}.wav", noise, 24000)
    assert make_mel(SMALL, BenchOptions(audio=str(tmp_path / "3.4.wav"))).shape == (150, 80)
    assert make_mel(SMALL, BenchOptions(audio=str(tmp_path / "3.4.wav"), seconds=2.0)).shape == (100, 80)
    with pytest.raises(UserError, match=r"1\.5\.wav: lasts 1\.50 s; give 2 s or more"):
        make_mel(SMALL, BenchOptions(audio=str(tmp_path / "1.5.wav")))


@pytest.mark.slow
def test_a_run_or_random_parameters(work: Workload, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no run"):
        make_workload(BenchOptions(run=str(tmp_path)))
    monkeypatch.setattr(bench_vocoder, "load_vocoder", lambda run, mesh: (SMALL, work.params))
    trained = make_workload(BenchOptions(run=str(tmp_path), batch=3))
    assert trained.describe().startswith(f"run {tmp_path.name} (")
    assert trained.batch_sizes == (3,)
    assert "tiny, random parameters" in make_workload(BenchOptions(seconds=2.0)).describe()
    with pytest.raises(UserError, match="leave one of them out"):
        bench("vocoder", BenchOptions(run=str(tmp_path), size="tiny"))


@pytest.mark.full
def test_it_runs_in_a_process_of_its_own() -> None:
    report = bench("vocoder", BenchOptions(size="tiny", repeats=1, seconds=2.0))
    assert {m["bench"] for m in report["measurements"]} == {"vocoder"}
    assert all(np.isfinite(m["values"]).all() for m in report["measurements"])


def test_a_mistake_in_the_process_is_said(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="bench vocoder failed"):
        bench("vocoder", BenchOptions(run=str(tmp_path)))
