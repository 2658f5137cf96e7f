"""Whole requests in batches: sorted by length into few shapes, each row solved as if it were alone."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from cv2jax.config import UserError
from cv2jax.models.flow_matching.config import FRAMES_PER_TOKEN, FlowMatchingConfig
from cv2jax.models.flow_matching.model import FlowMatching, solve
from cv2jax.models.flow_matching.voice import (
    Request,
    require_finite,
    require_official_noise,
    start_noise,
    warn_untrained,
)
from cv2jax.nn.masks import NO_LEFT, ChunkMask, MaskSpec


class NotFinite(UserError):
    """Mels that are not finite, each named with the place; `mels` has those of the other requests, None in their place."""

    def __init__(self, message: str, mels: list[Float[np.ndarray, "F M"] | None]) -> None:
        super().__init__(message)
        self.mels = mels


class FlowSolver:
    """The flow of one checkpoint on whole requests under one mask."""

    def __init__(
        self,
        config: FlowMatchingConfig,
        params: PyTree,
        mask: ChunkMask,
        *,
        max_rows: int = 16,
        bucket: int = 50,
        use_official_noise: bool = False,
    ) -> None:
        """Compiles nothing yet: one program for each length, a multiple of `bucket` tokens, and number of rows, a power of 2
        or `max_rows`.

        Args: as `FlowStreams`.
        """
        warn_untrained(config, mask)
        self._config, self._params, self._mask = config, params, mask
        self._max_rows, self._bucket, self._use_official_noise = max_rows, bucket, use_official_noise
        self._solve = _program(config)

    def __call__(self, requests: Sequence[Request]) -> list[Float[np.ndarray, "F M"]]:
        """The log-mel of each request, 2 frames a token, without its voice's recording.

        Raises UserError, before anything is solved, for what `Request.check` finds, and `NotFinite`, with all other
        requests solved, for a mel that is not finite.
        """
        for request in requests:
            request.check(self._config)
        lengths = [len(r.voice.speech_tokens) + len(r.speech_tokens) for r in requests]
        if self._use_official_noise:
            for request, length in zip(requests, lengths, strict=True):
                require_official_noise(FRAMES_PER_TOKEN * length, self._config, request.name)
        found: dict[int, Float[np.ndarray, "F M"]] = {}
        by_length = sorted(range(len(requests)), key=lambda index: lengths[index])
        while by_length:
            size = self._slots(lengths[by_length[0]])
            rows = [index for index in by_length[: self._max_rows] if self._slots(lengths[index]) == size]
            by_length = by_length[len(rows) :]
            found |= dict(zip(rows, self._batch([requests[index] for index in rows], size), strict=True))
        mels = [found[index] for index in range(len(requests))]
        errors = []
        for request, mel in zip(requests, mels, strict=True):
            try:
                require_finite(mel, 0, request.name)
            except UserError as error:
                errors.append(str(error))
        if errors:
            raise NotFinite("; ".join(errors), [mel if np.all(np.isfinite(mel)) else None for mel in mels])
        return mels

    def _slots(self, length: int) -> int:
        return -(-length // self._bucket) * self._bucket

    def _batch(self, requests: Sequence[Request], size: int) -> list[Float[np.ndarray, "F M"]]:
        num_rows, c = min(1 << (len(requests) - 1).bit_length(), self._max_rows), self._config
        rows = [*requests, *[requests[0]] * (num_rows - len(requests))]
        tokens, prompt_mel = (
            np.zeros((num_rows, size), np.int32),
            np.zeros((num_rows, FRAMES_PER_TOKEN * size, c.num_mels)),
        )
        for row, request in enumerate(rows):
            own, mel = np.concatenate([request.voice.speech_tokens, request.speech_tokens]), request.voice.prompt_mel(c)
            tokens[row, : len(own)], prompt_mel[row, : len(mel)] = own, mel
        num_prompt = np.array([len(r.voice.speech_tokens) for r in rows], np.int32)
        batch = {
            "speech_tokens": tokens,
            "num_tokens": num_prompt + np.array([len(r.speech_tokens) for r in rows], np.int32),
            "prompt_mel": prompt_mel.astype(np.float32),
            "speaker_embedding": np.stack([np.asarray(r.voice.speaker_embedding, np.float32) for r in rows]),
        }
        noise = self._noise(
            rows, FRAMES_PER_TOKEN * batch["num_tokens"], FRAMES_PER_TOKEN * num_prompt, prompt_mel.shape[1]
        )
        left = NO_LEFT if self._mask.left is None else self._mask.left
        fixed = lambda number: np.full(num_rows, number, np.int32)  # noqa: E731
        mask = MaskSpec(kind="chunk", chunk=fixed(self._mask.chunk), left=fixed(left), prompt=num_prompt)
        solved = jax.device_get(self._solve(self._params, *jax.device_put((batch, noise, mask))))
        made = []
        for row in range(len(requests)):
            ends = FRAMES_PER_TOKEN * num_prompt[row], FRAMES_PER_TOKEN * batch["num_tokens"][row]
            made.append(solved[row, ends[0] : ends[1]])
        return made

    def _noise(
        self, rows: Sequence[Request], num_frames: np.ndarray, num_prompt: np.ndarray, size: int
    ) -> Float[Array, "B F M"]:
        frames = np.minimum(
            np.arange(size, dtype=np.int32)[None], num_frames[:, None] - 1
        )  # padding needs no own noise
        keys = jnp.stack([r.voice.key for r in rows]), jnp.stack([r.key for r in rows])
        c, official = self._config, self._use_official_noise
        return start_noise(*keys, jnp.asarray(frames), jnp.asarray(num_prompt), c.num_mels, official=official)


@functools.cache
def _program(config: FlowMatchingConfig) -> Any:
    """`solve` of (params, batch, noise, mask)."""
    return jax.jit(functools.partial(solve, FlowMatching(config)))
