"""Low-rank adaptation: exact at the start, only the factors move, sharded like their kernels, and a small side file."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import LoraConfig, MeshConfig, OptimizerConfig, UserError, override, validate
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state, axis_rules
from cv2jax.train.lora import (
    LORA,
    add_lora,
    effective_params,
    hash_frozen,
    init_lora,
    load_lora,
    merge_lora,
    save_lora,
    trained_by,
)
from cv2jax.train.optimizer import make_optimizer
from cv2jax.train.state import evaluation_params, init_train_state, make_state
from cv2jax.train.step import make_train_step
from tests.train.toy import toy_config

LAYERS, WIDTH, HEADS, HEAD_DIM = 3, 8, 2, 4
CONFIG = LoraConfig(rank=2, alpha=6.0, targets=("query", "out", "head_kernel"), also_trained=("head_bias",))


def make_params(key):
    """A scanned block with kernels of three axes, a projection alone, a head; all boxed."""

    def leaf(name, axes, *shape):
        draw = nn.with_logical_partitioning(nn.initializers.normal(0.5), axes)
        return draw(jax.random.fold_in(key, len(name) + sum(map(ord, name))), shape)

    head = ("embed", "heads", "head_dim")
    block = {
        "query": {
            "kernel": leaf("query", ("layers", *head), LAYERS, WIDTH, HEADS, HEAD_DIM),
            "bias": leaf("bias", ("layers", *head[1:]), LAYERS, HEADS, HEAD_DIM),
        },
        "out": {"kernel": leaf("out", ("layers", "heads", "head_dim", "embed"), LAYERS, HEADS, HEAD_DIM, WIDTH)},
        "norm": {"scale": leaf("scale", ("layers", "norm"), LAYERS, WIDTH)},
    }
    return {
        "blocks": block,
        "query": {"kernel": leaf("alone", ("embed", "mlp"), WIDTH, 5)},
        "head_kernel": leaf("head", ("embed", "vocab"), WIDTH, 6),
        "head_bias": leaf("hb", ("vocab",), 6),
    }


def plain(config=CONFIG, seed=0):
    """Unboxed parameters with factors, b drawn too so that they act."""
    params = nn.unbox(add_lora(make_params(jax.random.key(seed)), config, jax.random.key(seed + 1)))
    drawn = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.1 * (path[-1].key == "b") * np.cos(np.arange(x.size)).reshape(x.shape), params[LORA]
    )
    return params | {LORA: drawn}


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), a, b))


def test_at_the_start_the_merged_parameters_are_the_base_exactly():
    base = nn.unbox(make_params(jax.random.key(0)))
    lora = nn.unbox(init_lora(make_params(jax.random.key(0)), CONFIG, jax.random.key(5)))
    assert same(merge_lora(base, lora, CONFIG), base)
    assert float(jnp.std(lora["blocks"]["query"]["kernel"]["a"])) == pytest.approx(WIDTH**-0.5, rel=0.4)
    assert float(jnp.std(lora["head_kernel"]["a"])) > 0
    off = LoraConfig()
    assert add_lora(base, off, jax.random.key(5)) is base
    assert effective_params(base, off) is base
    assert trained_by(off) is None


def test_a_merged_kernel_is_base_plus_the_scaled_product():
    params = plain()
    merged, lora = effective_params(params, CONFIG), params[LORA]
    assert set(merged) == set(params) - {LORA}
    for layer in range(LAYERS):
        for name, inputs in (("query", WIDTH), ("out", HEADS * HEAD_DIM)):
            kernel = np.asarray(params["blocks"][name]["kernel"][layer])
            a, b = (np.asarray(lora["blocks"][name]["kernel"][f][layer]) for f in "ab")
            assert a.shape == (*kernel.shape[: a.ndim - 1], 2)
            assert a.size // 2 == inputs
            want = kernel.reshape(inputs, -1) + 3.0 * a.reshape(inputs, 2) @ b.reshape(2, -1)
            got = merged["blocks"][name]["kernel"][layer].reshape(inputs, -1)
            np.testing.assert_allclose(got, want, atol=1e-6)
            assert float(jnp.abs(got - kernel.reshape(inputs, -1)).max()) > 0.05
    assert same(merged["blocks"]["norm"], params["blocks"]["norm"])
    assert merged["blocks"]["query"]["bias"] is params["blocks"]["query"]["bias"]


def test_names_are_globs_of_a_paths_end_and_one_target_leaves_anothers_draw_alone():
    def made(*targets):
        lora = init_lora(
            make_params(jax.random.key(0)), dataclasses.replace(CONFIG, targets=targets), jax.random.key(1)
        )
        return nn.unbox(lora)

    assert set(made("query")) == {"blocks", "query"}
    assert set(made("blocks/*")) == {"blocks"}
    assert set(made("blocks/*")["blocks"]) == {"query", "out"}
    assert set(made("head_kernel")) == {"head_kernel"}
    assert same(made("query")["query"], made("*")["query"])
    with pytest.raises(
        UserError, match=r"'quary' fits no kernel; lora.targets: 'norm/scale' fits .* blocks/out/kernel"
    ):
        made("quary", "out", "norm/scale")
    with pytest.raises(UserError, match=r"lora.also_trained: 'tail' fits no parameter"):
        init_lora(
            make_params(jax.random.key(0)), dataclasses.replace(CONFIG, also_trained=("tail",)), jax.random.key(1)
        )


def test_a_kernel_with_unclear_sides_needs_a_rule():
    box = nn.with_logical_partitioning(nn.initializers.normal(), ("conv", "embed", "mlp"))
    params = {"conv": {"kernel": box(jax.random.key(0), (3, 4, 5))}}
    config = LoraConfig(rank=2, targets=("conv",))
    with pytest.raises(ValueError, match="conv/kernel: which of its axes"):
        init_lora(params, config, jax.random.key(0))
    lora = nn.unbox(init_lora(params, config, jax.random.key(0), lambda path, axes: 2))
    assert jax.tree.map(jnp.shape, lora["conv"]["kernel"]) == {"a": (3, 4, 2), "b": (2, 5)}
    assert effective_params(nn.unbox(params) | {LORA: lora}, config)["conv"]["kernel"].shape == (3, 4, 5)


def forward(params, x):
    h = x @ params["query"]["kernel"] @ jnp.ones((5, WIDTH)) / 5
    for layer in range(LAYERS):
        block = jax.tree.map(lambda a, i=layer: a[i], params["blocks"])
        q = jnp.einsum("bd,dhc->bhc", h * block["norm"]["scale"], block["query"]["kernel"]) + block["query"]["bias"]
        h = h + jnp.einsum("bhc,hcd->bd", jnp.tanh(q), block["out"]["kernel"])
    return h @ params["head_kernel"] + params["head_bias"]


def make_run(config, optimizer_config):
    optimizer = make_optimizer(optimizer_config, 100)

    def init(key):
        keys = jax.random.split(key)
        params = add_lora(make_params(keys[0]), config, keys[1])
        return init_train_state(params, {}, optimizer, trained_by(config))

    def loss(params, model_state, batch, key):
        rows = jnp.square(forward(effective_params(params, config), batch["x"]) - 1).mean(-1)
        return rows.mean(), ({}, model_state)

    return init, make_train_step(loss, optimizer, trained_by(config))


def batch(seed=0):
    return {"x": jnp.asarray(np.random.default_rng(seed).normal(size=(8, WIDTH)), jnp.float32)}


OPTIMIZER = OptimizerConfig(learning_rate=0.05, warmup_steps=1, weight_decay=0.1, ema_decay=0.5)


def run(mesh_config, num_steps=3):
    init, step = make_run(CONFIG, OPTIMIZER)
    mesh = make_mesh(mesh_config)
    _, shardings = abstract_state(init, mesh)
    start = make_state(init, shardings, jax.random.key(3))
    state, values = start, []
    with jax.set_mesh(mesh), axis_rules():
        compiled = jax.jit(step, out_shardings=(shardings, None))
        for i in range(num_steps):
            state, metrics = compiled(state, batch(i), jax.random.key(0))
            values.append({name: float(metrics[name]) for name in ("loss", "grad_norm")})
    return start, state, values


def test_steps_change_only_factors_and_what_is_also_trained_on_any_mesh():
    start, state, values = run(MeshConfig(data=2, fsdp=2, tensor=2))
    for name in ("blocks", "query", "head_kernel"):
        assert same(state.params[name], start.params[name]), name
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params[LORA], start.params[LORA])
    assert min(jax.tree.leaves(moved)) > 0
    assert not same(state.params["head_bias"], start.params["head_bias"])
    assert values[-1]["loss"] < values[0]["loss"]
    # Moments and averages exist for what is trained and nothing else.
    trained = {LORA: state.params[LORA], "head_bias": state.params["head_bias"]}
    for copies in (state.opt_state[1][0].mu, state.opt_state[1][0].nu, state.opt_state[2].ema_params):
        assert jax.tree.map(jnp.shape, copies) == jax.tree.map(jnp.shape, trained)
    averaged = evaluation_params(state)
    assert averaged["query"]["kernel"] is state.params["query"]["kernel"]
    assert not same(averaged[LORA], state.params[LORA])
    # Factors, moments and averages lie as their kernels do, and another mesh computes the same.
    factors = state.params[LORA]["blocks"]["query"]["kernel"]
    assert (factors["a"].sharding.spec, factors["b"].sharding.spec) == (
        jax.P(None, "fsdp"),
        jax.P(None, None, "tensor"),
    )
    assert state.opt_state[2].ema_params[LORA]["blocks"]["query"]["kernel"]["b"].sharding == factors["b"].sharding
    alone_start, alone, alone_values = run(MeshConfig())
    assert same(jax.device_get(alone_start.params), jax.device_get(start.params))
    assert alone_values == [pytest.approx(value, rel=1e-5) for value in values]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone.params, state.params)


def test_clipping_and_decay_see_only_what_is_trained():
    """Of two frozen bases of the same function, one with a huge gradient of its own: the steps are the same."""
    config = LoraConfig(rank=1, targets=("small",))
    kernel = nn.with_logical_partitioning(nn.initializers.ones, ("embed", "mlp"))(jax.random.key(0), (2, 2))

    def stepped(weight):
        optimizer = make_optimizer(OptimizerConfig(clip_norm=0.1, weight_decay=0.5, warmup_steps=1), 10)
        params = add_lora({"small": {"kernel": kernel}, "large": {"kernel": kernel}}, config, jax.random.key(0))
        state = nn.unbox(init_train_state(params, {}, optimizer, trained_by(config)))

        def loss(params, model_state, batch, key):
            effective = effective_params(params, config)
            return effective["small"]["kernel"].sum() + weight * effective["large"]["kernel"].sum(), ({}, model_state)

        step = jax.jit(make_train_step(loss, optimizer, trained_by(config)))
        new, metrics = step(state, batch(), jax.random.key(0))
        return state, new, float(metrics["grad_norm"])

    state, new, norm = stepped(1e3)
    _, want, want_norm = stepped(0.0)
    a = state.params[LORA]["small"]["kernel"]["a"]
    # d(sum of W + 16 a b) / db = 16 Σ a in each of the two outputs; that to a is 0, because b is.
    assert norm == want_norm == pytest.approx(16 * 2**0.5 * abs(float(a.sum())), rel=1e-5)
    assert same(new.params, want.params)
    assert same(new.params["small"], state.params["small"])
    # Decoupled decay alone moves a, by rate · 0.5 of itself.
    np.testing.assert_allclose(new.params[LORA]["small"]["kernel"]["a"], a * (1 - 1e-3 * 0.5), rtol=1e-5)


def test_a_side_file_gives_back_the_trained_parameters(tmp_path):
    params, path = plain(), tmp_path / "new" / "voice.safetensors"
    base = nn.unbox(make_params(jax.random.key(0)))
    params = params | {"head_bias": base["head_bias"] + 1}
    save_lora(path, params, CONFIG)
    assert [p.name for p in path.parent.iterdir()] == ["voice.safetensors"]
    for target, config in ((base, None), (plain(seed=0), CONFIG)):
        got, saved = load_lora(path, target, config)
        assert saved == CONFIG
        assert same(got, params)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    boxed = lambda key: add_lora(make_params(jax.random.key(0)), CONFIG, key)  # noqa: E731
    placed = jax.device_put(nn.unbox(boxed(jax.random.key(9))), abstract_state(boxed, mesh)[1])
    with jax.set_mesh(mesh):
        assert hash_frozen(placed, CONFIG) == hash_frozen(base, CONFIG)
        got, _ = load_lora(path, placed, CONFIG)
    assert same(jax.device_get(got), jax.device_get(params))
    assert got[LORA]["head_kernel"]["b"].sharding == placed[LORA]["head_kernel"]["b"].sharding
    save_lora(tmp_path / "again.safetensors", got, CONFIG)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_side_file_that_does_not_fit_is_told_with_all_that_differs(tmp_path):
    path = tmp_path / "voice.safetensors"
    save_lora(path, plain(), CONFIG)
    base = nn.unbox(make_params(jax.random.key(0)))
    other = base | {"query": {"kernel": base["query"]["kernel"] + 1e-6}}
    with pytest.raises(UserError, match=r"voice.safetensors does not fit: base: \w{8} in the file, \w{8} here; give"):
        load_lora(path, other)
    with pytest.raises(UserError, match=r"lora.alpha: 6.0 → 8.0; lora.rank: 2 → 4; give the base"):
        load_lora(path, base, dataclasses.replace(CONFIG, alpha=8.0, rank=4))
    smaller = {name: value for name, value in base.items() if name != "query"}
    smaller |= {"head_kernel": jnp.ones((WIDTH, 9)), "head_bias": jnp.ones((9,))}
    smaller |= {"head2": {"query": {"kernel": jnp.ones((2, 2))}}}
    with pytest.raises(UserError) as got:
        load_lora(path, smaller)
    assert "\n" not in str(got.value)
    for part in (
        "base: ",
        "head_bias: (6,) in the file, (9,) here",
        "head_kernel: factors (8, 2) and (2, 6) in the file, kernel (8, 9) here",
        "lora/head2/query/kernel/a: not in the file",
        "lora/query/kernel/b: only in the file",
    ):
        assert part in str(got.value)


def test_a_file_that_is_no_side_file_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="does not exist; give a file that `cv2jax export --to lora` wrote"):
        load_lora(path, {})
    path.write_bytes(b"\x00" * 64)
    with pytest.raises(UserError, match=r"x.safetensors cannot be read \(.+\); give"):
        load_lora(path, {})
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(3)}, path)
    with pytest.raises(UserError, match="holds no factors of this version"):
        load_lora(path, {})


def test_the_config_is_part_of_a_run_and_checked():
    config = override(toy_config(), ["lora.rank=4", "lora.targets=('query','up')", "lora.also_trained=['head_*']"])
    validate(config)
    assert (config.lora.targets, config.lora.also_trained) == (("query", "up"), ("head_*",))
    for change, message in (("rank=-1", "0 .off. or more"), ("alpha=0", "must be positive")):
        with pytest.raises(UserError, match=message):
            validate(override(config, [f"lora.{change}"]))
    with pytest.raises(UserError, match=r"lora.targets=\(\): name the kernels"):
        validate(override(config, ["lora.targets=()"]))
