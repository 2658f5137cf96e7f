"""Entries of the official `spk2info.pt` as our voices, and back (spec/official.md 1.3, 2.4)."""

import pathlib
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging

from cv2jax.config import UserError
from cv2jax.convert.speakers import read_speakers
from cv2jax.models.flow_matching.config import FlowMatchingConfig
from cv2jax.synthesis.stages import FRAMES_PER_TOKEN
from cv2jax.synthesis.voice import SUFFIX, Voice
from cv2jax.text.tokenizer import TextTokenizer

# What `add_zero_shot_spk` saves (spec/official.md 1.3), and the one key of a speaker-only entry.
_TEXT, _TOKENS, _MEL = "prompt_text", "flow_prompt_speech_token", "prompt_speech_feat"
_LM_TOKENS, _EMBEDDING, _LM_EMBEDDING, _SPEAKER = (
    "llm_prompt_speech_token",
    "flow_embedding",
    "llm_embedding",
    "embedding",
)
_MAX_NAME = 255  # bytes
_UNFIT = re.compile(r"[/\\\x00-\x1f%]|^\.")  # in the name of a file


def file_stem(speaker: str) -> str:
    """The name of a speaker's file, from which `speaker_of` tells the id again."""
    return _UNFIT.sub(lambda found: f"%{ord(found[0]):02X}", speaker)


def speaker_of(stem: str) -> str:
    """The id of the speaker in a file."""
    return re.sub("%([0-9A-F]{2})", lambda found: chr(int(found[1], 16)), stem)


def read_voices(
    path: pathlib.Path, tokenizer: TextTokenizer, flow: FlowMatchingConfig, hashes: Mapping[str, str]
) -> dict[str, Voice]:
    """The voices of a spk2info.pt by their ids, for a flow and a text tokenizer; `hashes` as `voice_of`.

    Raises UserError, naming file and speaker, for ids that cannot be names of files, and for entries that `voice_of` or
    `Voice.check` refuse, or that are of another model: embeddings of another size, tokens that its codebook has not.
    """
    entries = read_speakers(path)
    _check_ids(path, list(entries))
    voices = {}
    for speaker, entry in entries.items():
        try:
            voice = voices[speaker] = voice_of(speaker, entry, tokenizer, hashes)
            voice.check()
            _check_fit(voice, flow)
        except UserError as error:
            place = f"{path}: speaker '{speaker}': "
            said = str(error).removeprefix(f"{path.name}: speaker '{speaker}': ").removeprefix(f"{speaker}: ")
            raise UserError(place + said) from None
    return voices


def _check_fit(voice: Voice, flow: FlowMatchingConfig) -> None:
    if len(voice.speaker_embedding) != flow.speaker_dim:
        raise UserError(
            f"has an embedding of {len(voice.speaker_embedding)}, and cosyvoice2.yaml says flow.spk_embed_dim"
            f" {flow.speaker_dim}; give files of one model"
        )
    if len(voice.speech_tokens) and (largest := int(voice.speech_tokens.max())) >= flow.num_speech_tokens:
        raise UserError(
            f"has speech token {largest}, and the model's are 0 … {flow.num_speech_tokens - 1}; give files of one model"
        )


def _check_ids(path: pathlib.Path, speakers: list[str]) -> None:
    """Raises UserError for ids of which no file system, or not each one, makes names of different files."""
    known: dict[str, str] = {}
    for speaker in speakers:
        try:
            size = len(f"{file_stem(speaker)}{SUFFIX}".encode())
        except UnicodeEncodeError:
            raise UserError(f"{path}: speaker {speaker!r}: its id is no valid Unicode; give it another") from None
        if not speaker or size > _MAX_NAME:
            why = f"makes a name of {size} bytes, and a file's has {_MAX_NAME} at most" if speaker else "is empty"
            raise UserError(f"{path}: speaker '{speaker[:40]}': its id {why}; give it another")
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", speaker).casefold())
        if folded in known:
            raise UserError(
                f"{path}: speakers {known[folded]!r} and {speaker!r}: their files have one name where case or accents do"
                " not count; give one of them another id"
            )
        known[folded] = speaker


def voice_of(speaker: str, entry: Mapping[str, Any], tokenizer: TextTokenizer, hashes: Mapping[str, str]) -> Voice:
    """The voice of an entry; `hashes` of speech_tokenizer and speaker_encoder.

    Raises UserError, naming the speaker, for an entry without an embedding or with arrays of other shapes.
    """
    place = f"spk2info.pt: speaker '{speaker}'"
    if _EMBEDDING not in entry and _SPEAKER not in entry:
        raise UserError(f"{place}: has no {_SPEAKER} and no {_EMBEDDING}; leave it out of the file")
    key = _EMBEDDING if _EMBEDDING in entry else _SPEAKER
    embedding = _row(entry, key, np.float32, place)
    tokens, mel, text = np.zeros(0, np.int32), np.zeros((0, 80), np.float32), ""
    if _TOKENS in entry or _MEL in entry:
        tokens = _row(entry, _TOKENS, np.int32, place)
        mel = _row(entry, _MEL, np.float32, place, num_axes=2)
        num = min(len(tokens), len(mel) // FRAMES_PER_TOKEN)
        tokens, mel = tokens[:num], mel[: FRAMES_PER_TOKEN * num]
        if _TEXT in entry:
            text = tokenizer.decode(_row(entry, _TEXT, np.int32, place).tolist(), skip_special=False)
    for one, other in ((_LM_TOKENS, _TOKENS), (_LM_EMBEDDING, _EMBEDDING)):
        if one in entry and other in entry and not np.array_equal(entry[one], entry[other]):
            logging.warning("%s: %s differs from %s; ours is the latter", place, one, other)
    return Voice(
        speaker_embedding=embedding,
        speech_tokens=tokens,
        mel=mel,
        text=text,
        name=speaker,
        speech_tokenizer=hashes["speech_tokenizer"],
        speaker_encoder=hashes["speaker_encoder"],
    )


def _row(entry: Mapping[str, Any], key: str, dtype: type, place: str, num_axes: int = 1) -> np.ndarray:
    """The one row of an array [1, …]."""
    value = entry.get(key)
    kind = jnp.floating if dtype is np.float32 else jnp.integer  # of which bf16 is one to JAX alone
    if not isinstance(value, np.ndarray) or not jnp.issubdtype(value.dtype, kind):
        raise UserError(f"{place}: {key} is {'missing' if value is None else 'of another kind'}; save it again")
    if value.ndim != num_axes + 1 or len(value) != 1:
        raise UserError(f"{place}: {key} has shape {list(value.shape)}, and must be one row; save it again")
    return value[0].astype(dtype)


def entry_of(voice: Voice, tokenizer: TextTokenizer) -> dict[str, Any]:
    """The entry of a voice: what zero-shot takes where it has a recording, and `embedding` for speaker-fine-tuned speech.

    Upstream's own zero-shot entries lack the latter, which ends in a KeyError there (spec/official.md, Q30).
    """
    embedding = np.asarray(voice.speaker_embedding, np.float32)[None]
    if not len(voice.speech_tokens):
        return {_SPEAKER: embedding}
    tokens = np.asarray(voice.speech_tokens, np.int32)[None]
    mel = np.asarray(voice.mel, np.float32)[None]
    ids = np.asarray(tokenizer.encode(voice.text), np.int32)[None]
    arrays = {_TEXT: ids, _LM_TOKENS: tokens, _TOKENS: tokens, _MEL: mel}
    entry: dict[str, Any] = {}
    for key, value in arrays.items():
        entry |= {key: value, f"{key}_len": np.array([value.shape[1]], np.int32)}
    return entry | {_LM_EMBEDDING: embedding, _EMBEDDING: embedding, _SPEAKER: embedding}


def same_voice(one: Voice, other: Voice) -> bool:
    """Whether two voices would stand in front of a request alike."""
    arrays = ("speaker_embedding", "speech_tokens", "mel")
    return one.text == other.text and all(np.array_equal(getattr(one, n), getattr(other, n)) for n in arrays)
