"""`cv2jax encode`: audio of any length to the speech tokens of a trained run; streaming, batched, all or nothing.

Threads decode a few files ahead, the device works on full batches of few static shapes (see
`models/speech_tokenizer/tokenize.py`, which also says how audio beyond 30 s is cut), and tokens are written in the order
of the input. Memory holds a few batches and the longest file (about 65 MB a minute of it while its log-mel is computed).
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32
from tqdm import tqdm

from cv2jax.audio.io import load_waveform
from cv2jax.audio.mel import WHISPER_HOP, WHISPER_RATE_HZ
from cv2jax.config import MeshConfig, UserError
from cv2jax.data.manifest import parse_utterance, scan_manifest
from cv2jax.data.tokens import METADATA, TokenWriter, check_token_path
from cv2jax.models.speech_tokenizer.tokenize import (
    WINDOW_FRAMES,
    WaveformEncoder,
    WindowComparison,
    compare_windows,
    make_encoder,
)
from cv2jax.parallel.mesh import make_mesh
from cv2jax.tasks.encoders import load_tokenizer

_SECONDS_BETWEEN_LINES = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeResult:
    """What a run of `encode_audio` did; `comparison` is None unless asked for."""

    num_utterances: int
    num_refused: int
    num_tokens: int
    seconds: float  # of audio
    wall_seconds: float
    num_programs: int  # compiled
    tokenizer: str
    comparison: WindowComparison | None
    num_compared: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """An input to load; or, with a reason, one that is refused already."""

    id: str
    audio: str  # as the user wrote it
    path: str
    reason: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loaded:
    source: _Source
    waveform: Float32[np.ndarray, " W"]


def encode_audio(
    run: str | os.PathLike[str],
    inputs: Sequence[str],
    out: str | os.PathLike[str],
    *,
    batch_seconds: float = 120.0,
    split: str | None = None,
    compute_dtype: Literal["float32", "bfloat16"] = "float32",
    workers: int = 0,
    strict: bool = False,
    compare_one_piece: bool = False,
) -> EncodeResult:
    """Writes the speech tokens of `inputs` (audio files and .jsonl manifests) to `out` (.jsonl or .npz), in their order.

    Bad inputs are named on stderr, counted and left out; `strict` stops at the first. `split` keeps one split of the
    manifests; `workers` 0 decodes in one thread a core. `compare_one_piece` also counts the tokens that windows change
    in the first 60 s of each file beyond 30 s. `out` appears when all is done, never half. Raises UserError where nothing
    can be encoded.
    """
    start = time.monotonic()
    check_token_path(out)
    if compute_dtype not in ("float32", "bfloat16"):
        raise UserError(f"compute_dtype={compute_dtype}: choose float32 or bfloat16")
    if workers < 0:
        raise UserError(f"workers={workers}: give a number of threads, or 0 for one a core")
    if not inputs:
        raise UserError("no inputs: give audio files or a .jsonl manifest after RUN")
    if os.path.realpath(out) in map(os.path.realpath, inputs):
        raise UserError(f"--out {out} is also an input; give another file")
    sources = _list_sources(inputs, split, reserved=METADATA if str(out).endswith(".npz") else None)
    tokenizer = load_tokenizer(run)
    encoder = make_encoder(
        tokenizer.config,
        tokenizer.params,
        tokenizer.model_state,
        batch_seconds=batch_seconds,
        compute_dtype=compute_dtype,
        mesh=_accelerators(),
    )
    metadata = {"version": 1, "tokenizer": tokenizer.hash, "rate_hz": 25, "num_codes": tokenizer.config.num_codes}
    with TokenWriter(out, metadata | {"compute_dtype": compute_dtype}) as writer, _Progress(strict) as progress:
        loaded = _load_all(sources, progress, workers or os.cpu_count() or 1)
        comparisons: list[WindowComparison] = []
        if compare_one_piece:
            loaded = _comparing(loaded, encoder, comparisons)
        for item, speech_tokens in encoder.encode_stream((item, item.waveform) for item in loaded):
            num_samples = len(item.waveform)
            writer.write(
                item.source.id,
                item.source.audio,
                speech_tokens,
                num_frames=num_samples // WHISPER_HOP,
                seconds=num_samples / WHISPER_RATE_HZ,
            )
            progress.add(num_samples / WHISPER_RATE_HZ, len(speech_tokens))
        if not progress.num_utterances:
            raise UserError(f"none of the {progress.num_refused} inputs can be encoded; first: {progress.first_reason}")
    return EncodeResult(
        num_utterances=progress.num_utterances,
        num_refused=progress.num_refused,
        num_tokens=progress.num_tokens,
        seconds=progress.seconds,
        wall_seconds=time.monotonic() - start,
        num_programs=len(encoder.shapes_used),
        tokenizer=tokenizer.hash,
        comparison=_total(comparisons) if compare_one_piece else None,
        num_compared=len(comparisons),
    )


def _accelerators() -> Mesh | None:
    """All devices of this host share the rows; on a CPU one device takes every core anyway."""
    devices = jax.local_devices()
    return None if devices[0].platform == "cpu" or len(devices) == 1 else make_mesh(MeshConfig(), devices)


def _list_sources(inputs: Sequence[str], split: str | None, *, reserved: str | None) -> Iterator[_Source]:
    """Every utterance of every input; manifests are checked now, so that a wrong one stops the job before it starts."""
    scans = {path: scan_manifest(path) for path in inputs if path.endswith(".jsonl")}
    if split is not None and not any(split in scan.splits for scan in scans.values()):
        known = sorted({name for scan in scans.values() for name in scan.splits})
        hint = f"the manifests have {', '.join(known)}" if known else "only manifests have splits"
        raise UserError(f"split={split}: no input has that split; {hint}")

    def generate() -> Iterator[_Source]:
        # One manifest has unique ids already: nothing need be remembered, however long it is.
        seen: dict[str, int] | None = {} if len(inputs) > 1 else None
        for number, name in enumerate(inputs):
            for source in _read_manifest(name, scans[name], split) if name in scans else [_file_source(name)]:
                if source.reason is None and source.id == reserved:
                    source = dataclasses.replace(source, reason=f'id "{reserved}" is taken in an npz; write .jsonl')
                elif (
                    source.reason is None
                    and seen is not None
                    and (first := seen.setdefault(source.id, number)) != number
                ):
                    reason = f'duplicate id "{source.id}" (first in {inputs[first]})'
                    source = dataclasses.replace(source, reason=reason)
                yield source

    return generate()


def _file_source(name: str) -> _Source:
    return _Source(id=name, audio=name, path=name)


def _read_manifest(name: str, scan: Any, split: str | None) -> Iterator[_Source]:
    directory = os.path.dirname(os.path.abspath(name))
    for refusal in scan.refused:
        yield _Source(id=refusal.id or "", audio="", path="", reason=f"{name}:{refusal.line}: {refusal.reason}")
    if split is not None and split not in scan.splits:
        return
    rows = range(len(scan.line)) if split is None else scan.rows(split)
    with open(scan.path, "rb") as file:
        for row in rows:
            file.seek(int(scan.offset[row]))
            utterance = parse_utterance(file.readline())
            path = os.path.join(directory, utterance.audio)
            yield _Source(id=utterance.id, audio=utterance.audio, path=path)


def _load_all(sources: Iterator[_Source], progress: "_Progress", workers: int) -> Iterator[_Loaded]:
    """Loads a few files ahead in threads, in order; refusals go to `progress`."""
    waiting: deque[Future[_Loaded | _Source]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for source in sources:
            waiting.append(pool.submit(_load, source))
            if len(waiting) > 2 * workers:
                yield from _kept(waiting.popleft().result(), progress)
        while waiting:
            yield from _kept(waiting.popleft().result(), progress)


def _load(source: _Source) -> _Loaded | _Source:
    if source.reason is not None:
        return source
    try:
        waveform = load_waveform(source.path, WHISPER_RATE_HZ)
    except UserError as error:
        return dataclasses.replace(source, reason=str(error))
    if len(waveform) < WHISPER_HOP:
        return dataclasses.replace(source, reason=f"{source.path}: lasts under 10 ms, which gives no token")
    return _Loaded(source=source, waveform=waveform)


def _kept(result: _Loaded | _Source, progress: "_Progress") -> Iterator[_Loaded]:
    if isinstance(result, _Loaded):
        yield result
    else:
        progress.refuse(result)


def _comparing(
    items: Iterator[_Loaded], encoder: WaveformEncoder, comparisons: list[WindowComparison]
) -> Iterator[_Loaded]:
    for item in items:
        if len(item.waveform) // WHISPER_HOP > WINDOW_FRAMES:
            comparisons.append(compare_windows(encoder, item.waveform))
        yield item


def _total(comparisons: list[WindowComparison]) -> WindowComparison:
    return WindowComparison(
        num_different=sum(c.num_different for c in comparisons), num_tokens=sum(c.num_tokens for c in comparisons)
    )


class _Progress(contextlib.AbstractContextManager["_Progress"]):
    """Counts, with a bar on a terminal, else a line now and then: audio encoded, speed against real time, refusals."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._start = self._last = time.monotonic()
        self._bar = tqdm(desc="encode", unit="utt", disable=not sys.stderr.isatty())
        self.num_utterances = self.num_refused = self.num_tokens = 0
        self.seconds = 0.0
        self.first_reason = ""

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, seconds: float, num_tokens: int) -> None:
        """Counts one utterance."""
        self.num_utterances += 1
        self.num_tokens += num_tokens
        self.seconds += seconds
        now = time.monotonic()
        speed = f"{self.seconds / max(now - self._start, 1e-9):.0f}x realtime"
        self._bar.set_postfix_str(f"{speed}, {self.num_refused} refused", refresh=False)
        self._bar.update()
        if self._bar.disable and now - self._last > _SECONDS_BETWEEN_LINES:
            self._last = now
            line = f"encode: {self.num_utterances} utterances, {self.seconds / 3600:.2f} h, {speed}"
            print(line, file=sys.stderr, flush=True)

    def refuse(self, source: _Source) -> None:
        """Says why an input is left out, or stops there if strict."""
        reason = source.reason or ""
        if self._strict:
            raise UserError(reason)
        self.num_refused += 1
        self.first_reason = self.first_reason or reason
        tqdm.write(f"encode: refused {source.id or source.audio}: {reason}", file=sys.stderr)
