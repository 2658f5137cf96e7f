"""What the engine drives: the stages as functions of arrays and of states, which are pytrees that it only hands on.

A stage comes from a model with its parameters (`cv2jax.tasks.stages`) or from the programs of a bundle; nothing here or in the
other files of `synthesis/` asks which. Shapes are static and few, all else is data. Keys are raw key data of uint32, which any
program can take. B rows, T tokens fed, L speech tokens, F mel frames, M mel bins, E embedding, W samples, R recent tokens.

Functions must not keep anything from call to call; a state is used up by the function that it is given to, unless it says
otherwise.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from cv2jax.audio.mel import FLOW_MEL, MelDefinition
from cv2jax.nn.chunks import ChunkMask
from cv2jax.synthesis.sampling import RequestSampler
from cv2jax.text.layout import MIX_RATIO, Ratio

FRAMES_PER_TOKEN = 2  # mel frames (50 Hz) of a speech token (25 Hz)
LOOKAHEAD = 3  # speech tokens behind a hop that the flow looks at
TOKENS_PER_SECOND = 25
RUNNING, OK, HIT_LIMIT, NON_FINITE = range(4)  # of a slot of the language model
STATUS_NAMES = ("running", "ok", "hit_limit", "non_finite")

State = Any  # a pytree of arrays
Arrays = Any  # numpy's or jax's


class Controls(NamedTuple):
    """What is wanted of each slot in one dispatch of the language model."""

    key: Arrays  # [B …] uint32, the request's; draw i uses fold_in(key, i)
    options: dict[str, Arrays]  # [B] each, of the sampler's `row`
    min_length: Arrays  # [B] no end before so many speech tokens
    max_length: Arrays  # [B] HIT_LIMIT after so many
    budget: Arrays  # [B] tokens to draw now at most; 0: the slot rests
    may_end: Arrays  # [B] bool, whether the layout has an end here


class Drawn(NamedTuple):
    """What a dispatch drew."""

    speech_tokens: Arrays  # [B num_steps], sampling.NO_TOKEN behind the last
    num_speech_tokens: Arrays  # [B]
    status: Arrays  # [B] of STATUS_NAMES


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SpeechStage:
    """The language model: text tokens → speech tokens, B slots at once, none of which depends on another.

    Attributes:
      init_state: (B, positions) → state of empty slots.
      prefill: (state, tokens [B T], kinds [B T], num_tokens [B]) → state; feeds each slot its first num_tokens.
      decode: (state, `Controls`) → (state, `Drawn`); up to `num_steps` draws a slot, fewer where no slot has budget left.
      reset: (state, slots [B] bool) → state; empties these. grow: (state, positions) → state with larger caches.
      sampler: checks what requests ask for; the draw itself is in `decode`.
      cache_lengths: positions that caches may have, ascending. max_positions: of the context, at most the last of them.
      prefill_sizes: T that rows are fed in, ascending. slot_multiple: B is a multiple of it. slot_counts: B, ascending, where
        only some can be; (): any.
      ratio: of text to speech tokens where text arrives. prefix: "speaker" if training had a speaker in front of its texts.
      text_tokenizer, speech_tokenizer: hashes; "": not known.
    """

    init_state: Callable[[int, int], State]
    prefill: Callable[[State, Arrays, Arrays, Arrays], State]
    decode: Callable[[State, Controls], tuple[State, Drawn]]
    reset: Callable[[State, Arrays], State]
    grow: Callable[[State, int], State]
    sampler: RequestSampler
    text_vocabulary_size: int
    num_speech_tokens: int
    cache_lengths: tuple[int, ...]
    max_positions: int
    num_steps: int
    prefill_sizes: tuple[int, ...] = (8, 32, 128, 512)
    slot_multiple: int = 1
    slot_counts: tuple[int, ...] = ()
    ratio: Ratio = MIX_RATIO
    prefix: str = "none"
    text_tokenizer: str = ""
    speech_tokenizer: str = ""


class MelHop(NamedTuple):
    """The input of one step of the flow, of L tokens and F = 2·L frames."""

    speech_tokens: Arrays  # [1 L+3], the tokens and right behind them those that are looked at
    num_tokens: Arrays  # [1] to solve
    num_lookahead: Arrays  # [1] that follow: 3, or 0 at the end
    noise: Arrays  # [1 F M] where the frames start
    prompt_mel: Arrays  # [1 F M], 0 behind the prompt
    speaker_embedding: Arrays  # [1 E]
    chunk: Arrays  # [1], and the next two: the mask, in tokens
    left: Arrays  # [1]
    prompt: Arrays  # [1]


class MelBatch(NamedTuple):
    """The input of a solve of whole sequences, prompts in front."""

    speech_tokens: Arrays  # [B L]
    num_tokens: Arrays  # [B]
    prompt_mel: Arrays  # [B F M]
    speaker_embedding: Arrays  # [B E]
    noise: Arrays  # [B F M]
    chunk: Arrays  # [B], and the next two: the mask, in tokens
    left: Arrays  # [B]
    prompt: Arrays  # [B]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MelStage:
    """The flow: speech tokens → log-mel.

    Attributes:
      init_state: (tokens of room) → state of one stream. step: (state, `MelHop`) → (mel [1 F M], state).
      grow: (state, tokens of room) → state. refill: (used, state) → `state` in the memory of `used`; only `used` is used up.
      noise: (voice keys [B …], request keys [B …], frames [B F], frames of the prompt [B]) → noise [B F M].
      solve: (`MelBatch`) → mel [B F M] of whole sequences; None where a stage only streams.
      trained: the masks of training. hop_sizes: tokens that steps may have, where that is fixed; (): any.
      rooms: tokens that states may have room for, ascending, where that is fixed; (): any.
      max_frames: that the noise reaches, prompt included; None: no end. mel_definition: of the mel that it makes.
      speech_tokenizer, speaker_encoder: hashes of what made its inputs; "": not known.
    """

    init_state: Callable[[int], State]
    step: Callable[[State, MelHop], tuple[Arrays, State]]
    grow: Callable[[State, int], State]
    refill: Callable[[State, State], State]
    noise: Callable[[Arrays, Arrays, Arrays, Arrays], Arrays]
    num_speech_tokens: int
    num_mels: int
    speaker_dim: int
    trained: tuple[ChunkMask, ...]
    solve: Callable[[MelBatch], Arrays] | None = None
    hop_sizes: tuple[int, ...] = ()
    rooms: tuple[int, ...] = ()
    max_frames: int | None = None
    mel_definition: MelDefinition = FLOW_MEL
    speech_tokenizer: str = ""
    speaker_encoder: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WaveStage:
    """The vocoder: log-mel → waveform.

    Attributes:
      init_state: () → state of one stream that has heard nothing. It is not used up.
      step: (state, mel [1 F M], key [1 …], num_valid [1], total [1]) → (waveform [1 W], state); `hold_back` samples late.
        `total` is the number of frames of the utterance, `endless` while that is not known. The state is not used up.
      whole: (mel [1 F M], key [1 …], num_frames [1]) → waveform [1 W]; None where a stage only streams.
      sizes: F that steps may have, ascending. mel_definition: of the mel that it reads.
    """

    init_state: Callable[[], State]
    step: Callable[[State, Arrays, Arrays, Arrays, Arrays], tuple[Arrays, State]]
    hold_back: int
    endless: int
    whole: Callable[[Arrays, Arrays, Arrays], Arrays] | None = None
    sizes: tuple[int, ...] = (8, 16, 32, 64, 128)
    mel_definition: MelDefinition = FLOW_MEL


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenizerStage:
    """The speech tokenizer: recordings → speech tokens, for conversion and enrolment.

    Attributes:
      tokenize: waveform [W] at `rate_hz` → tokens [L] at 25 Hz. hash: of the tokenizer; "": not known.
    """

    tokenize: Callable[[Arrays], Arrays]
    hash: str = ""
    rate_hz: int = 16_000
    max_seconds: float = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SpeakerStage:
    """The speaker encoder, for enrolment.

    Attributes:
      embed: waveform [W] at `rate_hz` → raw embedding [E]. hash: of the encoder; "": not known.
    """

    embed: Callable[[Arrays], Arrays]
    hash: str = ""
    rate_hz: int = 16_000


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stages:
    """All stages of one model; without a language model it can only convert, without a tokenizer it cannot convert audio."""

    mel: MelStage
    wave: WaveStage
    speech: SpeechStage | None = None
    tokenizer: TokenizerStage | None = None
    speaker: SpeakerStage | None = None
