"""`cv2jax embed`: the audio of a manifest to speaker embeddings of a trained run; batched, all or nothing.

No batch reaches over the border of a block of rows, and blocks depend on the manifest alone: a machine that makes one part
of the blocks (`data/parts.py`) gets the vectors that one machine for all would get, bit by bit.
"""

import contextlib
import dataclasses
import itertools
import os
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from absl import logging
from jaxtyping import Float32
from tqdm import tqdm

from cv2jax.audio.fbank import FBANK_RATE_HZ
from cv2jax.audio.io import check_audio, convert_rate, read_audio
from cv2jax.config import UserError
from cv2jax.data.embeddings import check_embeddings_path, pack_embeddings, save_embeddings, unpack_embeddings
from cv2jax.data.manifest import ManifestScan, Utterance, parse_utterance, scan_manifest
from cv2jax.data.parts import Block, Counts, Facts, Part, PartSet, PartWriter, choose_block_rows, hash_file
from cv2jax.jobs.devices import local_mesh, name_devices
from cv2jax.jobs.parts import choose_part
from cv2jax.models.speaker_encoder.batching import MAX_SAMPLES, WaveformEmbedder
from cv2jax.models.speaker_encoder.model import MIN_SAMPLES
from cv2jax.tasks.encoders import load_speaker_encoder

_SHORTEST_MS = 1000 * MIN_SAMPLES / FBANK_RATE_HZ
_NAMED = 8  # speakers with a single utterance

_Vectors = tuple[list[str], list[str], np.ndarray]  # ids, speakers, embeddings [N E]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedResult:
    """What a run of `embed_manifest` did; `path` is what it wrote.

    Of a part, `num_kept` of `num_blocks` blocks were there already, `embedded_seconds` are those of the others, and speakers
    are not counted.
    """

    path: str
    num_utterances: int
    num_refused: int
    num_warned: int
    seconds: float  # of audio
    embedded_seconds: float
    wall_seconds: float
    num_programs: int  # compiled
    encoder: str
    num_speakers: int = 0
    num_single: int = 0  # speakers with one utterance
    num_blocks: int = 0
    num_kept: int = 0


def embed_manifest(
    run: str | os.PathLike[str],
    manifest: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    split: str | None = None,
    batch_seconds: float = 120.0,
    workers: int = 0,
    strict: bool = False,
    part: str | None = None,
    merge: bool = False,
    block_rows: int = 0,
) -> EmbedResult:
    """Writes the embeddings of a manifest's utterances and speakers to `out` (.npz; see `data/embeddings.py`).

    Utterances that cannot be read, are silent or shorter than 55 ms are named on stderr, counted and left out; `strict`
    stops at the first. What is clipped, overloaded or cut off is named and kept. Of audio beyond 5 minutes only these are
    heard. `split` keeps one split; `workers` 0 decodes in one thread a core. `out` appears when all is done, never half.

    `part` ("i/n", or "auto" under a launcher) makes one of n parts of the embeddings, of which `merge` makes `out`, byte for
    byte what it is without parts; of `run` it only writes the name down. Batches stay within blocks of `block_rows`.
    Raises UserError where nothing can be embedded, and for parts that are missing or do not belong together.
    """
    start = time.monotonic()
    check_embeddings_path(out)
    if workers < 0:
        raise UserError(f"workers={workers}: give a number of threads, or 0 for one a core")
    block_rows = choose_block_rows(block_rows, batch_seconds)
    chosen = choose_part(part, merge)
    asked: Facts = {"job": "embed", "split": split}
    if merge:
        return _merge_parts(run, out, asked | {"manifest": hash_file(manifest)}, start)
    scan = scan_manifest(manifest)
    if split is not None and split not in scan.splits:
        raise UserError(f"split={split}: {manifest} has no such split; it has {', '.join(scan.splits)}")
    encoder = load_speaker_encoder(run)
    mesh = local_mesh()
    embedder = WaveformEmbedder(
        encoder.config, encoder.params, encoder.model_state, batch_seconds=batch_seconds, mesh=mesh
    )
    log = _Log(strict)
    for refusal in scan.refused if chosen is None or chosen.number == 1 else ():
        log.refuse(_Refused(name=refusal.id or "", reason=f"{manifest}:{refusal.line}: {refusal.reason}"))
    rows = np.arange(len(scan.line)) if split is None else scan.rows(split)
    job = _Job(embedder, log, scan, rows, block_rows, workers or os.cpu_count() or 1)
    facts: Facts = {"encoder": encoder.hash, "step": encoder.step}
    if chosen is None:
        blocks = [vectors for _, vectors in job.blocks(range(job.num_blocks))]
        if not log.num_utterances:
            raise UserError(f"none of the {log.num_refused} utterances can be embedded; first: {log.first_reason}")
        return _save(run, out, blocks, facts, log.counts(), start, job)
    facts |= asked | {"manifest": hash_file(manifest), "batch_seconds": batch_seconds, "block_rows": block_rows}
    return _embed_part(job, out, chosen, facts | {"num_bad_lines": len(scan.refused)}, name_devices(mesh), start)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Refused:
    name: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loaded:
    utterance: Utterance
    waveform: Float32[np.ndarray, " W"]
    warnings: tuple[str, ...]


class _Job:
    """Rows of a manifest to vectors, block by block."""

    def __init__(
        self,
        embedder: WaveformEmbedder,
        log: "_Log",
        scan: ManifestScan,
        rows: np.ndarray,
        block_rows: int,
        workers: int,
    ) -> None:
        self.embedder, self.log = embedder, log
        self._scan, self._rows, self._block_rows, self._workers = scan, rows, block_rows, workers

    @property
    def num_blocks(self) -> int:
        """Of all rows."""
        return -(-len(self._rows) // self._block_rows)

    def blocks(self, numbers: Sequence[int]) -> Iterator[tuple[int, _Vectors]]:
        """(number, what is kept of it) of some blocks."""
        loaded = self._load_all(numbers)
        with contextlib.closing(loaded), tqdm(desc="embed", unit="utt", disable=not sys.stderr.isatty()) as bar:
            for number, items in itertools.groupby(loaded, key=lambda item: item[0]):
                kept: list[Utterance] = []
                vectors: dict[int, np.ndarray] = {}
                for place, vector in self.embedder(self._number((item for _, item in items), kept)):
                    vectors[place] = vector
                    bar.update()
                shape = (len(kept), self.embedder.config.embedding_dim)
                stacked = np.array([vectors[place] for place in range(len(kept))], np.float32).reshape(shape)
                yield number, ([item.id for item in kept], [item.speaker for item in kept], stacked)

    def _load_all(self, numbers: Sequence[int]) -> Generator[tuple[int, _Loaded | _Refused]]:
        """Loads a few utterances ahead in threads, in order."""
        directory = os.path.dirname(os.path.abspath(self._scan.path))
        waiting: deque[tuple[int, Future[_Loaded | _Refused]]] = deque()
        with ThreadPoolExecutor(self._workers) as pool, open(self._scan.path, "rb") as file:
            for number in numbers:
                for row in self._rows[number * self._block_rows : (number + 1) * self._block_rows]:
                    file.seek(int(self._scan.offset[row]))
                    waiting.append((number, pool.submit(_load, parse_utterance(file.readline()), directory)))
                    if len(waiting) > 2 * self._workers:
                        first, future = waiting.popleft()
                        yield first, future.result()
            for first, future in waiting:
                yield first, future.result()

    def _number(
        self, items: Iterator[_Loaded | _Refused], kept: list[Utterance]
    ) -> Iterator[tuple[int, Float32[np.ndarray, " W"]]]:
        """(position in `kept`, to which it appends the utterance, waveform) of what was loaded; the rest goes to the log."""
        for item in items:
            if isinstance(item, _Refused):
                self.log.refuse(item)
                continue
            self.log.keep(item)
            kept.append(item.utterance)
            yield len(kept) - 1, item.waveform


def _embed_part(
    job: _Job, out: str | os.PathLike[str], part: Part, facts: Facts, device: str, start: float
) -> EmbedResult:
    """Makes the blocks of a part that are not there yet."""
    writer = PartWriter(out, part, facts, job.num_blocks)
    missing, log = writer.missing(), job.log
    before = log.counts()  # of bad lines, which the facts count
    for number, vectors in job.blocks(missing):
        counts = log.counts()
        made = {name: value - before[name] for name, value in counts.items()}
        writer.add(number, Block(payload=pack_embeddings(*vectors), counts=made, device=device))
        before = counts
        if writer.complete():  # by another machine
            break
    num_blocks = len(part.blocks(job.num_blocks))
    result = _result(writer.path, writer.close(), facts, start, job)
    return dataclasses.replace(result, num_blocks=num_blocks, num_kept=num_blocks - len(missing))


def _merge_parts(run: str | os.PathLike[str], out: str | os.PathLike[str], asked: Facts, start: float) -> EmbedResult:
    parts = PartSet(out, asked)
    counts = parts.counts | {"refused": parts.counts["refused"] + int(parts.facts["num_bad_lines"] or 0)}
    if not counts["utterances"]:
        raise UserError(f"none of the {counts['refused']} utterances can be embedded; the parts said why")
    return _save(run, out, [unpack_embeddings(payload) for payload in parts], parts.facts, counts, start)


def _save(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    blocks: list[_Vectors],
    facts: Facts,
    counts: Counts,
    start: float,
    job: _Job | None = None,
) -> EmbedResult:
    """Writes the blocks' utterances and the means of speakers, and names speakers with a single utterance."""
    ids, speakers = ([name for block in blocks for name in block[column]] for column in (0, 1))
    metadata = {"encoder": facts["encoder"], "run": str(run), "step": facts["step"], "normalised": False}
    of_speaker = save_embeddings(out, ids, speakers, np.concatenate([block[2] for block in blocks]), metadata)
    single = [name for name, count in of_speaker.items() if count == 1]
    if single:
        shown = ", ".join(single[:_NAMED]) + (", …" if len(single) > _NAMED else "")
        logging.warning("%d speakers have one utterance, whose vector is their mean: %s", len(single), shown)
    result = _result(out, counts, facts, start, job)
    return dataclasses.replace(result, num_speakers=len(of_speaker), num_single=len(single))


def _result(path: str | os.PathLike[str], counts: Counts, facts: Facts, start: float, job: _Job | None) -> EmbedResult:
    return EmbedResult(
        path=str(path),
        num_utterances=int(counts.get("utterances", 0)),
        num_refused=int(counts.get("refused", 0)),
        num_warned=int(counts.get("warned", 0)),
        seconds=counts.get("seconds", 0.0),
        embedded_seconds=job.log.seconds if job else 0.0,
        wall_seconds=time.monotonic() - start,
        num_programs=len(job.embedder.shapes_used) if job else 0,
        encoder=str(facts["encoder"]),
    )


def _load(utterance: Utterance, directory: str) -> _Loaded | _Refused:
    path = os.path.join(directory, utterance.audio)
    try:
        clip = read_audio(path)
        warnings = {warning.kind: warning.message for warning in check_audio(clip)}
    except UserError as error:
        return _Refused(name=utterance.id, reason=str(error))
    if "silence" in warnings:
        return _Refused(name=utterance.id, reason=f"{path}: {warnings['silence']}; nobody speaks in it")
    waveform = convert_rate(clip, FBANK_RATE_HZ)
    if len(waveform) < MIN_SAMPLES:
        reason = f"lasts {1000 * clip.seconds:.3g} ms; an embedding takes {_SHORTEST_MS:.0f} ms or more"
        return _Refused(name=utterance.id, reason=f"{path}: {reason}")
    told = list(warnings.values())
    if len(waveform) > MAX_SAMPLES:
        told.append(f"lasts {clip.seconds:.0f} s, of which the first {MAX_SAMPLES // FBANK_RATE_HZ} are heard")
    return _Loaded(utterance=utterance, waveform=waveform, warnings=tuple(f"{path}: {text}" for text in told))


class _Log:
    """Counts, and says on stderr what is refused or odd."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self.num_utterances = self.num_refused = self.num_warned = 0
        self.seconds, self.first_reason = 0.0, ""

    def counts(self) -> Counts:
        """What was done so far."""
        return {
            "utterances": self.num_utterances,
            "refused": self.num_refused,
            "warned": self.num_warned,
            "seconds": self.seconds,
        }

    def refuse(self, item: _Refused) -> None:
        """Names an utterance that is left out, or stops there if strict."""
        if self._strict:
            raise UserError(item.reason)
        self.num_refused += 1
        self.first_reason = self.first_reason or item.reason
        tqdm.write(f"embed: refused {item.name}: {item.reason}", file=sys.stderr)

    def keep(self, item: _Loaded) -> None:
        """Counts an utterance, and names what is odd about it."""
        self.num_utterances += 1
        self.seconds += len(item.waveform) / FBANK_RATE_HZ
        self.num_warned += bool(item.warnings)
        for warning in item.warnings:
            tqdm.write(f"embed: warning of {item.utterance.id}: {warning}", file=sys.stderr)
