"""Convolution stacks that run over whole utterances or, with the same numbers, in chunks of them.

A `Signal` is a block of activations with a whole number of elements (`rate`) a frame. What lies before the first element
of an utterance and behind its last one is zero in every layer, as the padding of a convolution wants it. `Whole` pads a
block so; `Chunk` puts the last inputs of the call before in front instead, and what a layer would have to see of the future
delays its output: each chunk gives as many elements as it takes, `delay` of them from before its start. So the delay of
the last layer is the true right receptive field of the stack, and no layer computes anything twice.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ENDLESS = 4_000_000  # frames: the length of an utterance whose end is not known yet


@flax.struct.dataclass
class Signal:
    """Activations of consecutive elements.

    Attributes:
      values: [B n D]. rate: elements a frame. delay: of a chunk's elements, in elements; 0 for a whole utterance.
      extra: elements that a whole utterance has beyond rate · frames.
    """

    values: Float[Array, "B n D"]
    rate: int = flax.struct.field(pytree_node=False)
    delay: int = flax.struct.field(pytree_node=False, default=0)
    extra: int = flax.struct.field(pytree_node=False, default=0)

    def holding(self, values: Float[Array, "B n D"]) -> "Signal":
        """Other values at the same places."""
        return dataclasses.replace(self, values=values)


class Whole:
    """Whole utterances, all of a block, or the first `num_frames` [B] frames of each row."""

    def __init__(self, num_frames: Int[Array, " B"] | None = None) -> None:
        self._num_frames = num_frames

    def extend(
        self, signal: Signal, size: int, left: int, *, stride: int = 1, extra: int | None = None
    ) -> tuple[Float[Array, "B m D"], Signal]:
        """What a convolution reads whose output i sees the `size` elements from stride · i - left on.

        Returns the padded values [B m D] and an empty Signal of the output: its rate, delay and extra. `extra`: of the
        output, default: of the input.
        """
        extra = signal.extra if extra is None else extra
        num_in = signal.values.shape[1]
        num_out = (num_in - signal.extra) // stride + extra
        right = stride * (num_out - 1) + size - left - num_in
        padded = jnp.pad(signal.values, ((0, 0), (left, max(right, 0)), (0, 0)))
        return padded[:, : left + num_in + right], _empty(signal, stride=stride, extra=extra)

    def mask(self, signal: Signal) -> Signal:
        """Zeroes what lies outside the utterance."""
        if self._num_frames is None:
            return signal
        keep = self.positions(signal) < (self._num_frames * signal.rate + signal.extra)[:, None]
        return signal.holding(jnp.where(keep[..., None], signal.values, 0))

    def positions(self, signal: Signal) -> Int[Array, "B n"]:
        """The place of each element in its utterance."""
        return jnp.arange(signal.values.shape[1], dtype=jnp.int32)[None]

    def last(self, signal: Signal) -> Int[Array, " B"]:
        """The place of each utterance's last element."""
        if self._num_frames is None:
            return jnp.full(signal.values.shape[:1], signal.values.shape[1] - 1, jnp.int32)
        return self._num_frames * signal.rate + signal.extra - 1

    def carry(self, initial: Any) -> Any:
        """What the chunk before kept, here the start."""
        return initial

    def keep(self, history: Any, signal: Signal) -> None:
        """Nothing follows."""
        del history, signal

    def upsampled(self, blocks: Float[Array, "B m D"], signal: Signal, stride: int, cut: int) -> Signal:
        """The elements of blocks of `stride`, one of each input element and more behind them, from the `cut`-th on."""
        num_out = stride * signal.values.shape[1]
        values = blocks.reshape(blocks.shape[0], -1, blocks.shape[2] // stride)[:, cut : cut + num_out]
        return Signal(values, signal.rate * stride)

    def reflect_start(self, signal: Signal) -> Signal:
        """One more element in front: a copy of the second."""
        values = jnp.concatenate([signal.values[:, 1:2], signal.values], axis=1)
        return dataclasses.replace(signal, values=values, extra=signal.extra + 1)


class Chunk:
    """The next frames of utterances: `num_valid` [B] of those in a block, behind the `num_seen` [B] that came before.

    Args:
      tails: the `tails` of the chunk before; None: makes those of the start.
      num_frames: [B] of the utterance, ENDLESS while its end is not known. Behind it frames of any content flush what is
        delayed.
    """

    def __init__(
        self,
        tails: Sequence[Any] | None,
        num_seen: Int[Array, " B"],
        num_valid: Int[Array, " B"],
        num_frames: Int[Array, " B"],
    ) -> None:
        self._old = None if tails is None else iter(tails)
        self._num_seen, self._num_valid, self._num_frames = num_seen, num_valid, num_frames
        self.tails: list[Any] = []

    def extend(
        self, signal: Signal, size: int, left: int, *, stride: int = 1, extra: int | None = None
    ) -> tuple[Float[Array, "B m D"], Signal]:
        """As `Whole.extend`: the block behind the last inputs of before, and how late the output is."""
        delay = -(-(signal.delay + size - left - stride) // stride)
        return self._delayed(signal, size, left, stride, extra, delay)

    def delay(self, signal: Signal, delay: int) -> Signal:
        """The same elements later."""
        if delay == signal.delay:
            return signal
        values, empty = self._delayed(signal, 1, 0, 1, None, delay)
        return empty.holding(values)

    def _delayed(
        self, signal: Signal, size: int, left: int, stride: int, extra: int | None, delay: int
    ) -> tuple[Float[Array, "B m D"], Signal]:
        rows, num_in, width = signal.values.shape
        tail = self.carry(jnp.zeros((rows, stride * delay + left - signal.delay, width), signal.values.dtype))
        seen = jnp.concatenate([tail, signal.values], axis=1)
        self.tails.append(_slices(seen, self._num_valid * signal.rate, tail.shape[1]))
        needed = num_in - stride + size
        extra = signal.extra if extra is None else extra
        return seen[:, :needed], _empty(signal, stride=stride, extra=extra, delay=delay)

    def mask(self, signal: Signal) -> Signal:
        """As `Whole.mask`."""
        places = self.positions(signal)
        keep = (places >= 0) & (places <= self.last(signal)[:, None])
        return signal.holding(jnp.where(keep[..., None], signal.values, 0))

    def positions(self, signal: Signal) -> Int[Array, "B n"]:
        """As `Whole.positions`."""
        first = self._num_seen * signal.rate - signal.delay
        return first[:, None] + jnp.arange(signal.values.shape[1], dtype=jnp.int32)

    def last(self, signal: Signal) -> Int[Array, " B"]:
        """As `Whole.last`."""
        return self._num_frames * signal.rate + signal.extra - 1

    def carry(self, initial: Any) -> Any:
        """What the chunk before kept under the same number, or `initial`."""
        return initial if self._old is None else next(self._old)

    def keep(self, history: Any, signal: Signal) -> None:
        """Keeps of a history (its start, then what each element makes of it) what it is behind the last valid frame."""
        self.tails.append(jax.tree.map(lambda a: _slices(a, self._num_valid * signal.rate, 1)[:, 0], history))

    def upsampled(self, blocks: Float[Array, "B m D"], signal: Signal, stride: int, cut: int) -> Signal:
        """As `Whole.upsampled`: what is cut off at the start makes all later."""
        values = blocks.reshape(blocks.shape[0], -1, blocks.shape[2] // stride)
        return Signal(values, signal.rate * stride, signal.delay * stride + cut)

    def reflect_start(self, signal: Signal) -> Signal:
        """As `Whole.reflect_start`; the copied element must lie in the same chunk, else all is a little later."""
        later = signal.delay
        while (1 - later) % signal.rate in (1, 2):
            later += 1
        signal = self.delay(signal, later)
        signal = dataclasses.replace(signal, delay=signal.delay - 1, extra=signal.extra + 1)
        is_first = self.positions(signal)[..., None] == 0
        return signal.holding(jnp.where(is_first, jnp.roll(signal.values, -2, axis=1), signal.values))


Extent = Whole | Chunk


def add(extent: Extent, first: Signal, second: Signal) -> Signal:
    """first + second, the one that comes earlier delayed."""
    if isinstance(extent, Chunk):
        later = max(first.delay, second.delay)
        first, second = extent.delay(first, later), extent.delay(second, later)
    return first.holding(first.values + second.values)


def _empty(signal: Signal, *, stride: int, extra: int, delay: int = 0) -> Signal:
    return Signal(signal.values[:, :0], signal.rate // stride, delay, extra)


def _slices(values: Array, start: Int[Array, " B"], size: int) -> Array:
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, size))(values, start)
