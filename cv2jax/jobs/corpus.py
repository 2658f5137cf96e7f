"""Make the embedded corpus: sentences of our own, spoken by espeak-ng, with a manifest and the JSGF of the slot grammar.

What utterance i of a (language, split) says, and in whose voice, is a pure function of the configuration and i; how many
there are follows from their measured lengths, in order. So the corpus is byte-identical for any number of workers, and a run
that was killed goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from soundfile import LibsndfileError
from tqdm import tqdm

from cv2jax.config import UserError
from cv2jax.jobs import espeak
from cv2jax.jobs.corpus_plan import CorpusConfig, Utterance, plan_utterances
from cv2jax.jobs.corpus_worker import SpeakTask, follow_parent, speak_to_file
from cv2jax.text.sentences import SPLITS, format_jsgf, list_sentences

FORMAT_VERSION = 1
_LONG_UTTERANCE_SECONDS = 3.5  # sizes the first round so that it speaks little too much; no result depends on it
_OWN_FILE = re.compile(r"[a-z]+-(train|test)-\d{6,}\.flac(\.\d+\.tmp)?")


@dataclass(frozen=True, kw_only=True)
class CorpusSummary:
    """What a finished corpus holds; seconds keyed by "language/split", by speaker and by "language/kind"."""

    num_utterances: int
    seconds: float
    seconds_by_split: dict[str, float]
    seconds_by_speaker: dict[str, float]
    seconds_by_kind: dict[str, float]
    num_sentences: dict[str, int]
    num_repeated: dict[str, int]
    characters_per_second: dict[str, float]
    was_complete: bool

    def format(self) -> str:
        """Format the summary as lines for people."""
        lines = [f"{self.num_utterances} utterances, {self.seconds / 3600:.3f} hours"]
        for name, seconds in self.seconds_by_split.items():
            line = f"  {name}: {seconds / 3600:.3f} h, {self.num_sentences[name]} distinct sentences"
            if self.num_repeated[name]:
                line += f"; {self.num_repeated[name]} utterances repeat one of them (more hours than sentences)"
            lines.append(line)
        kinds = ", ".join(f"{name} {seconds / 3600:.3f} h" for name, seconds in self.seconds_by_kind.items())
        lines.append(f"  kinds: {kinds}")
        speakers = ", ".join(f"{name} {seconds / 3600:.4f}" for name, seconds in self.seconds_by_speaker.items())
        lines.append(f"  hours by speaker: {speakers}")
        return "\n".join(lines)


def make_corpus(
    directory: str | Path, config: CorpusConfig, *, num_workers: int = 0, show_progress: bool = True
) -> CorpusSummary:
    """Speak a corpus into `directory`, or finish or confirm one that the same configuration began there.

    `num_workers` processes speak (0: one for each processor, 1: this process). Raises UserError for a bad configuration,
    a missing espeak-ng, or a directory that holds anything else.
    """
    config.validate()
    if num_workers < 0:
        raise UserError(f"--workers {num_workers}: give 0 (one for each processor) or more")
    root = Path(directory)
    _claim_directory(root, config)
    was_complete = (root / "manifest.jsonl").is_file()
    target = config.hours * 3600
    rows: list[tuple[Utterance, int]] = []
    bar = tqdm(total=round(target), unit="s speech", disable=None if show_progress else True, desc="corpus")
    try:
        with _open_speakers(num_workers or os.cpu_count() or 1) as speak_all, bar:
            for language in config.languages:
                for split in SPLITS:
                    share = config.held_out_share if split == "test" else 1 - config.held_out_share
                    seconds = target * share / len(config.languages)
                    rows += _fill_split(root, config, language, split, seconds, speak_all, bar)
        return _finish(root, config, rows, was_complete)
    except (OSError, LibsndfileError, BrokenProcessPool) as error:  # a full disk, a worker killed for its memory
        raise UserError(
            f"the corpus in {root} is not finished ({error}): mend that and give the same command again"
        ) from error


def _fill_split(
    root: Path,
    config: CorpusConfig,
    language: str,
    split: str,
    seconds: float,
    speak_all: Callable[[list[SpeakTask]], Iterator[int]],
    bar: Any,
) -> list[tuple[Utterance, int]]:
    """Speak rounds of utterances until their measured lengths sum to `seconds`; what a round spoke too much is dropped."""
    plan = plan_utterances(config, language, split)
    fewest = config.num_voices if split == "train" else 1
    rows: list[tuple[Utterance, int]] = []
    total, mean = 0.0, _LONG_UTTERANCE_SECONDS
    while total < seconds or len(rows) < fewest:
        wanted = max(math.ceil((seconds - total) / mean), fewest - len(rows), 1)
        batch = [next(plan) for _ in range(wanted)]
        tasks = [SpeakTask(path=str(_audio_path(root, u)), text=u.text, settings=u.speaker.settings) for u in batch]
        for utterance, num_samples in zip(batch, speak_all(tasks), strict=True):
            if total < seconds or len(rows) < fewest:
                rows.append((utterance, num_samples))
                total += num_samples / espeak.RATE_HZ
                bar.update(round(total) - round(total - num_samples / espeak.RATE_HZ))
        mean = total / len(rows)
    return rows


def _finish(root: Path, config: CorpusConfig, rows: list[tuple[Utterance, int]], was_complete: bool) -> CorpusSummary:
    """Drop files that the manifest does not name, write the grammar, the summary and, last, the manifest."""
    kept = {_audio_path(root, utterance).name for utterance, _ in rows}
    for entry in os.scandir(root / "audio"):
        if entry.name not in kept and _OWN_FILE.fullmatch(entry.name):  # never a file that is not ours
            os.unlink(entry.path)
    if "en" in config.languages:
        _write_atomically(root / "grammar.jsgf", format_jsgf())
    summary = _summarise(rows, was_complete)
    fields = {k: v for k, v in dataclasses.asdict(summary).items() if k != "was_complete"}
    _write_atomically(root / "summary.json", json.dumps(fields, indent=2) + "\n")
    lines = []
    for utterance, num_samples in rows:
        row = {
            "id": utterance.id,
            "audio": f"audio/{utterance.id}.flac",
            "text": utterance.text,
            "speaker": utterance.speaker.name,
            "language": utterance.language,
            "split": utterance.split,
            "kind": utterance.kind,
            "seconds": round(num_samples / espeak.RATE_HZ, 4),
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    _write_atomically(root / "manifest.jsonl", "".join(lines))
    return summary


def _summarise(rows: list[tuple[Utterance, int]], was_complete: bool) -> CorpusSummary:
    by_split, by_speaker, by_kind, spoken = (defaultdict[str, float](float) for _ in range(4))
    texts: dict[str, set[str]] = {}
    letters, counts = Counter[str](), Counter[str]()
    for utterance, num_samples in rows:
        seconds = num_samples / espeak.RATE_HZ
        split = f"{utterance.language}/{utterance.split}"
        by_split[split] += seconds
        by_speaker[utterance.speaker.name] += seconds
        by_kind[f"{utterance.language}/{utterance.kind}"] += seconds
        letters[utterance.language] += len(utterance.text)
        spoken[utterance.language] += seconds
        texts.setdefault(split, set()).add(utterance.text)
        counts[split] += 1
    return CorpusSummary(
        num_utterances=len(rows),
        seconds=round(sum(by_split.values()), 3),
        seconds_by_split={name: round(seconds, 3) for name, seconds in by_split.items()},
        seconds_by_speaker={name: round(seconds, 3) for name, seconds in sorted(by_speaker.items())},
        seconds_by_kind={name: round(seconds, 3) for name, seconds in by_kind.items()},
        num_sentences={name: len(distinct) for name, distinct in texts.items()},
        num_repeated={name: counts[name] - len(distinct) for name, distinct in texts.items()},
        characters_per_second={name: round(letters[name] / spoken[name], 2) for name in letters},
        was_complete=was_complete,
    )


def _describe(config: CorpusConfig) -> dict[str, Any]:
    """Everything the bytes of a corpus depend on, as JSON types."""
    every = [list_sentences(language, kind) for language in config.languages for kind in config.weigh_kinds(language)]
    described: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "config": dataclasses.asdict(config),
        "rate_hz": espeak.RATE_HZ,
    }
    described["espeak_ng"] = espeak.read_version()
    described["sentences_sha256"] = hashlib.sha256(json.dumps(every).encode()).hexdigest()
    return json.loads(json.dumps(described))


def _claim_directory(root: Path, config: CorpusConfig) -> None:
    """Make `root`'s folders and write corpus.json, or check that the same configuration wrote it before."""
    described = _describe(config)
    path = root / "corpus.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if found is None:
            if root.is_dir() and any(root.iterdir()):
                raise UserError(f"{root} is not empty and holds no corpus.json: give another OUT or empty it")
            (root / "audio").mkdir(parents=True, exist_ok=True)
            _write_atomically(path, json.dumps(described, indent=2) + "\n")
            return
    except (OSError, ValueError) as error:
        raise UserError(f"cannot make a corpus in {root}: {error}") from error
    before, now = _flatten(found), _flatten(described)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        told = ", ".join(
            f"{key} {json.dumps(before.get(key))} there, {json.dumps(now.get(key))} asked" for key in changed
        )
        raise UserError(f"{root} holds a corpus of another configuration ({told}): give another OUT or delete it")
    (root / "audio").mkdir(exist_ok=True)


def _flatten(described: Any) -> dict[str, Any]:
    if not isinstance(described, dict):
        return {"corpus.json": described}
    config = described.get("config")
    return {k: v for k, v in described.items() if k != "config"} | (config if isinstance(config, dict) else {})


def _audio_path(root: Path, utterance: Utterance) -> Path:
    return root / "audio" / f"{utterance.id}.flac"


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


@contextmanager
def _open_speakers(num_workers: int) -> Iterator[Callable[[list[SpeakTask]], Iterator[int]]]:
    """Yield a function that speaks tasks in order, in this process (1 worker) or in spawned ones."""
    if num_workers == 1:
        yield lambda tasks: map(speak_to_file, tasks)
        return
    pool = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=follow_parent)
    try:
        yield lambda tasks: pool.map(speak_to_file, tasks, chunksize=8)
    finally:
        pool.shutdown(cancel_futures=True)
