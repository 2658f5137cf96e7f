"""`cv2jax bench synth`: requests through the whole engine: first audio, real-time factor, hops, stages; and a soak.

The scenario is that of spec/official.md D: a voice of 87 tokens whose text has 20 ids, a text of 40 ids, 250 tokens
drawn. Runs in a process of its own, as `python -m cv2jax.jobs.bench_synth PART OPTIONS PLACE`.
"""

import dataclasses
import gc
import json
import pathlib
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from cv2jax.config import UserError, load_config
from cv2jax.jobs.bench_lm import Figure
from cv2jax.jobs.bench_options import BenchOptions
from cv2jax.jobs.bench_parts import describe_machine, make_measurement
from cv2jax.models.flow_matching.config import FlowMatchingConfig
from cv2jax.models.flow_matching.model import init_params as init_flow
from cv2jax.models.hift_vocoder.config import HiftVocoderConfig
from cv2jax.models.hift_vocoder.model import init_params as init_vocoder
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig
from cv2jax.models.text_speech_lm.model import init_params as init_lm
from cv2jax.models.text_speech_lm.qwen2 import Qwen2Config
from cv2jax.synthesis.engine import Engine
from cv2jax.synthesis.plan import HopPlan
from cv2jax.synthesis.request import Request
from cv2jax.synthesis.result import STAGES, Pcm
from cv2jax.synthesis.sampling import RequestSampler
from cv2jax.synthesis.session import Session
from cv2jax.synthesis.stages import FRAMES_PER_TOKEN, TOKENS_PER_SECOND, Stages
from cv2jax.synthesis.voice import Voice, load_voice, voices_in
from cv2jax.tasks.engine import EngineOptions, load_engine
from cv2jax.tasks.model_directory import VOICES
from cv2jax.tasks.stages import make_mel_stage, make_speech_stage, make_wave_stage
from cv2jax.text.tokenizer import train_text_tokenizer

_PROMPT_TOKENS, _PROMPT_TEXT, _TEXT, _DRAWN = 87, 20, 40, 250  # ids and speech tokens of the scenario
_SOAK, _SETTLED = 200, 60  # requests; from this one on memory must not grow
_CPU_FACTOR = 5.0  # real-time factor that hops are planned for at official size on a CPU: there nothing keeps up
_SOAKED = ("ok", "hit_limit", "cancelled")  # how a request of the soak may end
_MEGABYTE = 1 << 20
_BYTES = 300  # ids of a tokenizer that has merged nothing: one a byte


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """An engine and what it is asked."""

    name: str
    engine: Engine
    voice: Voice
    text: str
    num_tokens: int

    def request(self, seed: int = 0, **changes: Any) -> Request:
        """The scenario's request, which draws exactly `num_tokens`."""
        lengths = {"min_length": self.num_tokens, "max_length": self.num_tokens}
        return dataclasses.replace(Request(voice=self.voice, text=self.text, seed=seed, **lengths), **changes)


def make_workload(options: BenchOptions) -> Workload:
    """The workload of a model directory (`options.run`), or of a size of SIZES with random parameters.

    UserError for a directory that cannot speak or has no voice.
    """
    seconds, num_slots = options.seconds or _DRAWN / TOKENS_PER_SECOND, max(options.concurrent, 1)
    num_tokens = round(TOKENS_PER_SECOND * seconds)
    if options.run:
        voices = voices_in(pathlib.Path(options.run) / VOICES)
        if not voices:
            raise UserError(f"run={options.run}: has no voice; `cv2jax enroll` one there")
        engine = load_engine(options.run, EngineOptions(num_slots=num_slots, normalizer=""))
        name, text = f"model {pathlib.Path(options.run).name}", "one two three four five six seven eight."
        voice = load_voice(next(iter(voices.values())))
    else:
        is_tiny = (options.size or "tiny") == "tiny"
        engine = random_engine(is_tiny=is_tiny, num_slots=num_slots)
        name, text = f"{'tiny' if is_tiny else 'official'}, random parameters", _letters(_TEXT)
        voice = random_voice(engine)
    return Workload(name=name, engine=engine, voice=voice, text=text, num_tokens=num_tokens)


def random_engine(*, is_tiny: bool, num_slots: int) -> Engine:
    """An engine with the presets' tiny sizes, or the official ones; fp32 on a CPU, elsewhere bf16 but for the vocoder."""
    on_cpu, key = jax.default_backend() == "cpu", jax.random.key(0)
    dtype = "float32" if on_cpu else "bfloat16"
    if is_tiny:
        presets: list[Any] = [load_config(f"{name}_tiny").model for name in ("text_speech_lm", "flow_matching")]
        lm, flow = presets
        lm = dataclasses.replace(lm, backbone=dataclasses.replace(lm.backbone, vocabulary_size=_BYTES))
        preset: Any = load_config("hift_vocoder_tiny").model
        vocoder = preset.generator
    else:
        lm, flow, vocoder = TextSpeechLmConfig(backbone=Qwen2Config()), FlowMatchingConfig(), HiftVocoderConfig()
    lm = dataclasses.replace(lm, backbone=dataclasses.replace(lm.backbone, dtype=dtype, scan_layers=False))
    # A scan on a CPU copies each layer's weights.
    flow = dataclasses.replace(flow, dtype=dtype, scan_layers=flow.scan_layers and not on_cpu)

    def init(make: Any, config: Any) -> Any:
        return jax.jit(lambda key: nn.unbox(make(config, key)))(key)

    stages = Stages(
        speech=make_speech_stage(lm, init(init_lm, lm), RequestSampler()),
        mel=make_mel_stage(flow, init(init_flow, flow)),
        wave=make_wave_stage(vocoder, init(init_vocoder, vocoder)),
    )
    tokenizer = train_text_tokenizer([""], _BYTES)
    plan = HopPlan(real_time_factor=_CPU_FACTOR) if on_cpu and not is_tiny else HopPlan()
    return Engine(stages, tokenizer, plan=plan, num_slots=num_slots, max_voices=1, normalizer="")


def random_voice(engine: Engine) -> Voice:
    """The voice of the scenario."""
    rng, mel = np.random.default_rng(0), engine.stages.mel
    frames = (FRAMES_PER_TOKEN * _PROMPT_TOKENS, mel.num_mels)
    return Voice(
        speaker_embedding=rng.standard_normal(mel.speaker_dim, np.float32),
        speech_tokens=rng.integers(0, mel.num_speech_tokens, _PROMPT_TOKENS, np.int32),
        mel=rng.standard_normal(frames, np.float32),
        text=_letters(_PROMPT_TEXT),
        name="random",
    )


def _letters(number: int) -> str:
    """So many ids of a tokenizer of bytes: words of four letters and a full stop."""
    return "".join(" " if i % 5 == 4 else "etaoins"[i % 7] for i in range(number - 1)) + "."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heard:
    """One request as its listener has it."""

    session: Session
    times: list[float]  # seconds from its opening to each frame
    frames: list[Pcm]

    @property
    def longest_wait(self) -> float:
        """Seconds that a player which starts with the first frame stands still at once, at most."""
        rate, wait, clock = self.session.result.rate_hz, 0.0, self.times[0]
        for at, frame in zip(self.times, self.frames, strict=True):
            wait = max(wait, at - clock)
            clock = max(clock, at) + len(frame.samples) / rate
        return wait


def listen(engine: Engine, requests: Sequence[Request], pieces: Sequence[str] = ()) -> list[Heard]:
    """All requests at once, each frame with its time; `pieces` are pushed to those whose text arrives, each when all waits."""
    begun = time.perf_counter()
    found = [Heard(session=engine.open(request), times=[], frames=[]) for request in requests]
    waiting = list(pieces)
    while not all(one.session.ended for one in found):
        works = engine.advance()
        now = time.perf_counter() - begun
        for one in found:
            frames = one.session.take()
            one.frames.extend(frames)
            one.times.extend([now] * len(frames))
        if works:
            continue
        for one in found:
            if waiting and one.session.request.arriving:
                one.session.push_text(waiting[0])
            elif one.session.request.arriving:
                one.session.flush()
        waiting = waiting[1:]
    return found


def measure_synth(options: BenchOptions, place: pathlib.Path | None = None) -> list[Figure]:
    """All figures: text in hand, text arriving, requests at once; a soak at the tiny size.

    At official size on a CPU also what the official stream takes in PyTorch, for which files are written to `place`.
    """
    is_official = not options.run and options.size == "official"
    theirs = None
    if place is not None and is_official and options.against and jax.default_backend() == "cpu":
        theirs = _official_stream(options, place)  # first, and gone before ours takes memory
    work = make_workload(options)
    start = time.perf_counter()
    # Rooms and hops of a whole request: caches that the next one takes over are larger than those it would begin with.
    work.engine.warm_up(work.voice, work.num_tokens / TOKENS_PER_SECOND)
    case = f"{work.name}, voice of {len(work.voice.speech_tokens)} tokens"
    figures: list[Figure] = [(f"{case}, solved and compiled", "s", [time.perf_counter() - start])]
    words = [word + " " for word in work.text.split()]
    in_hand = _case(f"{case}, text in hand", work, options.repeats, 1, [])
    figures += in_hand
    if theirs is not None:
        (ours,) = (values for name, _, values in in_hand if " of speech" in name and ": all " in name)
        figures += [(f"official stream in PyTorch, {name}", "s", [seconds]) for name, seconds in theirs.items()]
        ratios = [sum(theirs.values()) / seconds for seconds in ours]
        figures.append((f"{case}, text in hand: all of ours against these two of PyTorch", "x", ratios))
    figures += _case(f"{case}, text arriving", work, options.repeats, 1, words)
    if options.concurrent > 1:
        figures += _case(f"{case}, {options.concurrent} at once", work, options.repeats, options.concurrent, [])
    if not options.run and (options.size or "tiny") == "tiny":
        figures += _soaked(work)
    return figures


def _official_stream(options: BenchOptions, place: pathlib.Path) -> dict[str, float]:
    """Seconds of two parts of the official stream in PyTorch, once: they take minutes."""
    from cv2jax.jobs import bench_synth_torch  # not above: torch is an extra

    num_tokens = round(options.seconds * TOKENS_PER_SECOND) or _DRAWN
    lm, flow = TextSpeechLmConfig(backbone=Qwen2Config(scan_layers=False)), FlowMatchingConfig()
    lengths = {"num_prompt": _PROMPT_TOKENS, "num_tokens": num_tokens}
    return {
        f"{num_tokens} tokens drawn": bench_synth_torch.time_language_model(
            lm, place, num_text=_PROMPT_TEXT + _TEXT, **lengths
        ),
        "velocity network of all packets": bench_synth_torch.time_velocity(flow, **lengths),
    }


def _case(case: str, work: Workload, repeats: int, number: int, words: list[str]) -> list[Figure]:
    """First once, to compile."""
    changes = {"text": "", "arriving": True} if words else {}
    requests = [work.request(seed, **changes) for seed in range(number)]
    runs = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        heard = listen(work.engine, requests, words)
        runs.append((time.perf_counter() - begun, heard))
    runs = runs[1:]
    case = f"{case}, {work.num_tokens} tokens"
    for _, heard in runs:
        if any(one.session.result.num_speech_tokens != work.num_tokens for one in heard):
            raise RuntimeError(f"{case}: {[one.session.result for one in heard]}")
    of_all = lambda value: [value(heard) for _, heard in runs]  # noqa: E731
    seconds = sum(one.session.result.audio_seconds for one in runs[0][1])
    intervals = of_all(lambda heard: max(max(np.diff(one.times), default=0.0) for one in heard))
    samples = len(runs[0][1][0].frames[0].samples) / runs[0][1][0].session.result.rate_hz
    figures: list[Figure] = [
        (f"{case}: first audio ({samples:.2f} s of it)", "s", of_all(lambda heard: max(one.times[0] for one in heard))),
        (f"{case}: real-time factor", "", [wall / seconds for wall, _ in runs]),
        (f"{case}: all {seconds:g} s of speech", "s", [wall for wall, _ in runs]),
        (f"{case}: longest time between frames, of {len(runs[0][1][0].frames)}", "s", intervals),
        (f"{case}: a player waits at most", "s", of_all(lambda heard: max(one.longest_wait for one in heard))),
    ]
    for stage in STAGES:
        mean = lambda heard, stage=stage: statistics.mean(one.session.seconds[stage] for one in heard)  # noqa: E731
        figures.append((f"{case}: {stage}", "s", of_all(mean)))
    return figures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Soaked:
    """What many mixed requests left behind: resident megabytes and arrays on the device after each, and how each ended."""

    megabytes: list[float]
    num_arrays: list[int]
    statuses: list[str]


def soak(engine: Engine, voice: Voice, text: str, *, num_requests: int, num_tokens: int = 30) -> Soaked:
    """Requests of mixed modes, lengths, speeds and seeds, two at a time, a fifth of which are cancelled on the way.

    The words of those whose text arrives are pushed while the others run. RuntimeError for one that ends in another way than
    `ok`, `hit_limit` or `cancelled`.
    """
    rng, statuses = random.Random(0), []
    megabytes, num_arrays = [], []
    source = np.arange(num_tokens, dtype=np.int32) % engine.stages.mel.num_speech_tokens
    for number in range(0, num_requests, 2):
        sessions = [_mixed(engine, voice, text, source, rng, number + i) for i in range(2)]
        words = {session: text.split() for session in sessions if session.request.arriving}
        victims = [session for session in sessions if rng.random() < 0.2]
        for session in victims:
            for _ in range(rng.randrange(4)):
                _push_words(words)
                engine.advance()
            session.cancel()
        while _push_words(words) | engine.advance():
            for session in sessions:
                session.take()
        results = [session.result for session in sessions]
        if bad := [result for result in results if result.status not in _SOAKED]:
            raise RuntimeError(f"soak, requests {number} and {number + 1}: {bad}")
        statuses += [result.status for result in results]
        del sessions, victims, words
        gc.collect()
        megabytes += [_resident_mb()] * 2
        num_arrays += [len(jax.live_arrays())] * 2
    return Soaked(megabytes=megabytes, num_arrays=num_arrays, statuses=statuses)


def _push_words(words: dict[Session, list[str]]) -> bool:
    """The next word to each session whose text arrives, behind the last its end; whether there was one to push."""
    for session, rest in list(words.items()):
        if rest:
            session.push_text(rest.pop(0) + " ")
        else:
            session.flush()
            del words[session]
    return bool(words)


def _mixed(engine: Engine, voice: Voice, text: str, source: np.ndarray, rng: random.Random, seed: int) -> Session:
    mode = rng.choice(("zero_shot", "cross_lingual", "instruct", "speaker", "conversion", "arriving"))
    number = rng.randrange(5, len(source) + 1)
    common: dict[str, Any] = {"voice": voice, "seed": seed, "speed": rng.choice((1.0, 1.0, 0.8, 1.3))}
    if mode == "conversion":
        return engine.open(Request(mode=mode, source_tokens=source[:number], **common))
    common |= {"min_length": number, "max_length": number}
    if mode == "arriving":
        return engine.open(Request(arriving=True, **common))
    common["text"] = text
    return engine.open(Request(mode=mode, instruct="softly" if mode == "instruct" else "", **common))


def _resident_mb() -> float:
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return float("nan")
    return pages * 4096 / _MEGABYTE


def _soaked(work: Workload) -> list[Figure]:
    found = soak(work.engine, work.voice, work.text, num_requests=_SOAK)
    case = f"{work.name}, soak of {_SOAK} mixed requests, {found.statuses.count('cancelled')} cancelled"
    settled = f"{case}, from number {_SETTLED} to the end"
    return [
        (f"{case}: resident at the end", "MB", [found.megabytes[-1]]),
        (f"{settled}: grown by", "MB", [found.megabytes[-1] - found.megabytes[_SETTLED]]),
        (f"{settled}: more arrays", "", [float(found.num_arrays[-1] - found.num_arrays[_SETTLED])]),
    ]


def main(arguments: list[str]) -> int:
    """Measures and leaves `PLACE/result.json`; 2 after a user's mistake, said on stderr."""
    part, options, place = arguments[0], BenchOptions(**json.loads(arguments[1])), pathlib.Path(arguments[2])
    try:
        figures = measure_synth(options, place)
    except UserError as error:
        print(f"bench {part}: {error}", file=sys.stderr)
        return 2
    measurements = [dataclasses.asdict(make_measurement(part, *figure)) for figure in figures]
    result = {"machine": describe_machine(), "measurements": measurements}
    (place / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
