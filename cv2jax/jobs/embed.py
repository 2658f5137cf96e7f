"""`cv2jax embed`: the audio of a manifest to speaker embeddings of a trained run; batched, all or nothing."""

import dataclasses
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Float32
from tqdm import tqdm

from cv2jax.audio.fbank import FBANK_RATE_HZ
from cv2jax.audio.io import check_audio, convert_rate, read_audio
from cv2jax.config import MeshConfig, UserError
from cv2jax.data.embeddings import check_embeddings_path, save_embeddings
from cv2jax.data.manifest import ManifestScan, Utterance, parse_utterance, scan_manifest
from cv2jax.models.speaker_encoder.batching import MAX_SAMPLES, WaveformEmbedder
from cv2jax.models.speaker_encoder.model import MIN_SAMPLES
from cv2jax.parallel.mesh import make_mesh
from cv2jax.tasks.encoders import load_speaker_encoder

_SHORTEST_MS = 1000 * MIN_SAMPLES / FBANK_RATE_HZ
_NAMED = 8  # speakers with a single utterance


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedResult:
    """What a run of `embed_manifest` did."""

    num_utterances: int
    num_speakers: int
    num_single: int  # speakers with one utterance
    num_refused: int
    num_warned: int
    seconds: float  # of audio
    wall_seconds: float
    num_programs: int  # compiled
    encoder: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loaded:
    utterance: Utterance
    waveform: Float32[np.ndarray, " W"]
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Refused:
    name: str
    reason: str


def embed_manifest(
    run: str | os.PathLike[str],
    manifest: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    split: str | None = None,
    batch_seconds: float = 120.0,
    workers: int = 0,
    strict: bool = False,
) -> EmbedResult:
    """Writes the embeddings of a manifest's utterances and speakers to `out` (.npz; see `data/embeddings.py`).

    Utterances that cannot be read, are silent or shorter than 55 ms are named on stderr, counted and left out; `strict`
    stops at the first. What is clipped, overloaded or cut off is named and kept. Of audio beyond 5 minutes only these are
    heard. `split` keeps one split; `workers` 0 decodes in one thread a core. `out` appears when all is done, never half.
    Raises UserError where nothing can be embedded.
    """
    start = time.monotonic()
    check_embeddings_path(out)
    if workers < 0:
        raise UserError(f"workers={workers}: give a number of threads, or 0 for one a core")
    scan = scan_manifest(manifest)
    if split is not None and split not in scan.splits:
        raise UserError(f"split={split}: {manifest} has no such split; it has {', '.join(scan.splits)}")
    encoder = load_speaker_encoder(run)
    embedder = WaveformEmbedder(
        encoder.config, encoder.params, encoder.model_state, batch_seconds=batch_seconds, mesh=_accelerators()
    )
    log = _Log(strict)
    for refusal in scan.refused:
        log.refuse(_Refused(name=refusal.id or "", reason=f"{manifest}:{refusal.line}: {refusal.reason}"))
    kept: list[Utterance] = []
    vectors: dict[int, np.ndarray] = {}
    waveforms = _number(_load_all(scan, split, workers or os.cpu_count() or 1), log, kept)
    with tqdm(desc="embed", unit="utt", disable=not sys.stderr.isatty()) as bar:
        for number, vector in embedder(waveforms):
            vectors[number] = vector
            bar.update()
    if not kept:
        raise UserError(f"none of the {log.num_refused} utterances can be embedded; first: {log.first_reason}")
    embeddings = np.stack([vectors[number] for number in range(len(kept))])
    metadata = {"encoder": encoder.hash, "run": str(run), "step": encoder.step, "normalised": False}
    ids, speakers = [item.id for item in kept], [item.speaker for item in kept]
    counts = save_embeddings(out, ids, speakers, embeddings, metadata)
    single = [name for name, count in counts.items() if count == 1]
    if single:
        shown = ", ".join(single[:_NAMED]) + (", …" if len(single) > _NAMED else "")
        logging.warning("%d speakers have one utterance, whose vector is their mean: %s", len(single), shown)
    return EmbedResult(
        num_utterances=len(kept),
        num_speakers=len(counts),
        num_single=len(single),
        num_refused=log.num_refused,
        num_warned=log.num_warned,
        seconds=log.seconds,
        wall_seconds=time.monotonic() - start,
        num_programs=len(embedder.shapes_used),
        encoder=encoder.hash,
    )


def _accelerators() -> Mesh | None:
    """All devices of this host share the rows; on a CPU one device takes every core anyway."""
    devices = jax.local_devices()
    return None if devices[0].platform == "cpu" or len(devices) == 1 else make_mesh(MeshConfig(), devices)


def _load_all(scan: ManifestScan, split: str | None, workers: int) -> Iterator[_Loaded | _Refused]:
    """Loads a few utterances ahead in threads, in order."""
    directory = os.path.dirname(os.path.abspath(scan.path))
    rows = range(len(scan.line)) if split is None else scan.rows(split)
    waiting: deque[Future[_Loaded | _Refused]] = deque()
    with ThreadPoolExecutor(workers) as pool, open(scan.path, "rb") as file:
        for row in rows:
            file.seek(int(scan.offset[row]))
            waiting.append(pool.submit(_load, parse_utterance(file.readline()), directory))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


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


def _number(
    items: Iterator[_Loaded | _Refused], log: "_Log", kept: list[Utterance]
) -> Iterator[tuple[int, Float32[np.ndarray, " W"]]]:
    """(position in `kept`, to which it appends the utterance, waveform) of what was loaded; the rest goes to `log`."""
    for item in items:
        if isinstance(item, _Refused):
            log.refuse(item)
            continue
        log.keep(item)
        kept.append(item.utterance)
        yield len(kept) - 1, item.waveform


class _Log:
    """Counts, and says on stderr what is refused or odd."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self.num_refused = self.num_warned = 0
        self.seconds, self.first_reason = 0.0, ""

    def refuse(self, item: _Refused) -> None:
        """Names an utterance that is left out, or stops there if strict."""
        if self._strict:
            raise UserError(item.reason)
        self.num_refused += 1
        self.first_reason = self.first_reason or item.reason
        tqdm.write(f"embed: refused {item.name}: {item.reason}", file=sys.stderr)

    def keep(self, item: _Loaded) -> None:
        """Counts an utterance, and names what is odd about it."""
        self.seconds += len(item.waveform) / FBANK_RATE_HZ
        self.num_warned += bool(item.warnings)
        for warning in item.warnings:
            tqdm.write(f"embed: warning of {item.utterance.id}: {warning}", file=sys.stderr)
