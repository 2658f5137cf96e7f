"""From waveforms of any length to embeddings, in batches of few static shapes."""

from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int, PyTree

from cv2jax.audio.fbank import FBANK_RATE_HZ, kaldi_fbank
from cv2jax.config import UserError
from cv2jax.models.speaker_encoder.config import SpeakerEncoderConfig
from cv2jax.models.speaker_encoder.model import MIN_SAMPLES, embed, inference_config
from cv2jax.parallel.sharding import axis_rules, batch_sharding, num_batch_shards, replicated

# Seconds of a row: each is compiled for a full batch. Longer audio is heard up to the last of them.
PIECE_SECONDS = (3, 6, 10, 15, 30, 60, 300)
MAX_SAMPLES = PIECE_SECONDS[-1] * FBANK_RATE_HZ
_MAX_IN_FLIGHT = 2  # batches the device works on while the host prepares the next

K = TypeVar("K", bound=Hashable)


class WaveformEmbedder:
    """Embeds 16 kHz waveforms; padding and batch mates change nothing.

    Args:
      config, params, model_state: the encoder. batch_seconds: audio in a batch, padding included.
      mesh: devices that share a batch's rows; None is the first device alone.
    """

    def __init__(
        self,
        config: SpeakerEncoderConfig,
        params: PyTree,
        model_state: PyTree,
        *,
        batch_seconds: float = 120.0,
        mesh: Mesh | None = None,
    ) -> None:
        if not 0 < batch_seconds < float("inf"):
            raise UserError(f"batch_seconds={batch_seconds}: must be positive and finite")
        self.config, self._mesh, self._batch_seconds = inference_config(config), mesh, batch_seconds
        used = {"encoder": params["encoder"]}, {"norms": model_state["norms"]}
        self._variables = self._put(used, shard=False)
        self.shapes_used: set[tuple[int, int]] = set()  # (seconds, rows): one compiled program each

    def __call__(
        self, waveforms: Iterable[tuple[K, Float32[np.ndarray, " _"]]]
    ) -> Iterator[tuple[K, Float32[np.ndarray, " E"]]]:
        """(key, raw embedding) of each (key, 16 kHz waveform), as batches fill: not in order.

        Raises ValueError for a waveform of fewer than MIN_SAMPLES samples.
        """
        waiting: dict[int, list[tuple[K, np.ndarray]]] = {seconds: [] for seconds in PIECE_SECONDS}
        in_flight: deque[tuple[list[K], jax.Array]] = deque()
        for key, waveform in waveforms:
            if len(waveform) < MIN_SAMPLES:
                raise ValueError(f"{key}: {len(waveform)} samples, at least {MIN_SAMPLES} make an embedding")
            waveform = waveform[:MAX_SAMPLES]
            seconds = next(s for s in PIECE_SECONDS if s * FBANK_RATE_HZ >= len(waveform))
            waiting[seconds].append((key, waveform))
            if len(waiting[seconds]) == self._rows(seconds):
                in_flight.append(self._run(seconds, waiting[seconds]))
                waiting[seconds] = []
            if len(in_flight) > _MAX_IN_FLIGHT:
                yield from _fetch(in_flight.popleft())
        for seconds, items in waiting.items():
            if items:
                in_flight.append(self._run(seconds, items))
        for batch in in_flight:
            yield from _fetch(batch)

    def _rows(self, seconds: int) -> int:
        devices = 1 if self._mesh is None else num_batch_shards(self._mesh)
        return max(1, int(self._batch_seconds // (seconds * devices))) * devices

    def _run(self, seconds: int, items: list[tuple[K, np.ndarray]]) -> tuple[list[K], jax.Array]:
        rows = self._rows(seconds)
        self.shapes_used.add((seconds, rows))
        batch, lengths = np.zeros((rows, seconds * FBANK_RATE_HZ), np.float32), np.zeros(rows, np.int32)
        for row, (_, waveform) in enumerate(items):
            batch[row, : len(waveform)] = waveform
            lengths[row] = len(waveform)
        arguments = (self.config, *self._variables, *self._put((batch, lengths), shard=True))
        with jax.default_matmul_precision("highest"):
            if self._mesh is None:
                return [key for key, _ in items], _embed_waveforms(*arguments)
            with jax.set_mesh(self._mesh), axis_rules():
                return [key for key, _ in items], _embed_waveforms(*arguments)

    def _put(self, values: PyTree, *, shard: bool) -> PyTree:
        if self._mesh is None:
            return jax.device_put(values, jax.local_devices()[0])
        return jax.device_put(values, batch_sharding(self._mesh) if shard else replicated(self._mesh))


def _fetch(batch: tuple[list[Any], jax.Array]) -> Iterator[tuple[Any, np.ndarray]]:
    keys, embedding = batch
    return zip(keys, np.asarray(embedding), strict=False)  # rows beyond the keys only fill the shape


def _embed(
    config: SpeakerEncoderConfig,
    params: PyTree,
    model_state: PyTree,
    waveform: Float[Array, "B W"],
    num_samples: Int[Array, " B"],
) -> Float[Array, "B E"]:
    features, num_frames = map(jnp.asarray, kaldi_fbank(waveform, num_samples, subtract_mean=True))
    return embed(config, params, model_state, features, num_frames)


_embed_waveforms = jax.jit(_embed, static_argnums=0)  # once for each config and shape, whichever embedder asks
