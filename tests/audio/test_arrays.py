"""Choosing between numpy and jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.audio.arrays import array_namespace, as_float, matmul


def test_numpy_stays_numpy_and_the_rest_is_jax():
    assert array_namespace(np.zeros(2), None, np.float32(1)) is np
    assert array_namespace(np.zeros(2), jnp.zeros(2)) is jnp
    assert jax.jit(lambda x: jnp.float32(array_namespace(x) is jnp))(np.zeros(2)) == 1


@pytest.mark.parametrize("xp", [np, jnp])
def test_half_precision_is_widened(xp):
    assert as_float(xp, xp.zeros(2, dtype=np.float16)).dtype == np.float32
    assert as_float(np, np.zeros(2)).dtype == np.float64


@pytest.mark.parametrize("xp", [np, jnp])
def test_integers_are_no_audio(xp):
    with pytest.raises(TypeError, match="not int16; divide 16-bit samples by 32768"):
        as_float(xp, xp.zeros(2, dtype=np.int16))


def test_matmul_asks_for_full_precision():
    left, right = np.eye(3, dtype=np.float32), np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(matmul(np, left, right), right)
    assert "HIGHEST" in str(jax.make_jaxpr(lambda a, b: matmul(jnp, a, b))(left, right))
