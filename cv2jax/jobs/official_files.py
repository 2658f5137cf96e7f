"""The files of an official model directory, and what a model directory of ours keeps of the one that it came from.

MODEL/official/        files as they were: what we do not understand, or cannot say again bit for bit
MODEL/official.json    which stages they belong to
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence

from cv2jax.config import UserError
from cv2jax.convert.official import FLOW_FILE, HIFT_FILE, LLM_FILE
from cv2jax.files import printable
from cv2jax.train.run import load_run

YAML, BACKBONE, SPEAKERS = "cosyvoice2.yaml", "CosyVoice-BlankEN", "spk2info.pt"
TOKENIZER, SPEAKER_ENCODER = "speech_tokenizer_v2.onnx", "campplus.onnx"
ESTIMATOR = "flow.decoder.estimator.fp32.onnx"
FILE_OF = {
    "hift_vocoder": HIFT_FILE,  # small ones first: what is wrong with them shows soon
    "flow_matching": FLOW_FILE,
    "text_speech_lm": LLM_FILE,
    "speech_tokenizer": TOKENIZER,
    "speaker_encoder": SPEAKER_ENCODER,
}
REQUIRED = (YAML, *FILE_OF.values(), f"{BACKBONE}/config.json")
KEPT, ABOUT = "official", "official.json"
FACT = "official"  # of a run that is one of these files, unchanged: its fingerprint
# Made of a stage's weights, and not checked for staleness by anything upstream (spec/official.md 1.5): start → stage.
_DERIVED = {
    "flow.": "flow_matching",
    "vllm/": "text_speech_lm",
    "llm.": "text_speech_lm",
    "hift.": "hift_vocoder",
    "speech_tokenizer_v2.": "speech_tokenizer",
    "campplus.": "speaker_encoder",
}


def derived_from(name: str) -> str | None:
    """The stage whose weights a file (relative path) was made of; None: of none."""
    return next((stage for start, stage in _DERIVED.items() if name.startswith(start)), None)


def list_files(directory: pathlib.Path) -> list[str]:
    """All files under a directory, links followed, as sorted relative paths; nothing whose name starts with a dot."""
    return sorted(path.relative_to(directory).as_posix() for path in _walk(directory, frozenset()))


def _walk(place: pathlib.Path, above: frozenset[tuple[int, int]]) -> Iterator[pathlib.Path]:
    about = place.stat()
    if (here := (about.st_dev, about.st_ino)) in above:  # a link back up
        return
    for path in place.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path, above | {here})
        elif path.is_file():
            yield path


def fingerprint(path: pathlib.Path) -> str:
    """Hex digits that tell a file from others: of a `.pt` by the checksums inside, of another by all its bytes."""
    digest = hashlib.sha256()
    if path.suffix == ".pt":
        try:
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    name = entry.filename.partition("/")[2]  # the first folder is called like the file was
                    digest.update(f"{name} {entry.CRC} {entry.file_size}\n".encode())
        except (zipfile.BadZipFile, UnicodeError) as error:
            raise UserError(f"{path}: is damaged ({error}); copy it again") from None
        return digest.hexdigest()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class KeptFiles:
    """What a model directory has of the official one it came from; of another one nothing."""

    place: pathlib.Path  # MODEL/official
    fingerprints: Mapping[str, str]  # stage → of its file there

    @property
    def names(self) -> list[str]:
        """The files, relative."""
        return list_files(self.place) if self.fingerprints else []

    def find(self, name: str) -> pathlib.Path | None:
        """A kept file or folder."""
        path = self.place / name
        return path if self.fingerprints and path.exists() else None

    def is_unchanged(self, stage: str, run: pathlib.Path | None) -> bool:
        """Whether a stage is what the official file had: the run is the import's own, or there is none beside the file."""
        if stage not in self.fingerprints:
            return False
        if run is None:
            return self.find(FILE_OF[stage]) is not None
        return load_run(run)["facts"].get(FACT) == self.fingerprints[stage]


def keep_files(directory: pathlib.Path, names: Sequence[str], model: pathlib.Path, prints: Mapping[str, str]) -> None:
    """Copies files of an official directory into a model directory, with the fingerprints of the stages."""
    for name in names:
        target = model / KEPT / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(directory / name, target)
    about = {"version": 1, "source": printable(directory.resolve()), "fingerprints": dict(prints)}
    (model / ABOUT).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_kept(model: pathlib.Path) -> KeptFiles:
    """What `keep_files` kept in a model directory; UserError where its description is damaged."""
    path = model / ABOUT
    if not path.is_file():
        return KeptFiles(model / KEPT, {})
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        prints = {str(stage): str(value) for stage, value in about["fingerprints"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is damaged ({type(error).__name__}); import the official directory again") from None
    return KeptFiles(model / KEPT, prints)
