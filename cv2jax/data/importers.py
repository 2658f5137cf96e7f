"""Known corpora as manifests: each importer reads a directory as its publisher laid it out and yields utterances.

`audio` is relative to the imported directory. Importers look at names and texts only; whether the audio is there and
can be read is for `cv2jax prepare` to say, utterance by utterance. What is broken raises UserError with file and line.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator

from cv2jax.audio.tar import list_tar_members, read_tar_member
from cv2jax.config import UserError
from cv2jax.data.manifest import Utterance

_AUDIO_SUFFIXES = (".mp3", ".flac", ".wav", ".ogg", ".opus")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What a corpus does not say itself.

    `language` overrides (and is needed where a Kaldi directory has no utt2lang); `held_out` is the share of utterances,
    chosen by a hash of their ids, that become the split "test" of corpora published without one.
    """

    language: str | None = None
    held_out: float = 0.01


def import_libritts(root: pathlib.Path, options: ImportOptions) -> Iterator[Utterance]:
    """LibriTTS: SUBSET/SPEAKER/CHAPTER/ID.wav with ID.normalized.txt; the subset's first word is the split.

    An utterance without its text file gets text null.
    """
    subsets = sorted(p for p in root.iterdir() if p.is_dir() and p.name.split("-")[0] in ("train", "dev", "test"))
    if not subsets:
        raise UserError(f"{root}: no folder like train-clean-100, dev-clean or test-clean; is this LibriTTS?")
    for subset in subsets:
        for wav in sorted(subset.glob("*/*/*.wav")):
            transcript = wav.with_suffix(".normalized.txt")
            yield Utterance(
                id=wav.stem,
                audio=str(wav.relative_to(root)),
                text=_read_text(transcript).strip() if transcript.is_file() else None,
                speaker=wav.parent.parent.name,
                language=options.language or "en",
                split=subset.name.split("-")[0],
            )


def import_ljspeech(root: pathlib.Path, options: ImportOptions) -> Iterator[Utterance]:
    """LJSpeech: metadata.csv (id|text|normalised text) and wavs/ID.wav; `held_out` of it becomes "test"."""
    for place, line in _read_table(root / "metadata.csv"):
        fields = line.split("|")
        if len(fields) < 2:
            raise UserError(f"{place}: expected id|text|normalised text, found {line[:60]!r}")
        yield Utterance(
            id=fields[0],
            audio=os.path.join("wavs", f"{fields[0]}.wav"),
            text=fields[-1].strip() or fields[1].strip(),
            speaker="lj",
            language=options.language or "en",
            split=_choose_split(fields[0], options.held_out),
        )


def import_aishell3(root: pathlib.Path, options: ImportOptions) -> Iterator[Utterance]:
    """AISHELL-3: {train,test}/content.txt (ID.wav, then characters and pinyin in turn) and wav/SPEAKER/ID.wav."""
    parts = [split for split in ("train", "test") if (root / split).is_dir()]
    if not parts:
        raise UserError(f"{root}: no folder train or test; is this AISHELL-3?")
    for split in parts:
        for place, line in _read_table(root / split / "content.txt"):
            name, *words = line.split()
            if not words or len(words) % 2 or not name.endswith(".wav"):
                raise UserError(f"{place}: expected ID.wav, then characters and pinyin in turn, found {line[:60]!r}")
            speaker = name[:7]  # SSB0005 of SSB00050001.wav
            yield Utterance(
                id=name.removesuffix(".wav"),
                audio=os.path.join(split, "wav", speaker, name),
                text="".join(words[::2]),
                speaker=speaker,
                language=options.language or "zh",
                split=split,
            )


def import_emilia(root: pathlib.Path, options: ImportOptions) -> Iterator[Utterance]:
    """Emilia: webdataset archives anywhere below, each ID.json beside ID.mp3; audio becomes `x.tar::ID.mp3`.

    An audio file without its JSON raises UserError; a JSON without audio is left for `prepare` to refuse.
    """
    archives = sorted(root.rglob("*.tar"))
    if not archives:
        raise UserError(f"{root}: no .tar archive in it or below; is this Emilia?")
    for archive in archives:
        members = list_tar_members(archive)
        audio = {os.path.splitext(name)[0]: name for name in members if name.endswith(_AUDIO_SUFFIXES)}
        described = {name.removesuffix(".json") for name in members if name.endswith(".json")}
        for stem in audio:
            if stem not in described:
                raise UserError(f"{archive}: {audio[stem]} has no {stem}.json beside it; copy the archive again")
        for name in members:
            if name.endswith(".json"):
                stem = name.removesuffix(".json")
                member = f"{archive.relative_to(root)}::{audio.get(stem, f'{stem}.mp3')}"
                yield _parse_emilia(f"{archive}::{name}", read_tar_member(archive, name), member, options)


def _parse_emilia(place: str, data: bytes, audio: str, options: ImportOptions) -> Utterance:
    try:
        values = json.loads(data)
        identity, speaker = values.get("id") or values["_id"], values["speaker"]
        language = options.language or values["language"]
        text = values["text"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{place}: not a description with id, text, speaker and language ({error!r})") from None
    if not all(isinstance(value, str) and value for value in (identity, speaker, language)):
        raise UserError(f"{place}: id, speaker and language must be non-empty strings")
    return Utterance(
        id=identity,
        audio=audio,
        text=text.strip() if isinstance(text, str) else None,
        speaker=speaker,
        language=language,
        split=_choose_split(identity, options.held_out),
    )


def import_kaldi(root: pathlib.Path, options: ImportOptions) -> Iterator[Utterance]:
    """Kaldi: wav.scp, utt2spk, text (optional), utt2lang (optional); one such directory, or a directory of them.

    The directory's name is the split. Paths in wav.scp are absolute or relative to its directory. Command pipes and
    `segments` raise UserError: an utterance here is a file.
    """
    directories = [root] if (root / "wav.scp").is_file() else sorted(path.parent for path in root.glob("*/wav.scp"))
    if not directories:
        raise UserError(f"{root}: no wav.scp in it nor one folder down; is this a Kaldi data directory?")
    for directory in directories:
        if (directory / "segments").is_file():
            hint = "cut the recordings first (Kaldi: extract-segments) and list the pieces in wav.scp"
            raise UserError(f"{directory / 'segments'}: utterances that are parts of a file cannot be imported; {hint}")
        yield from _import_kaldi_directory(root, directory, options)


def _import_kaldi_directory(root: pathlib.Path, directory: pathlib.Path, options: ImportOptions) -> Iterator[Utterance]:
    speakers = _read_pairs(directory / "utt2spk")
    texts = _read_pairs(directory / "text", optional=True, empty=True)
    languages = _read_pairs(directory / "utt2lang", optional=True)
    for place, line in _read_table(directory / "wav.scp"):
        identity, *rest = line.split(maxsplit=1)
        if not rest:
            raise UserError(f"{place}: expected an id and a path, found {line[:60]!r}")
        audio = rest[0]
        if audio.endswith("|"):
            raise UserError(f"{place}: {audio[:60]!r} is a command; write its output to a file and give the path")
        if identity not in speakers:
            raise UserError(f"{directory / 'utt2spk'}: no speaker for utterance {identity!r} of wav.scp")
        language = options.language or languages.get(identity)
        if language is None:
            raise UserError(f"{directory}: no language for utterance {identity!r}; give --language or a file utt2lang")
        yield Utterance(
            id=identity,
            audio=os.path.relpath(directory / audio, root) if not os.path.isabs(audio) else audio,
            text=texts.get(identity),
            speaker=speakers[identity],
            language=language,
            split=directory.resolve().name,
        )


IMPORTERS: dict[str, Callable[[pathlib.Path, ImportOptions], Iterator[Utterance]]] = {
    "libritts": import_libritts,
    "ljspeech": import_ljspeech,
    "aishell3": import_aishell3,
    "emilia": import_emilia,
    "kaldi": import_kaldi,
}


def _choose_split(identity: str, held_out: float) -> str:
    """The same id falls in the same split whatever else the corpus holds."""
    digest = hashlib.blake2b(identity.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "little") < held_out * 2**64 else "train"


def _read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None


def _read_table(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Yields (file:line, line) of the lines that are not blank."""
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line.strip()


def _read_pairs(path: pathlib.Path, *, optional: bool = False, empty: bool = False) -> dict[str, str]:
    """Returns Kaldi's `key value` lines; `empty` admits a key without a value."""
    if optional and not path.is_file():
        return {}
    pairs = {}
    for place, line in _read_table(path):
        key, *rest = line.split(maxsplit=1)
        if not rest and not empty:
            raise UserError(f"{place}: expected a key and a value, found {line[:60]!r}")
        pairs[key] = rest[0] if rest else ""
    return pairs
