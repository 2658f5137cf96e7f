"""The recordings that `cv2jax copysynth` is given: files, directories and manifests, in their order."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence

from cv2jax.config import UserError
from cv2jax.data.manifest import parse_utterance, scan_manifest
from cv2jax.data.subset import spread_rows

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recording:
    """One input: its id, where its audio is, and what is said in it, if a manifest tells; `reason`: refused already."""

    id: str
    path: str
    text: str | None = None
    reason: str | None = None


def list_recordings(
    inputs: Sequence[str], *, split: str = "", speakers: Sequence[str] = (), limit: int = 0
) -> list[Recording]:
    """Every recording of the inputs; of manifests only those of `split` and `speakers`; `limit` spread evenly, 0: all.

    Directories give their audio files, those below too, by name. Raises UserError for inputs that hold none.
    """
    if not inputs:
        raise UserError("no inputs: give audio files, a directory or a .jsonl manifest after RUN")
    if limit < 0:
        raise UserError(f"limit={limit}: give a number of recordings, or 0 for all")
    found = [
        recording
        for name in inputs
        for recording in (_of_manifest(name, split, speakers) if name.endswith(".jsonl") else _of_path(name))
    ]
    if not found:
        asked = " and ".join(
            filter(None, [f"split {split!r}" * bool(split), f"speakers {', '.join(speakers)}" * bool(speakers)])
        )
        raise UserError(f"{', '.join(inputs)}: no recording{f' of {asked}' if asked else ''}; give other inputs")
    return [found[row] for row in spread_rows(len(found), limit).tolist()]


def _of_path(name: str) -> Iterator[Recording]:
    if not os.path.isdir(name):
        yield Recording(id=pathlib.Path(name).stem, path=name)
        return
    for path in sorted(pathlib.Path(name).rglob("*")):
        if path.suffix.lower() in AUDIO_SUFFIXES:
            yield Recording(id=path.stem, path=str(path))


def _of_manifest(name: str, split: str, speakers: Sequence[str]) -> Iterator[Recording]:
    scan, directory = scan_manifest(name), os.path.dirname(os.path.abspath(name))
    if split and split not in scan.splits:
        raise UserError(f"{name}: has no split {split!r}; it has {', '.join(scan.splits)}")
    for refusal in scan.refused:
        yield Recording(id=refusal.id or "", path="", reason=f"{name}:{refusal.line}: {refusal.reason}")
    with open(scan.path, "rb") as file:
        for row in scan.rows(split) if split else range(len(scan.line)):
            file.seek(int(scan.offset[row]))
            utterance = parse_utterance(file.readline())
            if not speakers or utterance.speaker in speakers:
                path = os.path.join(directory, utterance.audio)
                yield Recording(id=utterance.id, path=path, text=utterance.text)
