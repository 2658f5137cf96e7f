"""Waveforms from mel: whole, or hop by hop as the mel arrives, the same samples.

A stream is late by `hold_back(config)` samples (official size: 9,480, that is 395 ms): so far the first convolutions and the
F0 predictor look ahead. Every hop costs what its frames cost, however long the stream gets, and the last one flushes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Key

from cv2jax.audio.mel import FLOW_MEL, MelDefinition
from cv2jax.config import UserError
from cv2jax.models.hift_vocoder.config import HiftVocoderConfig
from cv2jax.models.hift_vocoder.model import HiftOutput, HiftState, HiftVocoder, hold_back
from cv2jax.nn.signal import ENDLESS

SHORTEST, LONGEST = 8, 128  # frames of a compiled step; longer hops are several
LONGEST_WHOLE = 1536  # frames, 30 s: what lasts longer is made in hops, whose memory does not grow
_WHOLE_MULTIPLE = 64  # frames: whole utterances are padded to, so that few shapes compile


def init_state(config: HiftVocoderConfig, num_rows: int) -> HiftState:
    """The state of streams of which nothing was heard."""
    num_frames, tails = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), _state_shapes(config, num_rows))
    return HiftState(num_frames=num_frames, tails=tails)


@functools.lru_cache(maxsize=16)  # it traces the model, which a request must not wait for
def _state_shapes(config: HiftVocoderConfig, num_rows: int) -> tuple[Any, list[Any]]:
    vocoder = HiftVocoder(config)
    mel = jax.ShapeDtypeStruct((num_rows, 1, config.num_mels), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_rows))
    count = jax.ShapeDtypeStruct((num_rows,), jnp.int32)

    def first(key: Array, mel: Array, keys: Array, count: Array) -> tuple[Any, list[Any]]:
        (_, state), _ = vocoder.init_with_output(key, mel, keys, None, count, count, method="step")
        return state.num_frames, state.tails

    return jax.eval_shape(first, jax.eval_shape(lambda: jax.random.key(0)), mel, keys, count)


@functools.partial(jax.jit, static_argnums=0)
def step(
    config: HiftVocoderConfig,
    params: Any,
    state: HiftState,
    mel: Float[Array, "B F M"],
    keys: Key[Array, " B"],
    num_valid: Int[Array, " B"],
    total: Int[Array, " B"],
) -> tuple[HiftOutput, HiftState]:
    """`HiftVocoder.step` of a batch of streams that may stand anywhere."""
    arguments = (mel, keys, state, num_valid, total)
    return HiftVocoder(config).apply({"params": params}, *arguments, method="step")  # type: ignore[return-value]


@functools.partial(jax.jit, static_argnums=0)
def _whole(config: HiftVocoderConfig, params: Any, mel: Array, keys: Array, num_frames: Array) -> HiftOutput:
    return HiftVocoder(config).apply({"params": params}, mel, keys, num_frames)  # type: ignore[return-value]


def synthesise(
    config: HiftVocoderConfig,
    params: Any,
    mel: Float[np.ndarray, "F M"],
    key: Key[Array, ""],
    definition: MelDefinition = FLOW_MEL,
) -> Float32[np.ndarray, " W"]:
    """The waveform of a whole mel [F M], 480 samples a frame at the official hop; `key`: of its noise.

    Raises UserError for a mel of another definition or bin count, or with values that are not finite, and for a waveform
    that is not finite.
    """
    return _finite(synthesise_unchecked(config, params, mel, key, definition))


def synthesise_unchecked(
    config: HiftVocoderConfig,
    params: Any,
    mel: Float[np.ndarray, "F M"],
    key: Key[Array, ""],
    definition: MelDefinition = FLOW_MEL,
) -> Float32[np.ndarray, " W"]:
    """As `synthesise`, whatever the waveform holds: for those who report it."""
    require_mel(config, definition)
    mel = checked_mel(config, mel)
    if len(mel) > LONGEST_WHOLE:
        streams = HiftStreams(config, params, definition)
        flush = np.zeros((-(-streams.hold_back // config.mel_hop), config.num_mels), np.float32)
        waveform, _ = streams.run(streams.initial, np.concatenate([mel, flush]), key, len(mel))
        return waveform[streams.hold_back :][: len(mel) * config.mel_hop]
    padded = np.zeros((1, -(-max(len(mel), 1) // _WHOLE_MULTIPLE) * _WHOLE_MULTIPLE, config.num_mels), np.float32)
    padded[0, : len(mel)] = mel
    made = _whole(config, params, padded, key[None], np.array([len(mel)], np.int32))
    return np.asarray(made.waveform[0, : len(mel) * config.mel_hop])


def require_mel(config: HiftVocoderConfig, definition: MelDefinition) -> None:
    """Raises UserError unless the vocoder was made for mel of that definition."""
    lines = [
        f"{name} {theirs:g} (the vocoder's: {mine:g})"
        for name, theirs in vars(definition).items()
        if theirs != (mine := getattr(config, name))
    ]
    if lines:
        raise UserError(f"mel of another definition: {', '.join(lines)}; use the vocoder that was trained on it")


def checked_mel(config: HiftVocoderConfig, mel: Float[np.ndarray, "F M"]) -> Float32[np.ndarray, "F M"]:
    """The mel in fp32; UserError for one that this vocoder cannot read."""
    mel = np.asarray(mel, np.float32)
    if mel.ndim != 2 or mel.shape[1] != config.num_mels:
        raise UserError(
            f"mel of shape {mel.shape}: this vocoder reads [frames, {config.num_mels}]; give it the mel that it was trained on"
        )
    bad = ~np.isfinite(mel).all(axis=1)
    if bad.any():
        raise UserError(
            f"mel: {bad.sum()} of {len(mel)} frames hold NaN or infinite values, frame {int(bad.argmax())} first;"
            " look at what made it"
        )
    return mel


def _finite(waveform: Float32[np.ndarray, " W"]) -> Float32[np.ndarray, " W"]:
    if not np.isfinite(waveform).all():
        raise UserError("the vocoder's waveform is not finite: its parameters are damaged; use another checkpoint")
    return waveform


class HiftStreams:
    """Streams of one vocoder: `start` one for each request. Raises UserError for one made for mel of another definition."""

    def __init__(self, config: HiftVocoderConfig, params: Any, definition: MelDefinition = FLOW_MEL) -> None:
        require_mel(config, definition)
        self.config, self.params = config, params
        self.hold_back = hold_back(config)  # samples
        self.initial = init_state(config, 1)  # of every stream: nothing is donated

    def start(self, key: Key[Array, ""]) -> "HiftStream":
        """A stream whose noise is `key`'s."""
        return HiftStream(self, key)

    def warm_up(self) -> None:
        """Compiles all steps before the first request."""
        size = SHORTEST
        while size <= LONGEST:
            self.start(jax.random.key(0)).hop(np.zeros((size, self.config.num_mels), np.float32))
            size *= 2

    def run(
        self, state: HiftState, mel: Float32[np.ndarray, "F M"], key: Key[Array, ""], total: int
    ) -> tuple[Float32[np.ndarray, " W"], HiftState]:
        """Samples of the next frames, hold-back and what precedes the start included, and the state behind them."""
        parts = []
        while len(mel):
            size = SHORTEST
            while size < min(len(mel), LONGEST):
                size *= 2
            piece, mel = mel[:size], mel[size:]
            block = np.zeros((1, size, self.config.num_mels), np.float32)
            block[0, : len(piece)] = piece
            counts = (np.array([len(piece)], np.int32), np.array([total], np.int32))
            made, state = step(self.config, self.params, state, block, key[None], *counts)
            parts.append(made.waveform[0, : len(piece) * self.config.mel_hop])
        return np.concatenate([np.asarray(part) for part in parts]), state


@dataclasses.dataclass
class HiftStream:
    """One request: give it the mel as it comes, play what it returns."""

    streams: HiftStreams
    key: Key[Array, ""]
    _state: HiftState | None = None
    _num_frames: int = 0
    _num_samples: int = 0  # returned
    _ended: bool = False

    def hop(
        self, mel: Float[np.ndarray, "F M"], *, last: bool = False, hold_back: int | None = None
    ) -> Float32[np.ndarray, " W"]:
        """The samples that the next frames make known, those before them that were held back first.

        Args:
          mel: any number of frames. last: they end the utterance, and nothing is held back.
          hold_back: of the model's samples to hold back only so many; the frames that are not there yet are guessed as
            repetitions of the last one. These samples are near the true ones, not equal to them (`cv2jax bench vocoder`
            says how near); all that follows is exact again.
        Raises: UserError for a mel that the vocoder cannot read and for a stream that has ended; it stays as it was.
        """
        mine, config = self.streams, self.streams.config
        if self._ended:
            raise UserError("this stream has ended; start another")
        mel = checked_mel(config, mel)
        if hold_back is not None and not 0 <= hold_back <= mine.hold_back:
            raise UserError(f"hold_back={hold_back}: give samples, 0 … {mine.hold_back} (the model's own)")
        num_frames = self._num_frames + len(mel)
        if num_frames >= ENDLESS:
            raise UserError(
                f"this stream has {self._num_frames} frames and can have {ENDLESS}; end it and start another"
            )
        flush = np.zeros((-(-mine.hold_back // config.mel_hop), config.num_mels), np.float32)
        fed = np.concatenate([mel, flush]) if last else mel
        state = mine.initial if self._state is None else self._state
        first = self._num_frames * config.mel_hop - mine.hold_back
        samples = np.zeros(0, np.float32)
        if len(fed):
            samples, state = mine.run(state, fed, self.key, num_frames if last else ENDLESS)
        end = num_frames * config.mel_hop - (0 if last else mine.hold_back)
        if hold_back is not None and not last and len(mel) and hold_back < mine.hold_back:
            guess = np.repeat(mel[-1:], len(flush), axis=0)
            guessed, _ = mine.run(state, guess, self.key, ENDLESS)
            samples = np.concatenate([samples, guessed])
            end = num_frames * config.mel_hop - hold_back
        heard = _finite(samples[max(self._num_samples - first, 0) : max(end - first, 0)])
        self._state, self._num_frames, self._ended = state, num_frames, last
        self._num_samples += len(heard)
        return heard
