"""`cv2jax enroll`: a recording, checked and trimmed, to a voice: tokens, mel and embedding in one file for every mode."""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable

import numpy as np
from absl import logging

from cv2jax.audio.io import AudioClip, read_audio
from cv2jax.audio.mel import FLOW_MEL
from cv2jax.audio.tar import read_tar_member, split_tar_source
from cv2jax.config import UserError
from cv2jax.data.embeddings import SUFFIX as EMBEDDINGS
from cv2jax.data.embeddings import EmbeddingFile
from cv2jax.files import printable
from cv2jax.shapes import Float, Float32
from cv2jax.synthesis.bundle_files import is_bundle
from cv2jax.synthesis.clip import MAX_SECONDS, Finding, check_clip, check_transcript, measure_clip
from cv2jax.synthesis.encoders import Encoders, load_bundle_encoders
from cv2jax.synthesis.stages import LOOKAHEAD, TOKENS_PER_SECOND
from cv2jax.synthesis.trim import best_lengths, num_fed_again, plan_cut
from cv2jax.synthesis.voice import Voice, check_voice_path, save_voice
from cv2jax.text.tags import END_OF_PROMPT, check_tags

_SHOWN = 12  # digits of a hash


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnrollOptions:
    """What is said of the recording, and how it is made a voice."""

    text: str | None = None  # what it says
    language: str = ""
    name: str = ""  # "": the file's
    seed: int = 0  # of the noise that its frames start from
    embedding_from: tuple[str, ...] = ()  # more recordings of the speaker
    speaker_embedding: str = ""  # FILE.npz:ID of `cv2jax embed`, in place of the speaker encoder
    chunk: int | None = None  # of the mask that will stream, in tokens; None: that of `stream_mask`
    trim: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnrollResult:
    """The voice, and what became of the recording: seconds cut off at the start and end, and tokens fed again a request."""

    voice: Voice
    findings: tuple[Finding, ...] = ()
    cut_start: float = 0.0
    cut_end: float = 0.0
    chunk: int | None = None  # None: not known
    num_fed_again: int = 0
    similarities: tuple[float, ...] = ()  # cosines, of the recording's embedding with those of `embedding_from`


def enroll(
    model: str | os.PathLike[str] | None,
    audio: str | None,
    out: str | os.PathLike[str],
    options: EnrollOptions = EnrollOptions(),
) -> EnrollResult:
    """Writes the voice of a recording with the encoders of a model directory; without `audio`, of an embedding alone.

    What is odd about the recording is logged and kept in the voice. Raises UserError, before anything is written, for one
    that no good voice can come of, for a stage that is missing or does not fit the others, and for a wrong option.
    """
    out = check_voice_path(out)
    _check_options(model, audio, options)
    name = printable(options.name or out.stem)
    if audio is None:
        voice = _make_speaker(model, name, options)
        save_voice(out, voice)
        return EnrollResult(voice=voice)
    assert model is not None
    with_speaker = not options.speaker_embedding
    streams, longest, load = _open_encoders(model, with_speaker)
    chunk = streams if options.chunk is None else options.chunk
    clip, findings, cut_start, cut_end = _prepare(audio, options, chunk)
    more = [_load(path, longest)[0] for path in options.embedding_from]
    encoders = load()
    if encoders.embed is None or not with_speaker:
        embedding, encoder = _read_embedding(model, options.speaker_embedding)
        similarities: tuple[float, ...] = ()
    else:
        vectors, encoder = encoders.embed([clip, *more]), encoders.speaker_encoder
        # Source: the official speaker embedding is the mean of raw vectors (spec/frontends.md 2.1).
        embedding, similarities = vectors.mean(axis=0), _similarities(vectors)
    if encoders.stand_ins:
        logging.warning(
            "%s: was trained on stand-ins made of names and knows no embeddings of audio; what it makes of this voice's is"
            " not the speaker: train a flow with data.speaker_embeddings, a file of `cv2jax embed`",
            model if is_bundle(model) else pathlib.Path(model, "flow_matching"),
        )
    tokens, mel = encoders.encode(clip)
    voice = Voice(
        speaker_embedding=embedding,
        speech_tokens=tokens,
        mel=mel,
        text=options.text or "",
        language=options.language,
        name=name,
        seed=options.seed,
        speech_tokenizer=encoders.speech_tokenizer,
        speaker_encoder=encoder,
        audio_sha256=_sha256(audio),
        warnings=tuple(finding.message for finding in findings),
    )
    save_voice(out, voice)
    return EnrollResult(
        voice=voice,
        findings=tuple(findings),
        cut_start=cut_start,
        cut_end=cut_end,
        chunk=chunk,
        num_fed_again=num_fed_again(len(tokens), chunk, LOOKAHEAD) if chunk else 0,
        similarities=similarities,
    )


def _open_encoders(
    model: str | os.PathLike[str], with_speaker: bool
) -> tuple[int | None, float, Callable[[], Encoders]]:
    """(chunk that the flow streams in, seconds of a recording at most, what loads the encoders); what is missing shows here."""
    if is_bundle(model):
        encoders = load_bundle_encoders(model)
        if with_speaker and encoders.embed is None:
            raise UserError(f"{model}: the bundle has no speaker encoder; give --speaker_embedding FILE.npz:ID")
        return encoders.chunk, MAX_SECONDS, lambda: encoders
    from cv2jax.tasks import model_encoders  # flax and Orbax, which a bundle does without

    model_encoders.require_encoders(model, with_speaker=with_speaker)
    load = functools.partial(model_encoders.load_encoders, model, with_speaker=with_speaker)
    return model_encoders.streaming_chunk(model), model_encoders.LONGEST_SECONDS, load


def _speaker_hash(model: str | os.PathLike[str]) -> tuple[str, str]:
    """(hash of a model's speaker encoder, where it lies); ("", "") where it has none."""
    if is_bundle(model):
        return load_bundle_encoders(model).speaker_encoder, str(model)
    from cv2jax.tasks.model_encoders import speaker_hash

    return speaker_hash(model)


def describe_chunks(result: EnrollResult) -> str:
    """How much of a voice's prompt is solved once and how much again by each request, and what would be better."""
    count, chunk, again = len(result.voice.speech_tokens), result.chunk, result.num_fed_again
    if not chunk or not count:
        return ""
    text = f"in chunks of {chunk}, {count - again} tokens are solved once and {again} again with each first hop"
    if again <= LOOKAHEAD:
        return text
    lengths = [
        f"{length / TOKENS_PER_SECOND:g}" for length in best_lengths(count, chunk, LOOKAHEAD) if length > LOOKAHEAD
    ]
    return f"{text}; with {' or '.join(lengths)} s it would be {LOOKAHEAD}"


def _check_options(model: str | os.PathLike[str] | None, audio: str | None, options: EnrollOptions) -> None:
    if options.text is not None:
        if not options.text.strip():
            raise UserError("--text is empty: give the words of the recording, or leave it out")
        if END_OF_PROMPT in options.text:
            raise UserError(
                f"--text holds {END_OF_PROMPT}: give only the words of the recording; modes add their prefixes"
            )
        check_tags(options.text)
    if options.chunk is not None and options.chunk < 1:
        raise UserError(f"--chunk {options.chunk}: give the tokens of a chunk, 1 or more")
    if options.speaker_embedding and options.embedding_from:
        raise UserError("--speaker_embedding and --embedding_from both: give one of them")
    if audio is None:
        if not options.speaker_embedding:
            raise UserError("no AUDIO: give a recording, or --speaker_embedding FILE.npz:ID for a voice without one")
        if options.text is not None:
            raise UserError("--text without AUDIO: it is what a recording says; leave it out")
    elif model is None:
        raise UserError("--model is missing: give the model directory whose encoders make the voice")


def _make_speaker(model: str | os.PathLike[str] | None, name: str, options: EnrollOptions) -> Voice:
    """A voice that is an embedding alone."""
    embedding, encoder = _read_embedding(model, options.speaker_embedding)
    return Voice(
        speaker_embedding=embedding,
        speech_tokens=np.zeros(0, np.int32),
        mel=np.zeros((0, FLOW_MEL.num_mels), np.float32),
        language=options.language,
        name=name,
        seed=options.seed,
        speaker_encoder=encoder,
    )


def _load(path: str, max_seconds: float) -> tuple[AudioClip, list[Finding]]:
    """A clip and what is odd about it; UserError for one that will not do."""
    clip = read_audio(path)
    findings = check_clip(clip, max_seconds=max_seconds)
    errors = [finding.message for finding in findings if finding.severity == "error"]
    if errors:
        raise UserError(f"{path}: {'; '.join(errors)}")
    return clip, findings


def _prepare(audio: str, options: EnrollOptions, chunk: int | None) -> tuple[AudioClip, list[Finding], float, float]:
    """(the clip as it is used, what is odd about it, seconds cut off at its start and end)."""
    clip, findings = _load(audio, MAX_SECONDS)
    measures = measure_clip(clip.waveform, clip.rate_hz)
    findings += check_transcript(options.text or "", measures.end_speech - measures.first_speech)
    for finding in findings:
        logging.warning("%s: %s", audio, finding.message)
    if options.text is None:
        logging.info("%s: no --text: zero-shot needs it; cross-lingual, instruct and conversion do without", audio)
    if not options.trim:
        return clip, findings, 0.0, 0.0
    cut = plan_cut(len(clip.waveform), clip.rate_hz, measures, chunk=chunk, lookahead=LOOKAHEAD)
    kept = dataclasses.replace(clip, waveform=np.ascontiguousarray(clip.waveform[cut.start : cut.end]))
    return kept, findings, cut.start / clip.rate_hz, (len(clip.waveform) - cut.end) / clip.rate_hz


def _read_embedding(model: str | os.PathLike[str] | None, place: str) -> tuple[Float32[np.ndarray, " E"], str]:
    """(raw embedding, hash of its encoder) of FILE.npz:ID, a speaker's mean or else an utterance's."""
    path, mark, identity = place.partition(f"{EMBEDDINGS}:")
    if not mark or not identity:
        raise UserError(
            f"--speaker_embedding {place}: give FILE.npz:ID, a speaker or utterance of `cv2jax embed`'s file"
        )
    file = EmbeddingFile(path + EMBEDDINGS)
    if identity not in file.speakers and identity not in file:
        known = ", ".join(file.speakers[:8]) + (", …" if len(file.speakers) > 8 else "")
        raise UserError(f"{file.path}: has no speaker or utterance '{identity}'; its speakers are {known}")
    ours, place = _speaker_hash(model) if model is not None else ("", "")
    if ours and ours != file.encoder:
        raise UserError(
            f"{file.path}: is of speaker encoder {file.encoder[:_SHOWN]}, {place} is {ours[:_SHOWN]}; run `cv2jax embed`"
            " with that"
        )
    return file.speaker(identity) if identity in file.speakers else file.utterance(identity), file.encoder


def _similarities(vectors: Float[np.ndarray, "N E"]) -> tuple[float, ...]:
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return tuple(float(cosine) for cosine in unit[1:] @ unit[0])


def _sha256(audio: str) -> str:
    tar_source = split_tar_source(audio)
    if tar_source is not None:
        return hashlib.sha256(read_tar_member(*tar_source)).hexdigest()
    with open(audio, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
