"""The numeric gate of a bundle: each stage is asked the same small question as the fp32 model was, and the answers compared.

Every stage has its own question, so that one that drifts is not hidden by, nor blamed on, another. Questions are arrays: the
model that wrote them is not needed to ask them again.
"""

import dataclasses
import io
import itertools
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from cv2jax.config import UserError
from cv2jax.nn.chunks import ChunkMask
from cv2jax.shapes import Float32, Shaped
from cv2jax.synthesis.bundle import MEL, PROMPT_MEL, SPEAKER, SPEECH, TOKENS, WAVE, Bundle
from cv2jax.synthesis.bundle_files import GOLDEN, PARAMETERS, read_arrays, write_bytes
from cv2jax.synthesis.mel_stream import MelStreams
from cv2jax.synthesis.prompt import NonFinite, Prompt, key_data
from cv2jax.synthesis.stages import LOOKAHEAD, Controls, MelStage, SpeechStage, State, WaveStage
from cv2jax.synthesis.wave_stream import WaveStreams
from cv2jax.text.layout import SOS, SPECIAL, TASK, TEXT
from cv2jax.text.layout import SPEECH as SPEECH_KIND
from cv2jax.text.tokenizer import TextTokenizer

TEXT_STAGE = "tokenizer"
ORDER = (TEXT_STAGE, SPEECH, MEL, WAVE, TOKENS, SPEAKER, PROMPT_MEL)
# Bounds: of whole numbers the share that may differ, of others the relative error |a - b| / |b| over the whole array. Where a
# draw follows from rounded products, a near tie may fall the other way: in bfloat16 ids are told and not judged, logits are.
_EXACT = {"ids": 0.0, "speech_tokens": 0.0}
_FLOAT32 = _EXACT | {"logits": 1e-3, "mel": 1e-3, "waveform": 1e-2, "speaker_embedding": 1e-3, "prompt_mel": 1e-3}
_FLOAT32 |= {"drawn": 0.0}
BOUNDS: dict[str, dict[str, float | None]] = {
    "float32": {**_FLOAT32},
    "bfloat16": {**_FLOAT32, "logits": 5e-2, "mel": 5e-2, "drawn": None},
}
TEXTS = (
    "Call me when you are back, at half past ten.",
    "收到好友从远方寄来的生日礼物。",
    "  Tabs\tand\n\nlines, 3.50 €, naïve cafe\u0301 \U0001f600 <|en|>[laughter]ok",
    "",
)
_NUM_DRAWS = 12  # speech tokens that the language model draws, and as many that it is given
_SECONDS = 2.0  # of the recording that the encoders hear
_FRAMES = (30, 18)  # of the vocoder's hops

Answer = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """What a stage's answer is worth: its error, the bound (None: only told), and the seconds that the whole stage took."""

    stage: str
    quantity: str
    error: float
    bound: float | None
    seconds: float

    @property
    def passes(self) -> bool:
        """Whether the answer is finite and within the bound."""
        return math.isfinite(self.error) and (self.bound is None or self.error <= self.bound)


def find_stage(bundle: Bundle, name: str) -> Any:
    """Whom the question of this name is for; None where a bundle has no such stage."""
    stages = bundle.stages
    return {
        TEXT_STAGE: bundle.tokenizer,
        SPEECH: stages.speech,
        MEL: stages.mel,
        WAVE: stages.wave,
        TOKENS: stages.tokenizer,
        SPEAKER: stages.speaker,
        PROMPT_MEL: bundle.prompt_mel,
    }[name]


def make_question(name: str, stage: Any, tokenizer: TextTokenizer, mask: ChunkMask, seed: int = 0) -> Answer:
    """The question for the stage of this name, drawn from a seed; arrays by name."""
    rng = np.random.default_rng([seed, ORDER.index(name)])
    if name == TEXT_STAGE:
        return {"texts": np.array(TEXTS)}
    if name == SPEECH:
        return _speech_question(stage, tokenizer, rng)
    if name == WAVE:
        return {"mel": _log_mel(rng, sum(_FRAMES), stage.mel_definition.num_mels)}
    if name in (TOKENS, SPEAKER, PROMPT_MEL):
        return {"waveform": _recording(rng, stage.rate_hz)}
    num_prompt = min(mask.chunk, 100) + LOOKAHEAD + 3
    return {
        "prompt_tokens": rng.integers(0, stage.num_speech_tokens, num_prompt).astype(np.int32),
        "prompt_mel": _log_mel(rng, 2 * num_prompt, stage.num_mels),
        "speaker_embedding": rng.normal(size=stage.speaker_dim).astype(np.float32),
        "speech_tokens": rng.integers(0, stage.num_speech_tokens, min(mask.chunk, 100) + 8).astype(np.int32),
    }


def answer(name: str, stage: Any, mask: ChunkMask, question: Mapping[str, Any]) -> Answer:
    """What the stage of this name says to its question; arrays by quantity."""
    if name == TEXT_STAGE:
        ids = [np.array(stage.encode(str(text)), np.int32) for text in question["texts"]]
        return {"ids": np.concatenate(ids), "num_ids": np.array([len(each) for each in ids], np.int32)}
    if name == SPEECH:
        return _speech_answer(stage, question)
    if name == MEL:
        return {"mel": _mel_answer(stage, mask, question)}
    if name == WAVE:
        return {"waveform": _wave_answer(stage, question)}
    if name == TOKENS:
        return {"speech_tokens": np.asarray(stage.tokenize(question["waveform"]))}
    if name == PROMPT_MEL:
        return {"prompt_mel": np.asarray(stage.make(question["waveform"]))}
    return {"speaker_embedding": np.asarray(stage.embed(question["waveform"]))}


def write_golden(path: str | os.PathLike[str], name: str, question: Answer, wanted: Answer) -> None:
    """Writes a question with the answer wanted as BUNDLE/golden/NAME.npz; UserError for an answer that is not finite."""
    for quantity, values in wanted.items():
        if not np.all(np.isfinite(values)):
            raise UserError(f"{name}: the model's own {quantity} in float32 is not finite; export another checkpoint")
    arrays: dict[str, Any] = {f"asked_{key}": value for key, value in question.items()}
    arrays |= {f"wanted_{key}": value for key, value in wanted.items()}
    data = io.BytesIO()
    np.savez(data, **arrays)
    write_bytes(pathlib.Path(path, GOLDEN, f"{name}.npz"), data.getvalue())


def read_golden(path: str | os.PathLike[str], name: str) -> tuple[Answer, Answer]:
    """(question, answer wanted) that `write_golden` wrote."""
    with np.load(pathlib.Path(path, GOLDEN, f"{name}.npz")) as file:
        arrays = {key: file[key] for key in file.files}
    asked, wanted = (
        {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
        for prefix in ("asked_", "wanted_")
    )
    return asked, wanted


def run_gate(path: str | os.PathLike[str], bundle: Bundle) -> Iterator[Check]:
    """Asks every stage of a loaded bundle, in the order of speech, and compares with what the fp32 model said.

    Of a stage's parameters, first, the share that is not finite is told: a question need not touch them all.
    """
    bounds = BOUNDS[bundle.facts.dtype]
    for name in ORDER:
        if not pathlib.Path(path, GOLDEN, f"{name}.npz").is_file():
            continue
        asked, wanted = read_golden(path, name)
        start = time.perf_counter()
        file = pathlib.Path(path, PARAMETERS, f"{name}.safetensors")
        if file.is_file():
            share = share_not_finite(read_arrays(file))
            yield Check(stage=name, quantity="parameters", error=share, bound=0.0, seconds=time.perf_counter() - start)
        start = time.perf_counter()
        try:
            found = answer(name, find_stage(bundle, name), bundle.facts.mask, asked)
        except NonFinite:
            found = {}
        seconds = time.perf_counter() - start
        for quantity, values in wanted.items():
            error = relative_error(found[quantity], values) if found else math.inf
            bound = bounds.get(quantity, 0.0)
            yield Check(stage=name, quantity=quantity, error=error, bound=bound, seconds=seconds)


def share_not_finite(arrays: Mapping[str, np.ndarray]) -> float:
    """Of all numbers of these arrays, the share that is NaN or infinite."""
    size = sum(array.size for array in arrays.values())
    return sum(_num_not_finite(array) for array in arrays.values()) / max(size, 1)


def first_drift(checks: list[Check]) -> Check | None:
    """The first that does not pass."""
    return next((check for check in checks if not check.passes), None)


def relative_error(found: Shaped[np.ndarray, "..."], wanted: Shaped[np.ndarray, "..."]) -> float:
    """|found - wanted| / |wanted| over the whole array, of whole numbers the share that differs; inf where it is none."""
    if found.shape != wanted.shape or not np.all(np.isfinite(found)):
        return math.inf
    if wanted.dtype.kind in "iu":
        return float(np.mean(found != wanted)) if wanted.size else 0.0
    difference = np.linalg.norm((found.astype(np.float64) - wanted).ravel())
    return float(difference / max(float(np.linalg.norm(wanted.astype(np.float64).ravel())), 1e-30))


def format_checks(checks: list[Check]) -> str:
    """A table: a row each."""
    rows = [("stage", "quantity", "error", "bound", "seconds", "")]
    for check in checks:
        bound = "-" if check.bound is None else f"{check.bound:g}"
        state = "ok" if check.passes else "DRIFTS"
        rows.append((check.stage, check.quantity, f"{check.error:.2e}", bound, f"{check.seconds:.2f}", state))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _num_not_finite(array: np.ndarray) -> int:
    if array.dtype.itemsize == 2:  # bfloat16, of which numpy knows nothing: all bits of the exponent are set
        return int(np.sum((array.view(np.uint16) & 0x7F80) == 0x7F80))
    return int(np.sum(~np.isfinite(array)))


def _speech_question(stage: SpeechStage, tokenizer: TextTokenizer, rng: np.random.Generator) -> Answer:
    text = tokenizer.encode(TEXTS[0])[:24]
    speech = rng.integers(0, stage.num_speech_tokens, 8).tolist()
    tokens = [SOS, *text, TASK, *speech]
    kinds = [SPECIAL, *[TEXT] * len(text), SPECIAL, *[SPEECH_KIND] * len(speech)]
    return {
        "tokens": np.array(tokens, np.int32),
        "kinds": np.array(kinds, np.int32),
        "given": rng.integers(0, stage.num_speech_tokens, _NUM_DRAWS).astype(np.int32),
        "key": key_data(jax.random.key(7))[0],
    }


def _speech_answer(stage: SpeechStage, question: Mapping[str, Any]) -> Answer:
    """Logits behind the prompt and behind given tokens, and what is drawn behind the prompt, in the last slot."""
    num_slots = stage.slot_counts[-1] if stage.slot_counts else stage.slot_multiple
    row, tokens, kinds, given = num_slots - 1, question["tokens"], question["kinds"], question["given"]
    state = stage.init_state(num_slots, stage.cache_lengths[0])
    feed = lambda state, tokens, kinds: _feed(stage, state, num_slots, tokens, kinds)  # noqa: E731
    state = feed(state, tokens, kinds)
    logits = [_logits(state)[row]]
    state = feed(state, given, np.full(len(given), SPEECH_KIND, np.int32))
    logits.append(_logits(state)[row])
    state = feed(stage.reset(state, np.ones(num_slots, bool)), tokens, kinds)
    drawn: list[int] = []
    while len(drawn) < _NUM_DRAWS:
        budget = min(_NUM_DRAWS - len(drawn), stage.num_steps)
        state, made = stage.decode(state, _controls(stage, num_slots, question["key"], budget))
        new = np.asarray(made.speech_tokens)[row, :budget]
        drawn += new.tolist()
        if np.any(new < 0):  # its scores are not finite
            break
    return {"logits": np.stack(logits), "drawn": np.array(drawn, np.int32)}


def _controls(stage: SpeechStage, num_slots: int, key: np.ndarray, budget: int) -> Controls:
    """So many draws of the last slot, with the default options and no end."""
    whole = lambda number: np.full(num_slots, number, np.int32)  # noqa: E731
    options = {
        name: np.full(num_slots, value, np.float32 if isinstance(value, float) else np.int32)
        for name, value in stage.sampler.row({}).items()
    }
    return Controls(
        key=np.stack([key] * num_slots),
        options=options,
        min_length=whole(0),
        max_length=whole(1000),
        budget=np.where(np.arange(num_slots) == num_slots - 1, budget, 0).astype(np.int32),
        may_end=np.zeros(num_slots, bool),
    )


def _feed(stage: SpeechStage, state: State, num_slots: int, tokens: np.ndarray, kinds: np.ndarray) -> State:
    sizes = stage.prefill_sizes
    size = next((size for size in sizes if size >= len(tokens)), sizes[-1])
    for at in range(0, len(tokens), size):
        fed = np.zeros((2, num_slots, size), np.int32)
        num = min(size, len(tokens) - at)
        fed[0, -1, :num], fed[1, -1, :num] = tokens[at : at + num], kinds[at : at + num]
        counts = np.zeros(num_slots, np.int32)
        counts[-1] = num
        state = stage.prefill(state, fed[0], fed[1], counts)
    return state


def _logits(state: State) -> np.ndarray:
    """Of what follows: a field of the model's state, an entry of a bundle's."""
    return np.asarray(state["logits"] if isinstance(state, Mapping) else state.logits)


def _mel_answer(stage: MelStage, mask: ChunkMask, question: Mapping[str, Any]) -> np.ndarray:
    """A voice enrolled, and two hops behind it."""
    streams = MelStreams(stage, mask)
    prompt = Prompt(
        speaker_embedding=question["speaker_embedding"],
        speech_tokens=question["prompt_tokens"],
        mel=question["prompt_mel"],
        key=jax.random.key(3),
    )
    stream, tokens = streams.start(streams.enroll(prompt), jax.random.key(5)), question["speech_tokens"]
    size = stream.num_to_border()
    first = stream.hop(tokens[:size], tokens[size : size + LOOKAHEAD])
    return np.concatenate([first, stream.hop(tokens[size:])])


def _wave_answer(stage: WaveStage, question: Mapping[str, Any]) -> np.ndarray:
    stream, ends = WaveStreams(stage).start(jax.random.key(5)), [0, *itertools.accumulate(_FRAMES)]
    hops = [stream.hop(question["mel"][start:end], last=end == ends[-1]) for start, end in itertools.pairwise(ends)]
    return np.concatenate(hops)


def _log_mel(rng: np.random.Generator, num_frames: int, num_mels: int) -> Float32[np.ndarray, "F M"]:
    """Numbers like a log-mel's: smooth over time, louder in the low bins."""
    steps = rng.normal(size=(num_frames, num_mels)).cumsum(axis=0)
    steps -= np.linspace(0, 1, num_frames)[:, None] * steps[-1]
    return (-4 - 3 * np.linspace(0, 1, num_mels) + 0.4 * steps).astype(np.float32)


def _recording(rng: np.random.Generator, rate_hz: int) -> Float32[np.ndarray, " W"]:
    """A voice of moving pitch with hisses between, as long as _SECONDS."""
    t = np.arange(round(_SECONDS * rate_hz)) / rate_hz
    phase = 2 * np.pi * np.cumsum(130 + 30 * np.sin(5 * t)) / rate_hz
    voiced = sum(0.8**k * np.sin(k * phase) for k in range(1, 20))
    beat = np.sin(2 * np.pi * 3 * t)
    wave = 0.1 * voiced * np.clip(beat, 0, 1) + 0.02 * rng.normal(size=len(t)) * np.clip(-beat, 0, 1)
    return (wave + 1e-4 * rng.normal(size=len(t))).astype(np.float32)
