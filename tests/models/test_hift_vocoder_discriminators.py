"""The spectral discriminators match the official numbers, the periodic ones their definition; padding, shapes, sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from cv2jax.config import MeshConfig, UserError, validate
from cv2jax.models.hift_vocoder.discriminator_config import DiscriminatorConfig
from cv2jax.models.hift_vocoder.discriminators import Discriminators, StridedConv, conv_over_bins, fold, magnitudes
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state, axis_rules, batch_sharding, replicated
from tests.models.golden_discriminators import GOLDENS, SMALL, SPECTRAL, abstract_params, random_params, spectral_params


def judge(config, params, waveform, **options):
    return jax.jit(Discriminators(config, **options).apply)({"params": params}, waveform)


def waves(batch=2, width=230, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-0.8, 0.8, (batch, width)).astype(np.float32))


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDENS / "mrd.npz"))


@pytest.mark.parametrize("dft", ["fft", "matmul"])
def test_the_official_spectral_scores_and_features(golden, dft):
    judged = judge(SPECTRAL, spectral_params(), jnp.asarray(golden["y"]), dft=dft)
    assert len(judged) == 3
    for i, judgement in enumerate(judged):
        np.testing.assert_allclose(judgement.scores, golden[f"out{i}"], rtol=1e-4, atol=1e-4)
        assert len(judgement.feature_maps) == 6
        for j, features in enumerate(judgement.feature_maps):
            batch, channels, frames, bins = golden[f"fmap{i}_{j}_shape"]
            assert features.shape == (batch, frames, bins, channels)
            np.testing.assert_allclose(features.mean(), golden[f"fmap{i}_{j}_mean"], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(features.std(), golden[f"fmap{i}_{j}_std"], rtol=1e-4, atol=1e-4)


def slow_period(params, waveform, period):
    """(scores, feature maps [B C L period]) by loops over outputs, as torch's Conv2d with (k, 1) kernels is defined."""
    x = np.asarray(waveform, np.float64)
    if short := -x.shape[1] % period:
        x = np.pad(x, ((0, 0), (0, short)), mode="reflect")
    x = x.reshape(len(x), 1, -1, period)
    maps = []
    names = [f"convs_{i}" for i in range(len(params) - 1)]
    for name in [*names, "out"]:
        kernel, bias = (np.asarray(params[name][part], np.float64) for part in ("kernel", "bias"))
        size = len(kernel)
        stride = 3 if name in names[:-1] else 1
        padded = np.pad(x, ((0, 0), (0, 0), (size // 2, size // 2), (0, 0)))
        length = (padded.shape[2] - size) // stride + 1
        y = np.zeros((len(x), kernel.shape[2], length, period)) + bias[None, :, None, None]
        for at in range(length):
            window = padded[:, :, at * stride : at * stride + size]
            y[:, :, at] += np.einsum("bikp,kio->bop", window, kernel)
        x = y if name == "out" else np.where(y > 0, y, 0.1 * y)
        maps.append(x)
    return x.reshape(len(x), -1), maps


def test_the_periodic_ones_follow_their_definition():
    params, waveform = random_params(SMALL), waves()
    for i, (period, judgement) in enumerate(zip(SMALL.periods, judge(SMALL, params, waveform)[:2], strict=True)):
        scores, maps = slow_period(params[f"period_{i}"], waveform, period)
        np.testing.assert_allclose(judgement.scores, scores, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(judgement.feature_maps, maps, strict=True):
            np.testing.assert_allclose(ours, theirs.transpose(0, 3, 2, 1), rtol=1e-4, atol=1e-5)
        assert np.abs(scores).max() > 0.1


@pytest.mark.parametrize(("width", "row"), [(9, [2, 5, 8]), (10, [2, 5, 8, 7]), (11, [2, 5, 8, 9])])
def test_the_end_is_reflected_up_to_a_multiple_of_the_period(width, row):
    folded = fold(jnp.arange(width, dtype=jnp.float32)[None], 3)
    np.testing.assert_array_equal(folded[0, 2], row)
    np.testing.assert_array_equal(folded[0, 0, :3], [0, 3, 6])


@pytest.mark.parametrize(("points", "hop", "window"), [(64, 16, 40), (32, 6, 32)])
def test_a_spectrum_is_that_of_the_whole_centred_frame(points, hop, window):
    waveform = np.asarray(waves(2, 150), np.float64)
    padded = np.pad(waveform, ((0, 0), (points // 2, points // 2)), mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    side = (points - window) // 2
    frames = [padded[:, at : at + points] * np.pad(hann, side) for at in range(0, 151, hop)]
    want = np.abs(np.fft.rfft(np.stack(frames, 1)))
    for dft in ("fft", "matmul"):
        got = magnitudes(jnp.asarray(waveform, jnp.float32), points, hop, window, dft)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bins", [16, 17, 18])
@pytest.mark.parametrize(("size", "stride"), [((3, 9), 2), ((3, 9), 1), ((1, 5), 3), ((3, 3), 3)])
def test_a_stride_in_the_channels_is_a_stride(bins, size, stride):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, 5, bins, 3), np.float32))
    kernel = jnp.asarray(rng.standard_normal((*size, 3, 4), np.float32))
    padding = [(n // 2, n // 2) for n in size]

    def plain(x, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, stride), padding, dimension_numbers=dimensions)

    ours, theirs = (jax.vjp(f, x, kernel) for f in (lambda x, k: conv_over_bins(x, k, stride), plain))
    assert ours[0].shape[2] == (bins - 1) // stride + 1
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    for got, want in zip(ours[1](theirs[0]), theirs[1](theirs[0]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def convolutions(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            yield equation.params
        for inner in jaxprs_in_params(equation.params):
            yield from convolutions(inner)


def test_every_convolution_and_gradient_has_the_layout_that_is_fast_inside_a_branch():
    total = lambda p, w: sum(jnp.sum(j.scores) for j in Discriminators(SMALL).apply({"params": p}, w))  # noqa: E731
    program = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(abstract_params(SMALL), waves())
    found = list(convolutions(program.jaxpr))
    assert len(found) == 2 * 6 * 3  # resolutions, layers; itself and two gradients
    for params in found:
        assert tuple(params["dimension_numbers"]) == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
        assert {*params["window_strides"], *params["lhs_dilation"], *params["rhs_dilation"]} == {1}


@pytest.mark.parametrize(("length", "stride"), [(16, 3), (17, 3), (18, 3), (16, 1), (2, 3)])
def test_a_layer_over_time_is_a_convolution(length, stride):
    rng = np.random.default_rng(3)
    layer, x = StridedConv((5, 2, 3), stride), jnp.asarray(rng.standard_normal((4, length, 2), np.float32))
    params = {name: jnp.asarray(rng.standard_normal(n, np.float32)) for name, n in (("kernel", (5, 2, 3)), ("bias", 3))}
    plain = jax.lax.conv_general_dilated(
        x, params["kernel"], (stride,), [(2, 2)], dimension_numbers=("NWC", "WIO", "NWC")
    )
    np.testing.assert_allclose(layer.apply({"params": params}, x), plain + params["bias"], rtol=1e-5, atol=1e-5)


def test_shapes_and_names():
    params = abstract_params(SMALL)
    assert sorted(params) == ["period_0", "period_1", "spectral_0", "spectral_1"]
    assert sorted(params["period_0"]) == ["convs_0", "convs_1", "convs_2", "out"]
    assert params["period_0"]["convs_1"]["kernel"].shape == (5, 4, 6)
    assert params["spectral_1"]["convs_3"]["kernel"].shape == (3, 9, 4, 4)
    judged = judge(SMALL, random_params(SMALL), waves())
    # 230 samples by 2: 115 → 39 → 13 → 13; 230 // 16 + 1 frames of 33 → 17 → 9 → 5 bins
    assert [m.shape for m in judged[0].feature_maps] == [(2, 2, 39, 4), (2, 2, 13, 6), (2, 2, 13, 8), (2, 2, 13, 1)]
    assert [m.shape[1:] for m in judged[2].feature_maps] == [
        (15, n, c) for n, c in zip((33, 17, 9, 5, 5, 5), (4, 4, 4, 4, 4, 1), strict=True)
    ]
    assert [j.scores.shape for j in judged] == [(2, 13 * 2), (2, 6 * 5), (2, 15 * 5), (2, 39 * 3)]


def test_the_official_size_has_the_official_number_of_parameters():
    # 41,386,672 elements are listed with a gain for each output of each kernel: those are ours no longer.
    params = abstract_params(DiscriminatorConfig())
    gains = sum(layer["bias"].size for judge in params.values() for layer in judge.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) + gains == 41_386_672


def test_silence_has_a_finite_gradient_and_rows_do_not_mix():
    params = random_params(SMALL)
    total = lambda w: sum(jnp.sum(j.scores[0]) for j in Discriminators(SMALL).apply({"params": params}, w))  # noqa: E731
    silent = jax.jit(jax.grad(total))(jnp.zeros((2, 230)))
    assert jnp.isfinite(silent).all()
    gradient = jax.jit(jax.grad(total))(waves())
    assert jnp.abs(gradient[0]).min() > 0
    np.testing.assert_array_equal(gradient[1], 0)


def test_bfloat16_convolutions_keep_fp32_spectra_and_scores():
    params, waveform = random_params(SMALL), waves()
    for narrow, wide in zip(
        judge(SMALL, params, waveform, dtype="bfloat16"), judge(SMALL, params, waveform), strict=True
    ):
        assert narrow.scores.dtype == jnp.float32
        assert narrow.feature_maps[0].dtype == jnp.bfloat16
        np.testing.assert_allclose(narrow.scores, wide.scores, atol=0.05 * float(jnp.abs(wide.scores).max()) + 0.02)


def test_a_split_batch_needs_no_exchange_and_gives_the_same_scores():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    params, waveform = random_params(SMALL), waves(8)
    model = Discriminators(SMALL, dft="matmul")
    jitted = jax.jit(
        model.apply, in_shardings=(replicated(mesh), batch_sharding(mesh)), out_shardings=batch_sharding(mesh)
    )
    with jax.set_mesh(mesh), axis_rules():
        compiled = jitted.lower({"params": params}, waveform).compile()
    text = compiled.as_text()
    assert not [name for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if name in text]
    split = compiled(*jax.device_put(({"params": params}, waveform), (replicated(mesh), batch_sharding(mesh))))
    for got, want in zip(split, judge(SMALL, params, waveform, dft="matmul"), strict=True):
        np.testing.assert_allclose(got.scores, want.scores, rtol=1e-5, atol=1e-5)


def test_parameters_are_split_as_their_axes_say():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    init = lambda key: Discriminators(SMALL).init(key, jnp.zeros((1, 230)))["params"]  # noqa: E731
    _, shardings = abstract_state(init, mesh)
    assert shardings["period_0"]["convs_0"]["kernel"].spec == jax.P(None, None, "fsdp")
    assert shardings["period_0"]["out"]["kernel"].spec == jax.P(None, "fsdp")
    assert shardings["spectral_0"]["convs_1"]["kernel"].spec == jax.P(None, None, None, "fsdp")
    assert shardings["spectral_0"]["out"]["kernel"].spec == jax.P(None, None, "fsdp")


def compared(params, waveform, remat=False):
    compare = functools.partial(Discriminators(SMALL, remat=remat).apply, method="compare")
    comparisons = compare({"params": params}, waveform, jnp.roll(waveform, 1, axis=1))
    return sum(jnp.square(1 - c.generated).mean() + jnp.square(c.recorded).mean() + c.feature_loss for c in comparisons)


slopes = jax.grad(compared, argnums=(0, 1))


def test_comparisons_are_both_judgements_and_the_distance_of_their_feature_maps():
    params, generated, recorded = random_params(SMALL), waves(2, 96), waves(2, 96, seed=1)
    comparisons = jax.jit(functools.partial(Discriminators(SMALL).apply, method="compare"))(
        {"params": params}, generated, recorded
    )
    made, real = (judge(SMALL, params, wave) for wave in (generated, recorded))
    assert len(comparisons) == len(made)
    for got, g, r in zip(comparisons, made, real, strict=True):
        np.testing.assert_allclose(got.generated, g.scores, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got.recorded, r.scores, rtol=1e-5, atol=1e-6)
        distances = [np.abs(a - b).mean() for a, b in zip(g.feature_maps, r.feature_maps, strict=True)]
        np.testing.assert_allclose(got.feature_loss, 2 * sum(distances), rtol=1e-5)
        assert min(distances) > 0


def test_rematerialised_gradients_are_the_same_and_keep_no_feature_map():
    given = (random_params(SMALL), waves(2, 96))
    got, want = (jax.jit(slopes, static_argnames="remat")(*given, remat=remat) for remat in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max()), got, want)

    def kept(remat):
        pull_back = jax.eval_shape(lambda *given: jax.vjp(functools.partial(compared, remat=remat), *given)[1], *given)
        return max(leaf.ndim for leaf in jax.tree.leaves(pull_back) if leaf.shape not in sizes)

    sizes = {leaf.shape for leaf in jax.tree.leaves(given)}
    assert kept(remat=False) == 4
    assert kept(remat=True) == 2  # of waves and scores


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=4), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_gradients_are_the_same_on_a_mesh(mesh):
    mesh, rows = make_mesh(mesh), waves(8, 96)
    init = lambda key: Discriminators(SMALL).init(key, rows)["params"]  # noqa: E731
    _, shardings = abstract_state(init, mesh)
    shardings = (shardings, batch_sharding(mesh))

    given = (random_params(SMALL), rows)
    with jax.set_mesh(mesh), axis_rules():
        got = jax.jit(slopes, out_shardings=shardings)(*jax.device_put(given, shardings))
    want = jax.jit(slopes)(*given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max()), got, want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"periods": (2, 0)}, r"discriminators\.periods=\(2, 0\): must be positive"),
        ({"periods": (), "fft_sizes": (), "hop_lengths": (), "window_lengths": ()}, "at least one discriminator"),
        ({"period_channels": ()}, "at least one layer"),
        ({"hop_lengths": (120,)}, "must be as many"),
        ({"window_lengths": (600, 4096, 240)}, "4096 exceeds fft size 2048"),
        ({"window_lengths": (600, 1199, 240)}, "must be even"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        validate(DiscriminatorConfig(**changes))
    validate(SMALL)
