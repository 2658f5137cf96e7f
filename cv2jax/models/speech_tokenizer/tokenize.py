"""From waveforms of any length to speech tokens: batching into a few static shapes, and windows beyond 30 s.

**Exact count.** A waveform of n samples at 16 kHz has n // 160 log-mel frames and gets ceil(frames / 4) tokens.

**Up to 30 s** the file is one piece. **Beyond**, Encoder1's attention would leave the lengths it was trained on, so the
log-mel of the whole file (one floor, one maximum) is cut into windows of 3000 frames (30 s) that start every 2600 frames
(650 tokens); the last window is the first that reaches the end. Two neighbours share 400 frames (4 s, 100 tokens): the
first 50 of these tokens come from the earlier window, the other 50 from the later one, so each token is taken from the
window in which it lies farther from the cut. Nothing is lost or repeated at any length (upstream's merge drops up to 50
tokens: spec/frontends.md 1.6). Attention is global, so windows approximate the one piece; `compare_windows` counts how
many tokens differ.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int, Int32, Key, PyTree

from cv2jax.audio.mel import WHISPER_BINS, WHISPER_HOP, log_mel_whisper
from cv2jax.config import UserError
from cv2jax.models.speech_tokenizer.config import SpeechTokenizerConfig
from cv2jax.models.speech_tokenizer.model import ENCODING_PARTS, SpeechTokenizer, encode, init_model_state
from cv2jax.nn.stack import stack_layers
from cv2jax.parallel.sharding import axis_rules, batch_sharding, num_batch_shards, replicated

FRAMES_PER_TOKEN = 4
WINDOW_FRAMES = 3000
STRIDE_FRAMES = 2600
# Piece lengths that are compiled (3, 6, 10, 15, 21, 30 s), each for one row a device and for a full batch.
PIECE_FRAMES = (300, 600, 1000, 1500, 2100, WINDOW_FRAMES)
COMPARED_FRAMES = 2 * WINDOW_FRAMES  # `compare_windows` looks at the first 60 s
# What decides the tokens, besides the parameters.
_HASHED_FIELDS = "num_mels width num_heads num_layers mlp_ratio fsmn_kernel rope_theta quantizer fsq_dim codebook_size"
_MAX_IN_FLIGHT = 2  # batches the device works on while the host prepares the next
_MAX_BEHIND = 4096  # finished waveforms that may wait for an earlier one in a batch that does not fill

K = TypeVar("K", bound=Hashable)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """One piece of a log-mel: its frames, and where its tokens go (`first` to `end`, skipping `skip` of its own)."""

    start_frame: int
    num_frames: int
    first: int
    end: int
    skip: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowComparison:
    """How many of the tokens differ between windows and one piece."""

    num_different: int
    num_tokens: int


def num_speech_tokens(num_frames: int) -> int:
    """ceil(num_frames / 4): tokens (25 Hz) of log-mel frames (100 Hz)."""
    return -(-num_frames // FRAMES_PER_TOKEN)


def plan_windows(num_frames: int) -> list[Window]:
    """The pieces of a file of `num_frames` frames; their token ranges cover 0 … ceil(num_frames / 4) - 1 once each."""
    starts = [0]
    while starts[-1] + WINDOW_FRAMES < num_frames:
        starts.append(starts[-1] + STRIDE_FRAMES)
    overlap = (WINDOW_FRAMES - STRIDE_FRAMES) // 2
    cuts = [0, *((start + overlap) // FRAMES_PER_TOKEN for start in starts[1:]), num_speech_tokens(num_frames)]
    return [
        Window(
            start_frame=start,
            num_frames=min(WINDOW_FRAMES, num_frames - start),
            first=first,
            end=end,
            skip=first - start // FRAMES_PER_TOKEN,
        )
        for start, first, end in zip(starts, cuts[:-1], cuts[1:], strict=True)
    ]


def init_encoding_params(config: SpeechTokenizerConfig, key: Key[Array, ""]) -> PyTree:
    """fp32 parameters of the ENCODING_PARTS alone, boxed with logical axes; trace it with `jax.eval_shape` for shapes only."""
    mel, num_frames = jnp.zeros((1, config.num_mels, 8), jnp.float32), jnp.full((1,), 8, jnp.int32)
    state = nn.unbox(init_model_state(config, key))
    return SpeechTokenizer(config).init(key, mel, num_frames, state, method="encode")["params"]


def tokenizer_hash(config: SpeechTokenizerConfig, params: PyTree, model_state: PyTree = None) -> str:
    """SHA-256 over the sizes and numbers that decide the tokens: Encoder1, quantizer and (vq) codebook.

    The same for scanned and unrolled layers, and whatever the computation dtype, dropout or recogniser around it.
    """
    fields = {name: getattr(config, name) for name in _HASHED_FIELDS.split()}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    arrays = {part: params[part] for part in ENCODING_PARTS if part in params}
    stack = arrays["encoder"]["stack"]
    if "blocks" not in stack:
        arrays["encoder"] = arrays["encoder"] | {"stack": stack_layers(dict(stack))}
    if config.quantizer == "vq":
        arrays["codebook"] = model_state.codebook
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        values = np.ascontiguousarray(np.asarray(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}".encode())
        digest.update(values.data)
    return digest.hexdigest()


def make_encoder(
    config: SpeechTokenizerConfig,
    params: PyTree,
    model_state: PyTree = None,
    *,
    batch_seconds: float = 120.0,
    compute_dtype: Literal["float32", "bfloat16"] = "float32",
    mesh: Mesh | None = None,
) -> "WaveformEncoder":
    """A callable from 16 kHz waveforms (list of float32 [W]) to speech tokens (list of int32 [L]), in order.

    Args:
      config, params, model_state: the tokenizer; params may hold only the ENCODING_PARTS; model_state is needed for vq.
      batch_seconds: audio in a batch, padding included; bounds the device's memory.
      compute_dtype: float32 runs at the highest matmul precision; bfloat16 is faster and flips near ties.
      mesh: devices that share a batch's rows; None is the first device alone.

    Raises UserError for a tokenizer without a quantizer.
    """
    return WaveformEncoder(
        config, params, model_state, batch_seconds=batch_seconds, compute_dtype=compute_dtype, mesh=mesh
    )


class WaveformEncoder:
    """Encodes waveforms in batches of few static shapes; made by `make_encoder`.

    At most 2 · (len(PIECE_FRAMES) + 1) programs are compiled, each when first needed: every piece length (and the
    windows of long files) for one row a device and for a full batch; and one more for `one_piece`. `shapes_used` lists
    them. Padding and batch mates
    are masked; within one shape results are bit-identical, across shapes sums round differently.
    """

    def __init__(
        self,
        config: SpeechTokenizerConfig,
        params: PyTree,
        model_state: PyTree = None,
        *,
        batch_seconds: float,
        compute_dtype: Literal["float32", "bfloat16"],
        mesh: Mesh | None,
    ) -> None:
        if config.quantizer == "none":
            raise UserError("quantizer 'none' gives no speech tokens; use a run trained with model.quantizer=fsq or vq")
        if not 0 < batch_seconds < math.inf:
            raise UserError(f"batch_seconds={batch_seconds}: must be positive and finite")
        self.config = dataclasses.replace(config, dtype=compute_dtype, remat="none", dropout=0.0)
        self._mesh = mesh
        self._batch_frames = batch_seconds * 100
        self.shapes_used: set[tuple[str, int, int]] = set()  # (input, frames, rows): one compiled program each
        parts = {part: params[part] for part in ENCODING_PARTS if part in params}
        self._variables = self._put((parts, {} if model_state is None else model_state), shard=False)

    def __call__(self, waveforms: Sequence[Float32[np.ndarray, " _"]]) -> list[Int32[np.ndarray, " _"]]:
        """Speech tokens [L] of each 16 kHz waveform [W], L = ceil((W // 160) / 4)."""
        return [speech_tokens for _, speech_tokens in self.encode_stream(enumerate(waveforms))]

    def encode_stream(
        self, waveforms: Iterable[tuple[K, Float32[np.ndarray, " _"]]]
    ) -> Iterator[tuple[K, Int32[np.ndarray, " _"]]]:
        """(key, speech tokens) of each (key, 16 kHz waveform), in order, holding a few batches and one long file."""
        stream = _Stream(self)
        items: deque[_Item] = deque()
        for key, waveform in waveforms:
            items.append(stream.add(key, waveform))
            if len(items) > _MAX_BEHIND:
                stream.finish()
            while items and not items[0].num_missing:
                yield items[0].key, items.popleft().speech_tokens
        stream.finish()
        yield from ((item.key, item.speech_tokens) for item in items)

    def one_piece(self, waveform: Float32[np.ndarray, " W"]) -> Int32[np.ndarray, " L"]:
        """Speech tokens of a waveform of at most 60 s without any windows: what `compare_windows` compares with."""
        mel = _log_mel(waveform)
        num_frames = mel.shape[1]
        if num_frames > COMPARED_FRAMES:
            raise UserError(f"one piece of {num_frames / 100:g} s: at most {COMPARED_FRAMES / 100:g} s fit")
        return np.asarray(self.run("mel", COMPARED_FRAMES, [mel], self.min_rows))[0, : num_speech_tokens(num_frames)]

    @property
    def min_rows(self) -> int:
        """Rows of the smallest batch: one a device."""
        return 1 if self._mesh is None else num_batch_shards(self._mesh)

    def max_rows(self, frames: int) -> int:
        """Rows of a full batch of pieces of `frames` frames."""
        return max(1, int(self._batch_frames // (frames * self.min_rows))) * self.min_rows

    def run(self, kind: str, frames: int, signals: Sequence[np.ndarray], rows: int) -> Int[Array, "B L"]:
        """Starts one batch on the device: `signals` are waveforms [W] or log-mels [M F], padded to `frames` and `rows`.

        Rows beyond the signals have length 0. The result is not waited for.
        """
        self.shapes_used.add((kind, frames, rows))
        shape = (frames * WHISPER_HOP + WHISPER_HOP - 1,) if kind == "waveform" else (WHISPER_BINS, frames)
        batch, lengths = np.zeros((rows, *shape), np.float32), np.zeros(rows, np.int32)
        for row, signal in enumerate(signals):
            lengths[row] = signal.shape[-1]
            batch[row, ..., : lengths[row]] = signal
        with contextlib.ExitStack() as stack:
            if self.config.dtype == "float32":
                stack.enter_context(jax.default_matmul_precision("highest"))
            if self._mesh is not None:
                stack.enter_context(jax.set_mesh(self._mesh))
                stack.enter_context(axis_rules())
            return _FUNCTIONS[kind](self.config, *self._variables, *self._put((batch, lengths), shard=True))

    def _put(self, values: PyTree, *, shard: bool) -> PyTree:
        if self._mesh is None:
            return jax.device_put(values, jax.local_devices()[0])
        return jax.device_put(values, batch_sharding(self._mesh) if shard else replicated(self._mesh))


@dataclasses.dataclass
class _Item:
    """A waveform on its way: its tokens are complete when no window is missing."""

    key: Any
    speech_tokens: Int32[np.ndarray, " L"]
    num_missing: int


@dataclasses.dataclass(frozen=True)
class _Piece:
    item: _Item
    window: Window
    signal: np.ndarray  # waveform [W] of a whole short file, or log-mel [M F] of a window of a long one


class _Stream:
    """The pieces of one pass: those that wait for their batch to fill, and those that the device works on."""

    def __init__(self, encoder: WaveformEncoder) -> None:
        self._encoder = encoder
        self._waiting: dict[tuple[str, int], list[_Piece]] = {}
        self._in_flight: deque[tuple[list[_Piece], jax.Array]] = deque()

    def add(self, key: Any, waveform: Float32[np.ndarray, " W"]) -> _Item:
        """Takes a waveform; batches that it fills are started."""
        windows = plan_windows(len(waveform) // WHISPER_HOP)
        item = _Item(key, np.zeros(windows[-1].end, np.int32), len(windows))
        if not windows[-1].end:  # under 10 ms there is no frame
            item.num_missing = 0
        elif len(windows) == 1:
            frames = next(frames for frames in PIECE_FRAMES if frames >= windows[0].num_frames)
            self._enqueue("waveform", frames, _Piece(item, windows[0], waveform))
        else:
            mel = _log_mel(waveform)
            for w in windows:
                part = mel[:, w.start_frame : w.start_frame + w.num_frames]
                self._enqueue("mel", WINDOW_FRAMES, _Piece(item, w, part))
        return item

    def finish(self) -> None:
        """Runs what waits in batches that are not full: in the full shape, or row by row where that is less work."""
        for (kind, frames), pieces in self._waiting.items():
            full, small = self._encoder.max_rows(frames), self._encoder.min_rows
            rows = full if len(pieces) * 4 > full else small
            for start in range(0, len(pieces), rows):
                self._launch(kind, frames, pieces[start : start + rows], rows)
        self._waiting = {}
        while self._in_flight:
            self._fetch()

    def _enqueue(self, kind: str, frames: int, piece: _Piece) -> None:
        waiting = self._waiting.setdefault((kind, frames), [])
        waiting.append(piece)
        if len(waiting) == self._encoder.max_rows(frames):
            self._launch(kind, frames, waiting, len(waiting))
            self._waiting[kind, frames] = []

    def _launch(self, kind: str, frames: int, pieces: list[_Piece], rows: int) -> None:
        tokens = self._encoder.run(kind, frames, [piece.signal for piece in pieces], rows)
        self._in_flight.append((pieces, tokens))
        if len(self._in_flight) > _MAX_IN_FLIGHT:
            self._fetch()

    def _fetch(self) -> None:
        pieces, tokens = self._in_flight.popleft()
        for piece, row in zip(pieces, np.asarray(tokens), strict=False):
            window, item = piece.window, piece.item
            item.speech_tokens[window.first : window.end] = row[window.skip : window.skip + window.end - window.first]
            item.num_missing -= 1


def compare_windows(encoder: WaveformEncoder, waveform: Float32[np.ndarray, " W"]) -> WindowComparison:
    """Counts the tokens of a waveform's first 60 s that windows change, against the same 60 s in one piece."""
    head = waveform[: COMPARED_FRAMES * WHISPER_HOP]
    windows, whole = encoder([head])[0], encoder.one_piece(head)
    return WindowComparison(num_different=int(np.sum(windows != whole)), num_tokens=len(whole))


def _log_mel(waveform: Float32[np.ndarray, " W"]) -> Float32[np.ndarray, "M F"]:
    """The log-mel of a whole file on the host, whose length would otherwise be one compiled shape more."""
    return np.asarray(log_mel_whisper(waveform[None])[0][0])


def _encode_waveform(
    config: SpeechTokenizerConfig,
    params: PyTree,
    model_state: PyTree,
    waveform: Float[Array, "B W"],
    num_samples: Int[Array, " B"],
) -> Int[Array, "B L"]:
    mel, num_frames = log_mel_whisper(waveform, num_samples)
    return _encode_mel(config, params, model_state, jnp.asarray(mel), jnp.asarray(num_frames))


def _encode_mel(
    config: SpeechTokenizerConfig,
    params: PyTree,
    model_state: PyTree,
    mel: Float[Array, "B M F"],
    num_frames: Int[Array, " B"],
) -> Int[Array, "B L"]:
    return encode(config, params, mel, num_frames, model_state)[0]


# Compiled once for each config and shape, whichever encoder asks.
_FUNCTIONS = {
    "waveform": jax.jit(_encode_waveform, static_argnums=0),
    "mel": jax.jit(_encode_mel, static_argnums=0),
}
