"""`cv2jax encode`: audio of any length to the speech tokens of a trained run; streaming, batched, all or nothing.

Threads decode a few files ahead, the device works on full batches of few static shapes (see
`models/speech_tokenizer/tokenize.py`, which also says how audio beyond 30 s is cut), and tokens are written in the order
of the input. Memory holds a few batches and the longest file (about 65 MB a minute of it while its log-mel is computed).

No batch reaches over the border of a block of rows, and blocks depend on the input alone: a machine that makes one part of
the blocks (`data/parts.py`) runs the batches that one machine for all would run, and gets the same tokens bit by bit.
"""

import contextlib
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int32
from tqdm import tqdm

from cv2jax.audio.mel import WHISPER_HOP, WHISPER_RATE_HZ
from cv2jax.config import UserError
from cv2jax.data.parts import Block, Counts, Facts, Part, PartSet, PartWriter, choose_block_rows, hash_file
from cv2jax.data.tokens import METADATA, TokenWriter, check_token_path, token_line
from cv2jax.jobs.devices import local_mesh, name_devices
from cv2jax.jobs.encode_inputs import Inputs, Loaded, Source, load_all
from cv2jax.jobs.parts import choose_part
from cv2jax.models.speech_tokenizer.tokenize import (
    WINDOW_FRAMES,
    WaveformEncoder,
    WindowComparison,
    compare_windows,
    make_encoder,
)
from cv2jax.tasks.encoders import load_tokenizer

_SECONDS_BETWEEN_LINES = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeResult:
    """What a run of `encode_audio` did; `path` is what it wrote, `comparison` None unless asked for.

    Of a part, `num_kept` of `num_blocks` blocks were there already; `encoded_seconds` are those of the others.
    """

    path: str
    num_utterances: int
    num_refused: int
    num_tokens: int
    seconds: float  # of audio
    encoded_seconds: float
    wall_seconds: float
    num_programs: int  # compiled
    tokenizer: str
    comparison: WindowComparison | None = None
    num_compared: int = 0
    num_blocks: int = 0
    num_kept: int = 0


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
    part: str | None = None,
    merge: bool = False,
    block_rows: int = 0,
) -> EncodeResult:
    """Writes the speech tokens of `inputs` (audio files and .jsonl manifests) to `out` (.jsonl or .npz), in their order.

    Bad inputs are named on stderr, counted and left out; `strict` stops at the first. `split` keeps one split of the
    manifests; `workers` 0 decodes in one thread a core. `compare_one_piece` also counts the tokens that windows change
    in the first 60 s of each file beyond 30 s. `out` appears when all is done, never half.

    `part` ("i/n", or "auto" under a launcher) makes one of n parts of one manifest's tokens, of which `merge` makes `out`,
    byte for byte what it is without parts; it does not look at `run`. Batches stay within blocks of `block_rows`.
    Raises UserError where nothing can be encoded, and for parts that are missing or do not belong together.
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
    chosen = choose_part(part, merge)
    if (chosen or merge) and (len(inputs) != 1 or not inputs[0].endswith(".jsonl") or compare_one_piece):
        raise UserError("--part and --merge take one .jsonl manifest as the only input, and no --compare_one_piece")
    if merge:
        return _merge_parts(inputs[0], out, split, start)
    block_rows = choose_block_rows(block_rows, batch_seconds)
    rows = Inputs(inputs, split, block_rows)
    tokenizer = load_tokenizer(run)
    mesh = local_mesh()
    encoder = make_encoder(
        tokenizer.config,
        tokenizer.params,
        tokenizer.model_state,
        batch_seconds=batch_seconds,
        compute_dtype=compute_dtype,
        mesh=mesh,
    )
    made_by: Facts = {
        "tokenizer": tokenizer.hash,
        "num_codes": tokenizer.config.num_codes,
        "compute_dtype": compute_dtype,
    }
    options: Facts = {"batch_seconds": batch_seconds, "block_rows": block_rows}
    with _Progress(strict) as progress:
        job = _Job(encoder, progress, workers or os.cpu_count() or 1, out, name_devices(mesh))
        if chosen is None:
            return _encode_whole(job, rows, made_by, start, compare_one_piece)
        facts = _asked_for(inputs[0], out, split) | made_by | options
        return _encode_part(job, rows, chosen, facts, start)


def _asked_for(manifest: str, out: str | os.PathLike[str], split: str | None) -> Facts:
    """What a command says about parts without a look at the run."""
    return {"job": "encode", "manifest": hash_file(manifest), "split": split, "suffix": os.path.splitext(out)[1]}


def _metadata(facts: Facts) -> dict[str, str | int | float | None]:
    """Of an npz."""
    made_by = {name: facts[name] for name in ("num_codes", "compute_dtype")}
    return {"version": 1, "tokenizer": facts["tokenizer"], "rate_hz": 25, **made_by}


class _Job:
    """Sources to tokens, block by block."""

    def __init__(
        self,
        encoder: WaveformEncoder,
        progress: "_Progress",
        workers: int,
        out: str | os.PathLike[str],
        device: str,
    ) -> None:
        self.encoder, self.progress, self.out, self.device = encoder, progress, out, device
        self._workers, self._reserved = workers, METADATA if str(out).endswith(".npz") else None
        self.comparisons: list[WindowComparison] | None = None

    def blocks(
        self, sources: Iterator[Source]
    ) -> Iterator[tuple[int, Iterator[tuple[Loaded, Int32[np.ndarray, " L"]]]]]:
        """(number of a block, its utterances and their tokens), each to be used up before the next is asked for."""
        loaded = load_all(sources, self._workers, self._reserved)
        with contextlib.closing(loaded):
            for number, items in itertools.groupby(loaded, key=lambda item: item.block):
                yield number, self._encode(items)

    def _encode(self, items: Iterator[Loaded | Source]) -> Iterator[tuple[Loaded, Int32[np.ndarray, " L"]]]:
        for item, speech_tokens in self.encoder.encode_stream((item, item.waveform) for item in self._keep(items)):
            self.progress.add(len(item.waveform) / WHISPER_RATE_HZ, len(speech_tokens))
            yield item, speech_tokens

    def _keep(self, items: Iterator[Loaded | Source]) -> Iterator[Loaded]:
        for item in items:
            if isinstance(item, Source):
                self.progress.refuse(item)
                continue
            if self.comparisons is not None and len(item.waveform) // WHISPER_HOP > WINDOW_FRAMES:
                self.comparisons.append(compare_windows(self.encoder, item.waveform))
            yield item


def _encode_whole(job: _Job, rows: Inputs, made_by: Facts, start: float, compare: bool) -> EncodeResult:
    progress = job.progress
    job.comparisons = [] if compare else None
    with TokenWriter(job.out, _metadata(made_by)) as writer:
        for source in rows.bad_lines():
            progress.refuse(source)
        for _, block in job.blocks(rows.read()):
            for item, speech_tokens in block:
                writer.write(
                    item.source.id,
                    item.source.audio,
                    speech_tokens,
                    num_frames=len(item.waveform) // WHISPER_HOP,
                    seconds=len(item.waveform) / WHISPER_RATE_HZ,
                )
        if not progress.num_utterances:
            raise UserError(f"none of the {progress.num_refused} inputs can be encoded; first: {progress.first_reason}")
    result = _result(job.out, progress.counts(), made_by, start, job)
    if job.comparisons is None:
        return result
    return dataclasses.replace(result, comparison=_total(job.comparisons), num_compared=len(job.comparisons))


def _encode_part(job: _Job, rows: Inputs, part: Part, facts: Facts, start: float) -> EncodeResult:
    """Makes the blocks of a part that are not there yet."""
    progress = job.progress
    bad_lines = list(rows.bad_lines())
    writer = PartWriter(job.out, part, facts | {"num_bad_lines": len(bad_lines)}, rows.num_blocks)
    for source in bad_lines if part.number == 1 else []:
        progress.refuse(source)
    missing = writer.missing()
    for number, block in job.blocks(rows.read_blocks(missing)):
        if writer.complete():  # by another machine
            break
        before, lines = progress.counts(), []
        for item, speech_tokens in block:
            line = token_line(
                item.source.id,
                item.source.audio,
                speech_tokens,
                num_frames=len(item.waveform) // WHISPER_HOP,
                seconds=len(item.waveform) / WHISPER_RATE_HZ,
                tokenizer=str(facts["tokenizer"]),
            )
            lines.append(line)
        counts = {name: value - before[name] for name, value in progress.counts().items()}
        writer.add(number, Block(payload=b"".join(lines), counts=counts, device=job.device))
    num_blocks = len(part.blocks(rows.num_blocks))
    result = _result(writer.path, writer.close(), facts, start, job)
    return dataclasses.replace(result, num_blocks=num_blocks, num_kept=num_blocks - len(missing))


def _merge_parts(manifest: str, out: str | os.PathLike[str], split: str | None, start: float) -> EncodeResult:
    parts = PartSet(out, _asked_for(manifest, out, split))
    counts = parts.counts | {"refused": parts.counts["refused"] + int(parts.facts["num_bad_lines"] or 0)}
    if not counts["utterances"]:
        raise UserError(f"none of the {counts['refused']} inputs can be encoded; the parts said why")
    with TokenWriter(out, _metadata(parts.facts)) as writer:
        for lines in parts:
            writer.write_lines(lines)
    return _result(out, counts, parts.facts, start)


def _result(
    path: str | os.PathLike[str], counts: Counts, made_by: Facts, start: float, job: _Job | None = None
) -> EncodeResult:
    return EncodeResult(
        path=str(path),
        num_utterances=int(counts.get("utterances", 0)),
        num_refused=int(counts.get("refused", 0)),
        num_tokens=int(counts.get("tokens", 0)),
        seconds=counts.get("seconds", 0.0),
        encoded_seconds=job.progress.seconds if job else 0.0,
        wall_seconds=time.monotonic() - start,
        num_programs=len(job.encoder.shapes_used) if job else 0,
        tokenizer=str(made_by["tokenizer"]),
    )


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

    def counts(self) -> Counts:
        """What was done so far."""
        return {
            "utterances": self.num_utterances,
            "refused": self.num_refused,
            "tokens": self.num_tokens,
            "seconds": self.seconds,
        }

    def refuse(self, source: Source) -> None:
        """Says why an input is left out, or stops there if strict."""
        reason = source.reason or ""
        if self._strict:
            raise UserError(reason)
        self.num_refused += 1
        self.first_reason = self.first_reason or reason
        tqdm.write(f"encode: refused {source.id or source.audio}: {reason}", file=sys.stderr)
