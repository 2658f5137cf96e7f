"""`cv2jax bench flow-…`: small runs give every figure, sides that differ are not compared, states are what streams leave."""

import dataclasses
import importlib.util
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.jobs import bench_flow
from cv2jax.jobs.bench import FLOW_BENCHES, bench
from cv2jax.jobs.bench_options import BenchOptions
from cv2jax.models.flow_matching.model import FlowMatching
from cv2jax.models.flow_matching.step import init_state
from cv2jax.nn.cache import append
from cv2jax.nn.masks import ChunkMask, MaskSpec
from tests.jobs.test_bench import check
from tests.models.golden_flow import random_params, small_config

ALONE = BenchOptions(repeats=2, against="", seconds=1.5)


@pytest.fixture(autouse=True)
def work(monkeypatch: pytest.MonkeyPatch) -> bench_flow.Workload:
    """The benchmarks of this process measure a small model."""
    config = small_config()
    sizes = {"num_rows": 2, "row_tokens": 10, "histories": (2, 3)}
    small = bench_flow.Workload(name="small", model=FlowMatching(config), params=random_params(config), **sizes)
    monkeypatch.setattr(bench_flow, "make_workload", lambda size: small)
    return small


@pytest.mark.full
def test_a_part_runs_in_a_process_of_its_own() -> None:
    report = bench("flow-train", BenchOptions(size="tiny", repeats=1, seconds=2.0))
    check(report, {"flow-train"}, 1)
    assert "tiny (3.6 M parameters), float32, 16 x 6 frames" in report["measurements"][0]["case"]
    assert tuple(bench_flow.PARTS) == FLOW_BENCHES


@pytest.mark.full
def test_training_is_measured() -> None:
    (case, unit, speeds), (of_what, _, share), (_, _, seconds), (_, _, memory) = bench_flow.measure_flow_train(ALONE)
    assert unit == "frames/s"
    assert "2 x 38 frames" in case
    np.testing.assert_allclose(np.multiply(speeds, seconds), 76)
    assert memory[0] > 0.01
    assert "Tflop/s in a product" in of_what
    np.testing.assert_allclose(np.multiply(share, seconds), share[0] * seconds[0])
    assert min(share) > 0
    assert "2 x 20 frames" in bench_flow.measure_flow_train(BenchOptions(repeats=1))[0][0]


@pytest.mark.slow
def test_a_solve_is_measured_alone() -> None:
    figures = bench_flow.measure_flow_offline(ALONE)
    assert [unit for _, unit, _ in figures] == ["ms", "ms", "s", "x realtime"]
    assert ["non-causal" in case for case, _, _ in figures] == [True, False, True, True]
    np.testing.assert_allclose(np.multiply(figures[2][2], figures[3][2]), 1.5)


@pytest.mark.slow
def test_layers_are_unrolled_where_they_are_not_yet(work: bench_flow.Workload) -> None:
    unrolled = work.unrolled()
    assert {"mid_0", "mid_1", "down"} <= set(unrolled.params["estimator"])
    again = unrolled.unrolled()  # as the tiny preset is
    assert jax.tree.structure(again.params) == jax.tree.structure(unrolled.params)
    request = bench_flow.make_request(work.model.config, 6)
    mels = [each.solver(3)(each.params, *request.prefix(6)) for each in (work, unrolled)]
    np.testing.assert_allclose(*mels, atol=1e-5)


@pytest.mark.full
def test_a_gpu_solves_batches_in_two_types(work: bench_flow.Workload) -> None:
    work = dataclasses.replace(work, batch_sizes=(1, 3), dtypes=("float32", "bfloat16"))
    figures = bench_flow._whole_solve(work, ALONE)
    assert [unit for _, unit, _ in figures] == ["s", "x realtime", "s", "x realtime", "log-mel"] * 2
    one, three = figures[4], figures[9]
    assert "bfloat16, solve of 1 x 1.5 s" in one[0]
    assert "solve of 3 x 1.5 s" in three[0]
    assert 1e-4 < one[2][0] < 0.3
    np.testing.assert_allclose(np.multiply(figures[5][2], figures[6][2]), 4.5)


class Slower:
    """Stands in for PyTorch: computes ours under the mask it is given, and takes its time."""

    def __init__(self, work: bench_flow.Workload) -> None:
        self.work, self.error = work, 0.0

    def __call__(self, x, t, mu, speaker, mel, sees):
        time.sleep(0.1)
        mask = MaskSpec() if sees is None else jnp.asarray(sees)[None, None]
        inputs = {"params": self.work.params}, *jax.device_put((x, t, mu, speaker, mel)), mask
        return np.asarray(self.work.model.apply(*inputs, method="velocity")[0]) + np.float32(self.error)


@pytest.mark.full
def test_sides_race_and_must_agree(work: bench_flow.Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Slower(work)
    monkeypatch.setattr(bench_flow, "_pytorch", lambda work: other)
    options = BenchOptions(repeats=2, seconds=1.0)
    figures = {case.rpartition("frames, ")[2]: values for case, _, values in bench_flow.measure_flow_offline(options)}
    for mask in ("non-causal", "chunks of 25 tokens"):
        ours, theirs, ratio = (figures[f"{mask}: {name}"] for name in ("ours", "PyTorch", "ours against PyTorch"))
        assert min(theirs) > 99
        np.testing.assert_allclose(ratio, np.divide(theirs, ours))
    other.error = 3e-4
    with pytest.raises(RuntimeError, match=r"velocities of the two sides differ by up to 0\.0003"):
        bench_flow.measure_flow_offline(options)


@pytest.mark.full
def test_hops_are_measured_by_history_and_against_solving_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = bench_flow.measure_flow_stream(ALONE)
    assert [unit for _, unit, _ in figures] == ["ms", "ms", "x"] * 5
    assert all(min(values) > 0 and len(values) == 2 for _, _, values in figures)
    for (_, _, short), (_, _, long), (_, _, growth) in (figures[:3], figures[3:6]):
        np.testing.assert_allclose(growth, np.divide(long, short))
    for (_, _, ours), (_, _, anew), (_, _, ratio) in (figures[6:9], figures[9:12], figures[12:]):
        np.testing.assert_allclose(ratio, np.divide(anew, ours))
    names = (
        "75 + 50 tokens, after 60 s",
        "all, after 3 s",
        "first hop, 25 + 3 tokens: ours",
        "1.5 s in 2 hops of 25, 50, 100 tokens: ours",
    )
    for (case, _, _), name in zip((figures[1], figures[4], figures[6], figures[9]), names, strict=True):
        assert case.endswith(name)
    monkeypatch.setattr(bench_flow, "_TOLERANCE", 0.0)  # both sides were compared at the tolerance
    with pytest.raises(RuntimeError, match="mels of the two sides differ"):
        bench_flow.measure_flow_stream(ALONE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_tokens", "num_slots", "num_pinned"),
    [
        pytest.param(150, 150, 0, marks=pytest.mark.full),
        pytest.param(175, 80, 0, marks=pytest.mark.full),
        (200, 125, 75),
    ],
)
def test_a_filled_state_has_the_places_of_a_stream(num_tokens: int, num_slots: int, num_pinned: int) -> None:
    state = bench_flow.filled_state(small_config(), num_tokens, num_slots, num_pinned)
    assert int(state.num_tokens[0]) == num_tokens
    empty = init_state(small_config(), 1, num_slots)
    pairs = [(getattr(s.encoder, name), rate) for s in (empty, state) for name, rate in (("tokens", 1), ("frames", 2))]
    for (cache, rate), (filled, _) in zip([*pairs[:2], (empty.cache, 2)], [*pairs[2:], (state.cache, 2)], strict=True):
        layers, rows, heads, _, channels = cache.keys.shape
        for start, end in itertools.pairwise(range(0, num_tokens + 25, 25)):
            new = jnp.zeros((layers, rows, heads, (end - start) * rate, channels))
            places = jnp.tile(jnp.arange(rate * start, rate * end), (rows, 1))
            cache = append(cache, (new, new), positions=places, num_pinned=jnp.full(rows, rate * num_pinned))
        np.testing.assert_array_equal(filled.positions, cache.positions)
        assert filled.keys.shape == cache.keys.shape
        assert min(float(jnp.std(filled.keys)), float(jnp.std(filled.values))) > 0.5


def test_a_request_comes_in_the_hops_of_upstream() -> None:
    request = bench_flow.make_request(small_config(), 575, 78)
    assert request.ends() == [75, 100, 150, 250, 350, 450, 550, 575]
    assert bench_flow.make_request(small_config(), 90, 75).ends() == [50, 75, 90]
    assert np.all(request.prompt_mel[:, 156:] == 0)
    assert np.all(request.prompt_mel[:, :156] != 0)
    hop, (batch, noise) = request.hop(550, 573), request.prefix(573)
    np.testing.assert_array_equal(hop.speech_tokens, np.pad(request.speech_tokens[:, 550:], [(0, 0), (0, 1)]))
    assert int(hop.num_lookahead[0]) == int(batch["num_lookahead"][0]) == 2
    np.testing.assert_array_equal(batch["speech_tokens"], request.speech_tokens)
    np.testing.assert_array_equal(noise[:, 1100:1146], hop.noise)


@pytest.mark.official
@pytest.mark.parametrize("scan", [True, False])
def test_pytorch_computes_the_same(scan: bool) -> None:
    pytest.importorskip("torch")
    from cv2jax.jobs.bench_flow_torch import OfficialEstimator

    config = small_config(scan_layers=scan)
    config = dataclasses.replace(config, estimator=dataclasses.replace(config.estimator, num_blocks=2, mlp_ratio=4))
    params, rng, places = random_params(config, 3), np.random.default_rng(5), np.arange(21)
    mels, speaker = (rng.standard_normal(shape, np.float32) for shape in ((3, 2, 21, 8), (2, 8)))
    inputs = (mels[0], np.array([0.2, 0.9], np.float32), mels[1], speaker, mels[2])
    official = OfficialEstimator(config.estimator, jax.device_get(params["estimator"]), 1)
    for sees in (None, ChunkMask(chunk=6, left=5).sees(places[:, None], places[None])):
        mask = MaskSpec() if sees is None else jnp.asarray(sees)[None, None]
        ours = FlowMatching(config).apply({"params": params}, *map(jnp.asarray, inputs), mask, method="velocity")[0]
        np.testing.assert_allclose(official(*inputs, sees), ours, atol=1e-5)


def test_without_pytorch_a_comparison_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"flow-offline.*pip install 'cv2jax\[official\]'.*--against ''"):
        bench("flow-offline", BenchOptions(size="tiny"))
