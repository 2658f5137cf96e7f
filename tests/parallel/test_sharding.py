"""Logical axes: strict names, one table, every sharding from one abstract state."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from cv2jax.config import MeshConfig, UserError
from cv2jax.parallel.distributed import from_first_process, global_batch, local_rows, to_host
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state, axis_rules, constrain, num_batch_shards
from cv2jax.train.state import init_train_state


def boxed(axes, shape=(8, 16)):
    def init(key):
        value = nn.with_logical_partitioning(nn.initializers.normal(), axes)(key, shape)
        return init_train_state({"layer": {"kernel": value}}, {}, optax.adamw(1e-3))

    return init


def test_parameters_and_moments_share_their_sharding():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    abstract, _ = abstract_state(boxed(("embed", "mlp")), mesh)
    assert abstract.params["layer"]["kernel"].sharding.spec == P("fsdp", "tensor")
    assert abstract.opt_state[0].mu["layer"]["kernel"].sharding.spec == P("fsdp", "tensor")
    assert abstract.step.sharding.spec == P()


def test_a_dimension_that_does_not_divide_is_replicated():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    abstract, _ = abstract_state(boxed(("embed", "heads"), (8, 6)), mesh)
    assert abstract.params["layer"]["kernel"].sharding.spec == P("fsdp")


def test_an_unknown_parameter_axis_is_an_error():
    with pytest.raises(ValueError, match=r"without a rule.*embde"):
        abstract_state(boxed(("embde", "mlp")), make_mesh(MeshConfig()))


def test_constrain_is_strict_inside_and_absent_outside():
    x = jnp.ones((8, 4))
    assert constrain(x, "batch", "lenght") is x
    mesh = make_mesh(MeshConfig(fsdp=2))
    with jax.set_mesh(mesh), axis_rules():
        with pytest.raises(ValueError, match="did not match a rule"):
            jax.jit(lambda y: constrain(y, "batch", "lenght"))(x)
        y = jax.jit(lambda y: constrain(y, "batch", "length"))(x)
    assert y.sharding.spec == P(("data", "fsdp"))


def test_rows_and_batches_of_one_process():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    assert num_batch_shards(mesh) == 4
    np.testing.assert_array_equal(local_rows(mesh, 8), np.arange(8))
    with pytest.raises(UserError, match="multiple of 4"):
        local_rows(mesh, 6)
    local = {"a": np.arange(16, dtype=np.int32).reshape(8, 2)}
    made = global_batch(mesh, local, 8)
    assert made["a"].sharding.spec == P(("data", "fsdp"))
    np.testing.assert_array_equal(to_host(made)["a"], local["a"])


def test_one_process_is_the_first():
    assert from_first_process(True)
    assert not from_first_process(False)
