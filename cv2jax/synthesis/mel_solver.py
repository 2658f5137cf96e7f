"""Whole requests in batches: sorted by length into few shapes, each row solved as if it were alone."""

from collections.abc import Sequence

import jax
import numpy as np

from cv2jax.config import UserError
from cv2jax.nn.chunks import NO_LEFT, ChunkMask
from cv2jax.shapes import Float
from cv2jax.synthesis.prompt import MelRequest, NonFinite, key_data, require_finite, require_frames, warn_untrained
from cv2jax.synthesis.stages import FRAMES_PER_TOKEN, Arrays, MelBatch, MelStage


class NonFiniteMels(NonFinite):
    """Mels that are not finite, each named with the place; `mels` has those of the other requests, None in their place."""

    def __init__(self, message: str, mels: list[Float[np.ndarray, "F M"] | None]) -> None:
        super().__init__(message)
        self.mels = mels


class MelSolver:
    """The flow of one checkpoint on whole requests under one mask; its stage must have `solve`."""

    def __init__(self, stage: MelStage, mask: ChunkMask, *, max_rows: int = 16, bucket: int = 50) -> None:
        """Compiles nothing yet: one program for each length, a multiple of `bucket` tokens, and number of rows, a power of 2
        or `max_rows`.

        A mask that training never drew is warned of. Raises ValueError for a stage that only streams.
        """
        if stage.solve is None:
            raise ValueError("this stage only streams")
        warn_untrained(stage, mask)
        self._stage, self._solve, self._mask = stage, stage.solve, mask
        self._max_rows, self._bucket = max_rows, bucket

    def __call__(self, requests: Sequence[MelRequest]) -> list[Float[np.ndarray, "F M"]]:
        """The log-mel of each request, 2 frames a token, without its voice's recording.

        Raises UserError, before anything is solved, for what `MelRequest.check` finds, and `NonFiniteMels`, with all other
        requests solved, for a mel that is not finite.
        """
        for request in requests:
            request.check(self._stage)
        lengths = [len(r.voice.speech_tokens) + len(r.speech_tokens) for r in requests]
        for request, length in zip(requests, lengths, strict=True):
            require_frames(FRAMES_PER_TOKEN * length, self._stage, request.name)
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
            raise NonFiniteMels("; ".join(errors), [mel if np.all(np.isfinite(mel)) else None for mel in mels])
        return mels

    def _slots(self, length: int) -> int:
        return -(-length // self._bucket) * self._bucket

    def _batch(self, requests: Sequence[MelRequest], size: int) -> list[Float[np.ndarray, "F M"]]:
        num_rows, stage = min(1 << (len(requests) - 1).bit_length(), self._max_rows), self._stage
        rows = [*requests, *[requests[0]] * (num_rows - len(requests))]
        tokens = np.zeros((num_rows, size), np.int32)
        prompt_mel = np.zeros((num_rows, FRAMES_PER_TOKEN * size, stage.num_mels), np.float32)
        for row, request in enumerate(rows):
            own, mel = (
                np.concatenate([request.voice.speech_tokens, request.speech_tokens]),
                request.voice.prompt_mel(stage),
            )
            tokens[row, : len(own)], prompt_mel[row, : len(mel)] = own, mel
        num_prompt = np.array([len(r.voice.speech_tokens) for r in rows], np.int32)
        num_tokens = num_prompt + np.array([len(r.speech_tokens) for r in rows], np.int32)
        fixed = lambda number: np.full(num_rows, number, np.int32)  # noqa: E731
        fields = {
            "speech_tokens": tokens,
            "num_tokens": num_tokens,
            "prompt_mel": prompt_mel,
            "speaker_embedding": np.stack([np.asarray(r.voice.speaker_embedding, np.float32) for r in rows]),
            "chunk": fixed(self._mask.chunk),
            "left": fixed(NO_LEFT if self._mask.left is None else self._mask.left),
            "prompt": num_prompt,
        }
        noise = self._noise(rows, FRAMES_PER_TOKEN * num_tokens, FRAMES_PER_TOKEN * num_prompt, prompt_mel.shape[1])
        solved = jax.device_get(self._solve(MelBatch(noise=noise, **jax.device_put(fields))))
        made = []
        for row in range(len(requests)):
            ends = FRAMES_PER_TOKEN * num_prompt[row], FRAMES_PER_TOKEN * num_tokens[row]
            made.append(solved[row, ends[0] : ends[1]])
        return made

    def _noise(self, rows: Sequence[MelRequest], num_frames: np.ndarray, num_prompt: np.ndarray, size: int) -> Arrays:
        # Padding needs no own noise.
        frames = np.minimum(np.arange(size, dtype=np.int32)[None], num_frames[:, None] - 1)
        keys = key_data(*(r.voice.key for r in rows)), key_data(*(r.key for r in rows))
        return self._stage.noise(*keys, frames, num_prompt)
