"""What a signal stack says when it is fed in random pieces, rows of a batch standing anywhere, garbage where nothing is."""

import jax
import jax.numpy as jnp
import numpy as np

from cv2jax.nn.signal import ENDLESS, Chunk, Signal, Whole


class Chunked:
    """`apply(extent, signal)` as a stream; compiled once, for blocks of `block` frames of `rate` elements."""

    def __init__(self, apply, rate: int, block: int) -> None:
        self._apply, self._rate, self._block = apply, rate, block
        self._step = jax.jit(self._run)
        self.delay = self.out_rate = self.extra = -1

    def _run(self, tails, values, seen, valid, total):
        extent = Chunk(tails, seen, valid, total)
        out = self._apply(extent, extent.mask(Signal(values, self._rate)))
        self.delay, self.out_rate, self.extra = out.delay, out.rate, out.extra
        return out.values, extent.tails

    def start(self, rows: int, width: int):
        """Tails of which nothing was heard."""
        count = jax.ShapeDtypeStruct((rows,), jnp.int32)
        values = jax.ShapeDtypeStruct((rows, self._rate * self._block, width), jnp.float32)
        tails = jax.eval_shape(lambda *args: self._run(None, *args)[1], values, count, count, count)
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tails)

    def __call__(self, values: np.ndarray, lengths: list[int], seed: int) -> list[np.ndarray]:
        """All of each row [n D], flushed."""
        rng, rows = np.random.default_rng(seed), len(lengths)
        tails = self.start(rows, values.shape[2])
        behind = -(-(self.delay + self.extra) // self.out_rate)
        ends = np.asarray(lengths) + behind
        said_early = rng.random(rows) < 0.5  # the end is known from the start, or when it is there
        seen, parts = np.zeros(rows, np.int32), [[] for _ in lengths]
        while (seen < ends).any():
            valid = np.minimum(rng.integers(0, self._block + 1, rows), ends - seen).astype(np.int32)
            fed = np.full((rows, self._rate * self._block, values.shape[2]), np.nan, np.float32)
            for row, (start, count) in enumerate(zip(seen, valid, strict=True)):
                real = values[row, self._rate * start : self._rate * min(start + count, lengths[row])]
                fed[row, : len(real)] = real
            total = np.where(said_early | (seen + valid > lengths), lengths, ENDLESS).astype(np.int32)
            made, tails = self._step(tails, fed, seen, valid, total)
            for row, count in enumerate(valid):
                parts[row].append(np.asarray(made[row, : count * self.out_rate]))
            seen = seen + valid
        whole = [np.concatenate(part)[self.delay :] for part in parts]
        return [out[: n * self.out_rate + self.extra] for out, n in zip(whole, lengths, strict=True)]


def whole(apply, values: np.ndarray, rate: int, lengths: list[int]) -> tuple[list[np.ndarray], Signal]:
    """The same over whole utterances of a padded batch; what lies behind the end of each is NaN at the input."""
    garbage = np.array(values, np.float32)
    for row, length in enumerate(lengths):
        garbage[row, length * rate :] = np.nan

    def run(values):
        extent = Whole(jnp.asarray(lengths, jnp.int32))
        return apply(extent, extent.mask(Signal(values, rate)))

    out = jax.jit(run)(garbage)
    return [np.asarray(out.values[i, : n * out.rate + out.extra]) for i, n in enumerate(lengths)], out


def alone(apply, values: np.ndarray, rate: int) -> np.ndarray:
    """One utterance [n D] without a batch."""
    return np.asarray(apply(Whole(), Signal(jnp.asarray(values)[None], rate)).values[0])
