"""`cv2jax manifest`: writes the manifest of a corpus that lies in its publisher's layout."""

import dataclasses
import os
import pathlib
from collections import Counter
from collections.abc import Iterator

from tqdm import tqdm

from cv2jax.config import UserError
from cv2jax.data.importers import IMPORTERS, ImportOptions
from cv2jax.data.manifest import Utterance, scan_manifest, write_manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManifestSummary:
    """Utterances per split, and how many have no text."""

    splits: dict[str, int]
    num_without_text: int


def make_manifest(
    corpus_format: str,
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    language: str | None = None,
    held_out: float = 0.01,
) -> ManifestSummary:
    """Writes `out` (JSONL) from a corpus directory in one of the `IMPORTERS`' formats, all or nothing.

    Audio below the manifest's own directory is named relative to it, so that both can move together; other audio is
    named by its absolute path. Raises UserError naming file and line of what is broken, or where nothing was found.
    """
    directory, out = pathlib.Path(directory), pathlib.Path(out)
    if corpus_format not in IMPORTERS:
        raise UserError(f"format {corpus_format!r} is not known; choose one of {', '.join(IMPORTERS)}")
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    if out.is_dir():
        raise UserError(f"{out}: is a directory; give the file that is to hold the manifest")
    if not 0 <= held_out < 1:
        raise UserError(f"held_out={held_out}: give a share from 0 up to, not including, 1")
    splits: Counter[str] = Counter()
    num_without_text = 0

    def convert() -> Iterator[Utterance]:
        nonlocal num_without_text
        found = IMPORTERS[corpus_format](directory, ImportOptions(language=language, held_out=held_out))
        for utterance in tqdm(found, desc="manifest", unit="utt", delay=3, leave=False, disable=None):
            splits[utterance.split] += 1
            num_without_text += utterance.text is None
            yield dataclasses.replace(utterance, audio=_place(directory / utterance.audio, out.parent))
        if not splits:
            raise UserError(f"{directory}: no utterance found; is the format {corpus_format!r} right?")

    write_manifest(out, convert())
    scan_manifest(out, strict=True)
    return ManifestSummary(splits=dict(splits), num_without_text=num_without_text)


def _place(audio: pathlib.Path, base: pathlib.Path) -> str:
    """Returns `audio` relative to `base` where it lies below, else absolute."""
    audio, base = pathlib.Path(os.path.abspath(audio)), pathlib.Path(os.path.abspath(base))
    return str(audio.relative_to(base)) if audio.is_relative_to(base) else str(audio)
