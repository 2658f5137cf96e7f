"""The batch hash, what a step logs, the moving average of the parameters, and what is frozen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import MeshConfig, OptimizerConfig, UserError, validate
from cv2jax.parallel.distributed import global_batch
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state, axis_rules
from cv2jax.train.checkpoint import Checkpoints
from cv2jax.train.hashes import batch_hash
from cv2jax.train.optimizer import make_optimizer
from cv2jax.train.state import TrainState, combine, evaluation_params, init_train_state, make_state, partition
from cv2jax.train.step import batch_key, make_train_step
from tests.train.toy import WIDTH, ToyTask, toy_config


def make(seed=0):
    random = np.random.default_rng(seed)
    return {
        "waveform": random.integers(-(2**15), 2**15, (8, 40)).astype(np.int16),
        "row_mask": random.random(8) > 0.5,
        "rate": random.normal(size=(8, 2)).astype(np.float32),
    }


def value(batch):
    return int(jax.jit(batch_hash)({k: jnp.asarray(v) for k, v in batch.items()}))


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=4), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_the_hash_is_the_same_on_every_mesh(mesh):
    made = make_mesh(mesh)
    assert int(jax.jit(batch_hash)(global_batch(made, make(), 8))) == value(make())


def test_the_hash_sees_a_changed_value_a_swapped_row_and_another_name():
    batch = make()
    base = value(batch)
    for name, change in {
        "waveform": lambda x: np.where(np.arange(40) == 7, x + 1, x).astype(np.int16),
        "row_mask": lambda x: ~x,
        "rate": lambda x: x * np.float32(1.0000001),
    }.items():
        assert value(batch | {name: change(batch[name])}) != base, name
    assert value({k: v[::-1] for k, v in batch.items()}) != base
    assert value(batch | {"waveform": np.roll(batch["waveform"], 1, axis=1)}) != base


def test_the_key_names_the_shape():
    assert batch_key(make()) == (("rate", (8, 2)), ("row_mask", (8,)), ("waveform", (8, 40)))


DECAY = 0.75
OPTIMIZER = OptimizerConfig(learning_rate=0.1, warmup_steps=2)
AVERAGED = dataclasses.replace(OPTIMIZER, ema_decay=DECAY)


def toy_steps(optimizer, num_steps, mesh_config=MeshConfig(), poison=-1, resume_at=-1, directory=None):
    """Every state of a toy run, the first one included; at `resume_at` it goes on from a checkpoint in `directory`."""
    task, mesh = ToyTask(toy_config(optimizer=optimizer), poison=poison), make_mesh(mesh_config)
    abstract, shardings = abstract_state(task.init_state, mesh)
    state = make_state(task.init_state, shardings, jax.random.key(1))
    states = [jax.device_get(state)]
    with jax.set_mesh(mesh), axis_rules():
        step = jax.jit(task.make_step(), donate_argnums=0, out_shardings=(shardings, None))
        for index, size, local in task.batches(0, num_steps, mesh):
            if index == resume_at:
                with Checkpoints(directory, keep=1) as checkpoints:
                    checkpoints.save(index, state)
                    checkpoints.wait()
                    state = checkpoints.load(abstract)
            state, _ = step(state, global_batch(mesh, local, size), jax.random.key(2))
            states.append(jax.device_get(state))
    return states, state


def kernel(params):
    return np.asarray(params["layer"]["kernel"])


def test_the_average_follows_its_formula_skips_what_a_step_skips_and_shards_as_the_parameters():
    states, last = toy_steps(AVERAGED, 6, MeshConfig(data=2, fsdp=2, tensor=2), poison=3)
    want = kernel(states[0].params).astype(np.float64)
    for index, state in enumerate(states):
        if index and index - 1 != 3:
            want = DECAY * want + (1 - DECAY) * kernel(state.params)
        np.testing.assert_allclose(kernel(evaluation_params(state)), want, rtol=1e-6)
    assert states[-1].num_skipped == 1
    np.testing.assert_array_equal(kernel(evaluation_params(states[4])), kernel(evaluation_params(states[3])))
    assert np.abs(want - kernel(states[-1].params)).max() > 1e-3
    average = evaluation_params(last)["layer"]["kernel"]
    assert average.sharding == last.params["layer"]["kernel"].sharding
    assert average.sharding.spec == jax.P("fsdp", "tensor")
    assert average.dtype == jnp.float32


def test_the_average_changes_no_parameter_and_without_it_evaluation_sees_them():
    with_it, without = (toy_steps(optimizer, 4)[0][-1] for optimizer in (AVERAGED, OPTIMIZER))
    np.testing.assert_array_equal(kernel(with_it.params), kernel(without.params))
    assert evaluation_params(without)["layer"]["kernel"] is without.params["layer"]["kernel"]


def test_without_an_average_a_state_is_what_it_was_before_there_was_any():
    # Orbax loads no checkpoint that lacks even an empty branch of ours.
    (_, state), _ = toy_steps(OPTIMIZER, 1)
    assert [f.name for f in dataclasses.fields(TrainState)] == [
        "step",
        "num_skipped",
        "params",
        "opt_state",
        "model_state",
    ]
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)]
    assert names == ["[1][0].count", "[1][0].mu['layer']['kernel']", "[1][0].nu['layer']['kernel']", "[1][2].count"]
    assert len(state.opt_state) == 2


def test_a_resumed_average_is_the_unbroken_one(tmp_path):
    want, got = (toy_steps(AVERAGED, 5, **resume)[0] for resume in ({}, {"resume_at": 3, "directory": tmp_path}))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_forgets_nothing_or_grows_is_refused(decay):
    with pytest.raises(UserError, match=rf"optimizer\.ema_decay={decay}: must lie in \[0, 1\)"):
        validate(toy_config(optimizer=dataclasses.replace(OPTIMIZER, ema_decay=decay)))


def test_frozen_parameters_get_no_gradient_no_moments_and_no_change():
    params = {"a": {"kernel": jnp.ones((WIDTH, 2)), "bias": jnp.ones(2)}, "b": {"kernel": jnp.full((2, 2), 1e-3)}}
    is_trained = lambda path: path.startswith("b/")  # noqa: E731
    optimizer = make_optimizer(AVERAGED, 10)
    state = init_train_state(params, {}, optimizer, is_trained)

    def loss(params, model_state, batch, key):
        h = batch["x"] @ params["a"]["kernel"] + params["a"]["bias"]
        return jnp.square(1e3 * h @ params["b"]["kernel"]).mean(), ({}, model_state)

    batch = {"x": jnp.ones((8, WIDTH))}
    new, metrics = jax.jit(make_train_step(loss, optimizer, is_trained))(state, batch, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, new.params["a"], params["a"])
    assert not jnp.array_equal(new.params["b"]["kernel"], params["b"]["kernel"])
    gradient = jax.grad(lambda b: loss(params | {"b": b}, {}, batch, None)[0])(params["b"])
    assert float(metrics["grad_norm"]) == pytest.approx(float(jnp.linalg.norm(gradient["kernel"])), rel=1e-6)
    assert {leaf.shape for leaf in jax.tree.leaves(state.opt_state)} == {(), (2, 2)}
    assert evaluation_params(new)["a"]["bias"] is new.params["a"]["bias"]


def test_the_two_parts_of_a_tree_are_whole_together():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3, "f": {"g": 4}}
    parts = partition(tree, lambda path: path in ("a/c/d", "e"))
    assert parts == ({"a": {"c": {"d": 2}}, "e": 3}, {"a": {"b": 1}, "f": {"g": 4}})
    assert combine(*parts) == combine(*reversed(parts)) == tree
    assert partition(tree, None) == (tree, {})
    assert combine({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}) == {"a": {"b": 1, "c": 3}}
