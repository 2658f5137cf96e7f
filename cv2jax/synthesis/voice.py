"""Voices: who speaks, kept in one file that zero-shot, cross-lingual, instruct, conversion and speaker modes share.

A file is safetensors: `speaker_embedding` [E], `speech_tokens` [P] and `mel` [2·P M], all else as JSON under the one
metadata key `cv2jax-voice` (of several keys safetensors keeps no order, and the same voice is to give the same bytes).
A SHA-256 over all of it is among that, so that a changed byte is found wherever it lies.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import load, save

from cv2jax.audio.mel import FLOW_MEL, MelDefinition
from cv2jax.config import UserError, differences
from cv2jax.files import whole_file
from cv2jax.shapes import Float, Integer
from cv2jax.synthesis.stages import FRAMES_PER_TOKEN

FORMAT, VERSION = "cv2jax-voice", 1
SUFFIX = ".safetensors"
_ARRAYS = {"speaker_embedding": (np.float32, 1), "speech_tokens": (np.int32, 1), "mel": (np.float32, 2)}  # type, axes
_TEXTS = ("text", "language", "name", "speech_tokenizer", "speaker_encoder", "audio_sha256")
_SHOWN = 12  # digits of a hash
_ENROLL = "enroll the recording again"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Voice:
    """Who speaks: an embedding, and of a recording its tokens, its mel and what it says, which stand in front of requests.

    Attributes:
      speaker_embedding: [E], raw, as the speaker encoder gives it. speech_tokens: [P] of the recording, P = 0 without one.
      mel: [2·P M] of it. text: what it says, as given; "" where that is not known. language: as given (en, cmn, ja, ko, …).
      name: what errors call the voice. seed: of the noise that the recording's frames start from.
      speech_tokenizer, speaker_encoder: hashes of what made tokens and embedding; "": not known.
      mel_definition: what the mel is of. audio_sha256: of the recording's file. warnings: what enrolment found odd about it.
    """

    speaker_embedding: Float[np.ndarray, " E"]
    speech_tokens: Integer[np.ndarray, " P"]
    mel: Float[np.ndarray, "F_prompt M"]
    text: str = ""
    language: str = ""
    name: str = "voice"
    seed: int = 0
    speech_tokenizer: str = ""
    speaker_encoder: str = ""
    mel_definition: MelDefinition = FLOW_MEL
    audio_sha256: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of all that it holds, the same for the same voice wherever it was read."""
        return _digest(*_contents(self))

    def check(self) -> None:
        """Raises UserError for shapes that do not fit together, negative tokens, what is not finite, and broken text."""
        wanted = (FRAMES_PER_TOKEN * len(self.speech_tokens), self.mel_definition.num_mels)
        if self.mel.shape != wanted:
            raise UserError(
                f"{self.name}: the mel has shape {self.mel.shape}; its {len(self.speech_tokens)} tokens need {wanted}:"
                " cut both to the shorter one"
            )
        if not len(self.speaker_embedding):
            raise UserError(f"{self.name}: the speaker embedding is empty; {_ENROLL}")
        if np.any(self.speech_tokens < 0):
            place = int(np.flatnonzero(self.speech_tokens < 0)[0])
            raise UserError(
                f"{self.name}: speech token {self.speech_tokens[place]} at place {place} is negative; {_ENROLL}"
            )
        for what, values in (("speaker embedding", self.speaker_embedding), ("mel", self.mel)):
            if not np.all(np.isfinite(values)):
                where = np.argwhere(~np.isfinite(values))[0].tolist()
                raise UserError(f"{self.name}: the {what} is not finite at {where}; {_ENROLL}")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"{self.name}: seed {self.seed}: give a whole number from 0 to {(1 << 32) - 1}")
        for field in ("text", "language", "name"):
            try:
                getattr(self, field).encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{field} of the voice: no valid Unicode at character {error.start}; type it again"
                ) from None


def save_voice(path: str | os.PathLike[str], voice: Voice) -> None:
    """Writes a voice as safetensors, whole or not at all; the same voice gives the same bytes.

    Raises UserError for a voice that `Voice.check` refuses, another suffix than .safetensors, and a place that cannot be
    written.
    """
    path = check_voice_path(path)
    voice.check()
    about, arrays = _contents(voice)
    about["sha256"] = _digest(about, arrays)
    data = save(arrays, {FORMAT: _to_json(about)})
    with whole_file(path, f"{path}: cannot write the voice ({{reason}}); give another place") as file:
        file.write(data)


def check_voice_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """`path`, if a voice can be written there by its name; else UserError."""
    path = pathlib.Path(path)
    if path.suffix != SUFFIX:
        raise UserError(f"{path}: a voice is a {SUFFIX} file; give a name with that ending")
    if path.is_dir():
        raise UserError(f"{path}: is a directory; give the file that is to hold the voice")
    return path


def load_voice(path: str | os.PathLike[str]) -> Voice:
    """The voice of a file that `save_voice` wrote.

    Raises UserError for no such file, one that holds no voice or one of a newer version, and for a file that is cut short or
    of which any byte has changed.
    """
    path = pathlib.Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such voice; give a file that `cv2jax enroll` wrote") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the voice ({error.strerror or error}); give a file of `cv2jax enroll`"
        ) from None
    try:
        tensors, about = load(data), _about(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: no whole file of a voice ({reason}); copy it again or {_ENROLL}") from None
    if about is None:
        raise UserError(f"{path}: safetensors, but no voice; give a file that `cv2jax enroll` wrote")
    version = about.get("version")
    if isinstance(version, int) and version > VERSION:
        raise UserError(f"{path}: a voice of version {version}, newer than {VERSION}: update cv2jax or {_ENROLL}")
    try:
        voice = _make_voice(about, tensors)
        voice.check()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: a damaged voice ({error}); copy the file again or {_ENROLL}") from None
    return voice


def voices_in(directory: str | os.PathLike[str]) -> dict[str, pathlib.Path]:
    """name → file of the voices in a directory, by name; none where there is no such directory."""
    found = (path for path in pathlib.Path(directory).glob(f"*{SUFFIX}") if not path.name.startswith("."))
    return {path.stem: path for path in sorted(found) if path.is_file()}


def require_voice(
    voice: Voice, *, speech_tokenizer: str = "", speaker_encoder: str = "", mel: MelDefinition = FLOW_MEL
) -> None:
    """Refuses a voice that another tokenizer, speaker encoder or mel made than those (hashes) of the model.

    A hash that is "" on either side is not known: a warning is logged then. A voice without a recording has no tokens and no
    mel that could be wrong. Raises UserError in one line, naming both sides.
    """
    sides = [("speaker embedding", "speaker encoder", voice.speaker_encoder, speaker_encoder)]
    if len(voice.speech_tokens):
        sides.append(("speech tokens", "speech tokenizer", voice.speech_tokenizer, speech_tokenizer))
    for what, maker, theirs, ours in sides:
        if not theirs or not ours:
            whose = "the voice" if not theirs else "the model"
            logging.warning("%s: %s does not say which %s made its %s; not checked", voice.name, whose, maker, what)
        elif theirs != ours:
            raise UserError(
                f"{voice.name}: its {what} are of {maker} {theirs[:_SHOWN]}, the model's is {ours[:_SHOWN]}; {_ENROLL}"
                " with this model"
            )
    if len(voice.speech_tokens) and voice.mel_definition != mel:
        lines = differences(dataclasses.asdict(voice.mel_definition), dataclasses.asdict(mel))
        raise UserError(
            f"{voice.name}: its mel is another than the model's ({'; '.join(lines)}); {_ENROLL} with this model"
        )


def _contents(voice: Voice) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(words and numbers, arrays) of a voice, as its file has them."""
    arrays = {name: np.ascontiguousarray(getattr(voice, name), dtype) for name, (dtype, _) in _ARRAYS.items()}
    about = {"version": VERSION} | {
        field.name: getattr(voice, field.name) for field in dataclasses.fields(voice) if field.name not in _ARRAYS
    }
    about["mel_definition"] = dataclasses.asdict(voice.mel_definition)
    return about, arrays


def _to_json(about: dict[str, Any]) -> str:
    return json.dumps(about, ensure_ascii=False, sort_keys=True)


def _digest(about: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(_to_json(about).encode())
    for name, values in sorted(arrays.items()):
        digest.update(f"{name} {values.dtype.str} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _make_voice(about: dict[str, Any], tensors: dict[str, np.ndarray]) -> Voice:
    """The voice, if the checksum is that of what there is; ValueError, KeyError or TypeError where it is not whole."""
    digest = about.pop("sha256")
    if about.pop("version") != VERSION or digest != _digest({"version": VERSION} | about, tensors):
        raise ValueError("its checksum does not fit what it holds")
    for name, (dtype, num_axes) in _ARRAYS.items():
        if tensors[name].dtype != dtype or tensors[name].ndim != num_axes:
            raise ValueError(f"{name} is {tensors[name].dtype} of shape {tensors[name].shape}")
    if not all(isinstance(about[name], str) for name in _TEXTS) or not isinstance(about["seed"], int):
        raise ValueError("its words and numbers are of other types")
    about["mel_definition"] = MelDefinition(**about["mel_definition"])
    about["warnings"] = tuple(map(str, about["warnings"]))
    arrays: dict[str, Any] = {name: np.array(tensors[name]) for name in _ARRAYS}  # those of a file cannot be written to
    return Voice(**arrays, **about)


def _about(data: bytes) -> dict[str, Any] | None:
    """What the metadata tells, None where they are not a voice's; ValueError where they are no JSON."""
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    if FORMAT not in metadata:
        return None
    about = json.loads(metadata[FORMAT])
    if not isinstance(about, dict):
        raise ValueError(f"{FORMAT} is no table")
    return about
