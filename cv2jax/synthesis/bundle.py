"""The runtime of a bundle: the stages that the engine drives, from its programs; needs no flax and no model's code."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from cv2jax.audio.mel import MelDefinition
from cv2jax.config import UserError
from cv2jax.nn.chunks import ChunkMask
from cv2jax.shapes import Float32, Int32
from cv2jax.synthesis.bundle_files import TOKENIZER, VOICES, check_files, read_manifest
from cv2jax.synthesis.bundle_programs import Programs
from cv2jax.synthesis.plan import HopPlan
from cv2jax.synthesis.sampling import RequestSampler
from cv2jax.synthesis.stages import (
    LOOKAHEAD,
    Arrays,
    Controls,
    Drawn,
    MelHop,
    MelStage,
    SpeakerStage,
    SpeechStage,
    Stages,
    State,
    TokenizerStage,
    WaveStage,
)
from cv2jax.synthesis.voice import Voice, load_voice, voices_in
from cv2jax.text.tokenizer import TextTokenizer, load_text_tokenizer

# Stages as a model directory calls them.
SPEECH, MEL, WAVE = "text_speech_lm", "flow_matching", "hift_vocoder"
TOKENS, SPEAKER, NOISE, PROMPT_MEL = "speech_tokenizer", "speaker_encoder", "noise", "prompt_mel"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BundleFacts:
    """What a bundle says beside its stages.

    Attributes:
      mask, plan: to stream with by default. normalizer: of the texts that the language model learnt from.
      dtype: of parameters and products. manifest: all of bundle.json. check_seconds: that to check all files took.
    """

    mask: ChunkMask
    plan: HopPlan
    normalizer: str
    dtype: str
    manifest: Mapping[str, Any]
    check_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PromptMel:
    """What makes the mel of a recording that is enrolled: waveform [W] at `rate_hz` → log-mel [F M]."""

    make: Callable[[Float32[np.ndarray, " W"]], Float32[np.ndarray, "F M"]]
    rate_hz: int


class Bundle(NamedTuple):
    """A loaded bundle; `prompt_mel` is None where it has no speech tokenizer, without which nothing is enrolled."""

    stages: Stages
    tokenizer: TextTokenizer
    voices: dict[str, Voice]
    facts: BundleFacts
    prompt_mel: PromptMel | None = None


def load_bundle(path: str | os.PathLike[str], device: jax.Device | None = None) -> Bundle:
    """The stages, text tokenizer, voices and facts of a bundle, for this process's first device or the one given.

    All files are checked; programs are read and compiled when they are first used, and so are parameters. Raises UserError, in
    one line, for a bundle of a newer schema, a file that is missing, cut short or changed in any byte, programs that this jax
    does not read, and a platform that the bundle has none for.
    """
    place, manifest = pathlib.Path(path), read_manifest(path)
    programs = Programs(place, manifest, device)
    seconds = check_files(place, manifest)
    facts = BundleFacts(
        mask=ChunkMask(**manifest["mask"]),
        plan=HopPlan(**manifest["plan"]),
        normalizer=manifest["normalizer"],
        dtype=manifest["dtype"],
        manifest=manifest,
        check_seconds=seconds,
    )
    tokenizer = load_text_tokenizer(place / TOKENIZER)
    if tokenizer.hash != manifest["text_tokenizer"]:
        raise UserError(
            f"{place / TOKENIZER}: gives other ids than the bundle's; update tokenizers or copy the bundle again"
        )
    voices = {name: load_voice(file) for name, file in voices_in(place / VOICES).items()}
    about = manifest["stages"]
    prompt_mel = _prompt_mel(programs, about[PROMPT_MEL]) if PROMPT_MEL in about else None
    return Bundle(_make_stages(programs, about), tokenizer, voices, facts, prompt_mel)


def _make_stages(programs: Programs, facts: Mapping[str, dict[str, Any]]) -> Stages:
    return Stages(
        mel=_mel_stage(programs, dict(facts[MEL])),
        wave=_wave_stage(programs, dict(facts[WAVE])),
        speech=_speech_stage(programs, dict(facts[SPEECH])) if SPEECH in facts else None,
        tokenizer=_tokenizer_stage(programs, dict(facts[TOKENS])) if TOKENS in facts else None,
        speaker=_speaker_stage(programs, dict(facts[SPEAKER])) if SPEAKER in facts else None,
    )


def _speech_stage(programs: Programs, facts: dict[str, Any]) -> SpeechStage:
    lists = ("cache_lengths", "prefill_sizes", "slot_counts", "ratio")
    facts |= {name: tuple(facts[name]) for name in lists}
    facts["sampler"] = RequestSampler(**facts["sampler"])

    def init_state(num_slots: int, length: int) -> State:
        return programs.init_state(SPEECH, f"b{num_slots}.s{length}")

    def grow(state: State, length: int) -> State:
        return programs.grow(SPEECH, state, f"b{len(state['status'])}.s{length}")

    def prefill(state: State, tokens: Arrays, kinds: Arrays, num_tokens: Arrays) -> State:
        name = f"prefill.{programs.bucket(SPEECH, state)}.t{tokens.shape[1]}"
        state, _ = programs(SPEECH, name, state, {"tokens": tokens, "kinds": kinds, "num_tokens": num_tokens})
        return state

    def decode(state: State, controls: Controls) -> tuple[State, Drawn]:
        fields = controls._asdict()
        inputs = fields.pop("options") | fields
        state, drawn = programs(SPEECH, f"decode.{programs.bucket(SPEECH, state)}", state, inputs)
        return state, Drawn(**drawn)

    return SpeechStage(
        init_state=init_state,
        prefill=prefill,
        decode=decode,
        reset=lambda state, slots: programs.reset(SPEECH, state, slots),
        grow=grow,
        **facts,
    )


def _mel_stage(programs: Programs, facts: dict[str, Any]) -> MelStage:
    facts |= {name: tuple(facts[name]) for name in ("hop_sizes", "rooms")}
    facts["trained"] = tuple(ChunkMask(**mask) for mask in facts["trained"])
    facts["mel_definition"] = MelDefinition(**facts["mel_definition"])

    def step(state: State, hop: MelHop) -> tuple[Arrays, State]:
        size = hop.speech_tokens.shape[1] - LOOKAHEAD
        state, made = programs(MEL, f"step.{programs.bucket(MEL, state)}.l{size}", state, hop._asdict())
        return made["mel"], state

    def noise(voices: Arrays, requests: Arrays, frames: Arrays, num_prompt: Arrays) -> Arrays:
        inputs = {"voice_keys": voices, "request_keys": requests, "frames": frames, "num_prompt": num_prompt}
        return programs(NOISE, f"f{frames.shape[1]}", {}, inputs)[1]["noise"]

    return MelStage(
        init_state=lambda room: programs.init_state(MEL, f"r{room}"),
        step=step,
        grow=lambda state, room: programs.grow(MEL, state, f"r{room}"),
        refill=lambda used, state: programs.refill(MEL, used, state),
        noise=noise,
        **facts,
    )


def _wave_stage(programs: Programs, facts: dict[str, Any]) -> WaveStage:
    facts |= {"sizes": tuple(facts["sizes"]), "mel_definition": MelDefinition(**facts["mel_definition"])}

    def step(state: State, mel: Arrays, key: Arrays, num_valid: Arrays, total: Arrays) -> tuple[Arrays, State]:
        inputs = {"mel": mel, "key": key, "num_valid": num_valid, "total": total}
        state, made = programs(WAVE, f"step.f{mel.shape[1]}", state, inputs)
        return made["waveform"], state

    return WaveStage(init_state=lambda: programs.init_state(WAVE, "one"), step=step, **facts)


def _padded(waveform: Arrays, seconds: list[int], rate_hz: int) -> tuple[str, dict[str, Any]]:
    """(bucket, inputs) of a recording; UserError for one that is too long."""
    size = next((s for s in seconds if s * rate_hz >= len(waveform)), None)
    if size is None:
        raise UserError(
            f"a recording of {len(waveform) / rate_hz:.1f} s: this bundle reads {seconds[-1]} s at most; cut it"
        )
    padded = np.zeros((1, size * rate_hz), np.float32)
    padded[0, : len(waveform)] = waveform
    return f"w{size}", {"waveform": padded, "num_samples": np.array([len(waveform)], np.int32)}


def _tokenizer_stage(programs: Programs, facts: dict[str, Any]) -> TokenizerStage:
    seconds = facts.pop("seconds")

    def tokenize(waveform: Float32[np.ndarray, " W"]) -> Int32[np.ndarray, " L"]:
        name, inputs = _padded(waveform, seconds, facts["rate_hz"])
        _, made = programs(TOKENS, name, {}, inputs)
        return np.asarray(made["speech_tokens"][0, : int(made["num_speech_tokens"][0])])

    return TokenizerStage(tokenize=tokenize, **facts)


def _prompt_mel(programs: Programs, facts: Mapping[str, Any]) -> PromptMel:
    seconds, rate = facts["seconds"], facts["rate_hz"]

    def make(waveform: Float32[np.ndarray, " W"]) -> Float32[np.ndarray, "F M"]:
        name, inputs = _padded(waveform, seconds, rate)
        _, made = programs(PROMPT_MEL, name, {}, inputs)
        return np.asarray(made["mel"][0, : int(made["num_frames"][0])])

    return PromptMel(make=make, rate_hz=rate)


def _speaker_stage(programs: Programs, facts: dict[str, Any]) -> SpeakerStage:
    seconds, least = facts.pop("seconds"), facts.pop("min_samples")

    def embed(waveform: Float32[np.ndarray, " W"]) -> Float32[np.ndarray, " E"]:
        if len(waveform) < least:
            raise UserError(f"a recording of {len(waveform)} samples: a speaker embedding needs {least} or more")
        name, inputs = _padded(waveform, seconds, facts["rate_hz"])
        return np.asarray(programs(SPEAKER, name, {}, inputs)[1]["speaker_embedding"][0])

    return SpeakerStage(embed=embed, **facts)
