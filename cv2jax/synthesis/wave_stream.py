"""Waveforms from mel: whole, or hop by hop as the mel arrives, the same samples.

A stream is late by its stage's `hold_back` samples (official size: 9,480, that is 395 ms): so far the vocoder looks ahead.
Every hop costs what its frames cost, however long the stream gets, and the last one flushes.
"""

import dataclasses

import jax
import numpy as np
from jax import Array

from cv2jax.config import UserError
from cv2jax.shapes import Float, Float32, Key
from cv2jax.synthesis.prompt import NonFinite, key_data
from cv2jax.synthesis.stages import State, WaveStage

LONGEST_WHOLE = 1536  # frames, 30 s: what lasts longer is made in hops, whose memory does not grow
_WHOLE_MULTIPLE = 64  # frames: whole utterances are padded to, so that few shapes compile


def synthesise(stage: WaveStage, mel: Float[np.ndarray, "F M"], key: Key[Array, ""]) -> Float32[np.ndarray, " W"]:
    """The waveform of a whole mel [F M], 480 samples a frame at the official hop; `key`: of its noise.

    Raises UserError for a mel of another bin count, or with values that are not finite, and for a waveform that is not finite.
    """
    return _finite(synthesise_unchecked(stage, mel, key))


def synthesise_unchecked(
    stage: WaveStage, mel: Float[np.ndarray, "F M"], key: Key[Array, ""]
) -> Float32[np.ndarray, " W"]:
    """As `synthesise`, whatever the waveform holds: for those who report it."""
    mel, hop = checked_mel(stage, mel), stage.mel_definition.mel_hop
    if stage.whole is None or len(mel) > LONGEST_WHOLE:
        streams = WaveStreams(stage)
        flush = np.zeros((-(-stage.hold_back // hop), mel.shape[1]), np.float32)
        waveform, _ = streams.run(streams.initial, np.concatenate([mel, flush]), key, len(mel))
        return waveform[stage.hold_back :][: len(mel) * hop]
    padded = np.zeros((1, -(-max(len(mel), 1) // _WHOLE_MULTIPLE) * _WHOLE_MULTIPLE, mel.shape[1]), np.float32)
    padded[0, : len(mel)] = mel
    made = stage.whole(padded, key_data(key), np.array([len(mel)], np.int32))
    return np.asarray(made)[0, : len(mel) * hop]


def checked_mel(stage: WaveStage, mel: Float[np.ndarray, "F M"]) -> Float32[np.ndarray, "F M"]:
    """The mel in fp32; UserError for one that this vocoder cannot read."""
    mel = np.asarray(mel, np.float32)
    if mel.ndim != 2 or mel.shape[1] != stage.mel_definition.num_mels:
        raise UserError(
            f"mel of shape {mel.shape}: this vocoder reads [frames, {stage.mel_definition.num_mels}]; give it the mel that"
            " it was trained on"
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
        raise NonFinite("the vocoder's waveform is not finite: its parameters are damaged; use another checkpoint")
    return waveform


class WaveStreams:
    """Streams of one vocoder: `start` one for each request."""

    def __init__(self, stage: WaveStage) -> None:
        self.stage, self.hold_back = stage, stage.hold_back  # samples
        self.initial = stage.init_state()  # of every stream: nothing is used up

    def start(self, key: Key[Array, ""]) -> "WaveStream":
        """A stream whose noise is `key`'s."""
        return WaveStream(self, key)

    def warm_up(self) -> None:
        """Compiles all steps before the first request."""
        for size in self.stage.sizes:
            self.start(jax.random.key(0)).hop(np.zeros((size, self.stage.mel_definition.num_mels), np.float32))

    def run(
        self, state: State, mel: Float32[np.ndarray, "F M"], key: Key[Array, ""], total: int
    ) -> tuple[Float32[np.ndarray, " W"], State]:
        """Samples of the next frames, hold-back and what precedes the start included, and the state behind them."""
        parts, stage, data = [], self.stage, key_data(key)
        while len(mel):
            size = next((size for size in stage.sizes if size >= len(mel)), stage.sizes[-1])
            piece, mel = mel[:size], mel[size:]
            block = np.zeros((1, size, mel.shape[1]), np.float32)
            block[0, : len(piece)] = piece
            waveform, state = stage.step(
                state, block, data, np.array([len(piece)], np.int32), np.array([total], np.int32)
            )
            parts.append((waveform, len(piece) * stage.mel_definition.mel_hop))
        # Cut here: on the device each length would be a program to compile.
        return np.concatenate([np.asarray(part)[0, :size] for part, size in parts]), state


@dataclasses.dataclass
class WaveStream:
    """One request: give it the mel as it comes, play what it returns."""

    streams: WaveStreams
    key: Key[Array, ""]
    _state: State = None
    _num_frames: int = 0
    _num_samples: int = 0  # returned
    has_ended: bool = False

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
        mine, stage = self.streams, self.streams.stage
        hop = stage.mel_definition.mel_hop
        if self.has_ended:
            raise UserError("this stream has ended; start another")
        mel = checked_mel(stage, mel)
        if hold_back is not None and not 0 <= hold_back <= mine.hold_back:
            raise UserError(f"hold_back={hold_back}: give samples, 0 … {mine.hold_back} (the model's own)")
        num_frames = self._num_frames + len(mel)
        if num_frames >= stage.endless:
            raise UserError(
                f"this stream has {self._num_frames} frames and can have {stage.endless}; end it and start another"
            )
        flush = np.zeros((-(-mine.hold_back // hop), stage.mel_definition.num_mels), np.float32)
        fed = np.concatenate([mel, flush]) if last and num_frames else mel
        state = mine.initial if self._state is None else self._state
        first = self._num_frames * hop - mine.hold_back
        samples = np.zeros(0, np.float32)
        if len(fed):
            samples, state = mine.run(state, fed, self.key, num_frames if last else stage.endless)
        end = num_frames * hop - (0 if last else mine.hold_back)
        if hold_back is not None and not last and len(mel) and hold_back < mine.hold_back:
            guess = np.repeat(mel[-1:], len(flush), axis=0)
            guessed, _ = mine.run(state, guess, self.key, stage.endless)
            samples = np.concatenate([samples, guessed])
            end = num_frames * hop - hold_back
        heard = _finite(samples[max(self._num_samples - first, 0) : max(end - first, 0)])
        self._state, self._num_frames, self.has_ended = state, num_frames, last
        self._num_samples += len(heard)
        return heard
