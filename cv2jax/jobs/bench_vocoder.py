"""`cv2jax bench vocoder`: utterances in one piece and hop by hop, what a stream keeps, and what a smaller hold-back costs.

As in `bench_lm` the sides of a comparison take turns, and a ratio is taken within a repeat. Runs in a process of its own, as
`python -m cv2jax.jobs.bench_vocoder PART OPTIONS PLACE`.
"""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Key, PyTree

from cv2jax.audio.io import load_waveform
from cv2jax.audio.mel import mel_spectrogram
from cv2jax.config import MeshConfig, UserError, load_config
from cv2jax.jobs.bench_lm import Figure, compared, race, require_equal
from cv2jax.jobs.bench_options import BenchOptions
from cv2jax.jobs.bench_parts import describe_machine, make_measurement, make_speech
from cv2jax.models.hift_vocoder.config import F0_LAYERS, HiftVocoderConfig
from cv2jax.models.hift_vocoder.model import HiftOutput, HiftState, HiftVocoder, hold_back, init_params
from cv2jax.models.hift_vocoder.stream import init_state, step
from cv2jax.nn.signal import ENDLESS
from cv2jax.parallel.mesh import make_mesh
from cv2jax.synthesis.wave_stream import WaveStreams
from cv2jax.tasks.stages import make_wave_stage
from cv2jax.tasks.trained import load_vocoder

_HOP_SECONDS = 1  # the official hop: 25 tokens, 50 frames
_HISTORIES = (5, 60)  # seconds before a hop
_OVERLAP = 8  # frames that upstream decodes again with each hop (spec/official.md 6.2)
_HOLD_BACKS = (6300, 3840, 1920, 960)  # samples, where they are fewer than the model's own
_TOLERANCE, _MOST_DECIBELS = 1e-4, 200.0  # of full scale, that both sides may differ by; an error of nothing
_OURS, _WHOLE, _ANEW = "ours", "in one piece", f"{_OVERLAP} frames of each hop decoded anew"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A vocoder, and what it is asked to speak."""

    name: str
    config: HiftVocoderConfig
    params: PyTree
    mel: Float32[np.ndarray, "F M"]  # whole hops of it
    batch_sizes: tuple[int, ...] = (1,)
    dtypes: tuple[str, ...] = ("float32",)

    @property
    def hop(self) -> int:
        """Frames of a hop."""
        return _HOP_SECONDS * self.config.frame_rate_hz

    @functools.cached_property
    def hold_back(self) -> int:
        """Samples that a stream is late."""
        return hold_back(self.config)

    @property
    def num_flush(self) -> int:
        """Frames behind an utterance that bring out what was held back."""
        return -(-self.hold_back // self.config.mel_hop)

    def in_dtype(self, dtype: str) -> "Workload":
        """The same, computed in another type."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, dtype=dtype))

    def describe(self) -> str:
        """Name, size and precision, for a case."""
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"{self.name} ({count / 1e6:.1f} M parameters), {self.config.dtype}"

    def rows(self, num_rows: int, frames: slice = slice(None)) -> tuple[Float[Array, "B F M"], Key[Array, " B"]]:
        """(mel, keys) of so many rows of these frames."""
        mel = jnp.repeat(jnp.asarray(self.mel[None, frames]), num_rows, axis=0)
        return mel, jax.random.split(jax.random.key(0), num_rows)


def make_workload(options: BenchOptions) -> Workload:
    """The workload of a run, or of a size of SIZES with random parameters. UserError for runs and audio that cannot be used."""
    on_cpu = jax.default_backend() == "cpu"
    if options.run:
        config, params = load_vocoder(options.run, make_mesh(MeshConfig(), jax.local_devices()[:1]))
        params, name = jax.device_put(jax.device_get(params)), f"run {pathlib.Path(options.run).name}"
    else:
        is_tiny = (options.size or "tiny") == "tiny"
        model: Any = load_config("hift_vocoder_tiny").model
        config = model.generator if is_tiny else HiftVocoderConfig()
        params = jax.jit(lambda key: nn.unbox(init_params(config, key)))(jax.random.key(0))
        name = f"{'tiny' if is_tiny else 'official'}, random parameters"
    return Workload(
        name=name,
        config=config,
        params=params,
        mel=make_mel(config, options),
        batch_sizes=(options.batch,) if options.batch else (1,) if on_cpu else (1, 16),
        dtypes=("float32",) if on_cpu else ("float32", "bfloat16"),
    )


def make_mel(config: HiftVocoderConfig, options: BenchOptions) -> Float32[np.ndarray, "F M"]:
    """Whole seconds of log-mel of `options.audio`, or of made-up speech; UserError for audio under two seconds."""
    seconds, rate = max(2, round(options.seconds or 10.0)), config.rate_hz
    if options.audio:
        waveform = load_waveform(options.audio, rate)
        seconds = min(seconds, len(waveform) // rate)
        if seconds < 2:
            raise UserError(f"--audio {options.audio}: lasts {len(waveform) / rate:.2f} s; give 2 s or more")
    else:
        waveform = make_speech(0, seconds * rate, rate)
    mel, _ = mel_spectrogram(waveform[None, : seconds * rate])
    return np.ascontiguousarray(np.asarray(mel)[0].T, np.float32)


def measure_vocoder(options: BenchOptions) -> list[Figure]:
    """All figures of a vocoder."""
    work = make_workload(options)
    figures: list[Figure] = []
    for each in map(work.in_dtype, work.dtypes):
        for num_rows in work.batch_sizes:
            figures += _offline(each, num_rows, options.repeats) + _hops(each, num_rows, options.repeats)
        figures += _first_hop(each, options.repeats) + _utterance(each, options.repeats)
    return figures + _sizes(work) + _early(work)


@functools.partial(jax.jit, static_argnums=0)
def _speak(config: HiftVocoderConfig, params: Any, mel: Array, keys: Array) -> HiftOutput:
    made: Any = HiftVocoder(config).apply({"params": params}, mel, keys)
    return made


def _decode(config: HiftVocoderConfig, params: Any, mel: Array | np.ndarray, keys: Array) -> Float[Array, "B W"]:
    return _speak(config, params, mel, keys).waveform


def _offline(work: Workload, num_rows: int, repeats: int) -> list[Figure]:
    mel, keys = work.rows(num_rows)
    run = lambda: jax.block_until_ready(_decode(work.config, work.params, mel, keys))  # noqa: E731
    run()
    times, seconds = race({_OURS: run}, repeats)[_OURS], len(work.mel) // work.config.frame_rate_hz
    case = f"{work.describe()}, {num_rows} x {seconds} s in one piece"
    return [(case, "s", times), (case, "real-time factor", [s / (num_rows * seconds) for s in times])]


def _hops(work: Workload, num_rows: int, repeats: int) -> list[Figure]:
    """A hop behind short and long histories, the stream's first (its state is made with it), and the flush.

    What a hop costs hangs on shapes alone: a state stands after a minute when its count of frames says so.
    """
    c, (mel, keys) = work.config, work.rows(num_rows, slice(0, work.hop))
    of = lambda number: jnp.full(num_rows, number, jnp.int32)  # noqa: E731
    advance = functools.partial(step, c, work.params)
    one = (mel, keys, of(work.hop), of(ENDLESS))
    _, start = advance(init_state(c, num_rows), *one)

    def after(seconds: int) -> HiftState:
        return start.replace(num_frames=of(seconds * c.frame_rate_hz))

    states = {seconds: after(seconds) for seconds in _HISTORIES}
    silence, ends = jnp.zeros((num_rows, work.num_flush, c.num_mels)), states[_HISTORIES[0]].num_frames
    runs: dict[str, Callable[[], Any]] = {
        f"after {seconds} s": lambda state=state: jax.block_until_ready(advance(state, *one))
        for seconds, state in states.items()
    }
    near, far = runs
    state = states[_HISTORIES[0]]
    flush = f"flush of {work.num_flush} frames"
    runs[flush] = lambda: jax.block_until_ready(advance(state, silence, keys, of(work.num_flush), ends))
    for run in runs.values():
        run()
    times = race(runs, repeats)
    case = f"{work.describe()}, {num_rows} x hop of {work.hop} frames"
    figures = [(f"{case}, {name}", "ms", _milliseconds(values)) for name, values in times.items() if name != flush]
    factors = [s / (num_rows * _HOP_SECONDS) for s in times[near]]
    growth = [b / a for a, b in zip(times[near], times[far], strict=True)]
    return [
        *figures,
        (f"{case}, {near}", "real-time factor", factors),
        (f"{case}, time {far} over time {near}", "x", growth),
        (f"{work.describe()}, {num_rows} x {flush}", "ms", _milliseconds(times[flush])),
    ]


def _first_hop(work: Workload, repeats: int) -> list[Figure]:
    """As a request sees it: from mel in memory to samples in memory, the state made on the way."""
    streams = WaveStreams(make_wave_stage(work.config, work.params))
    run = lambda: streams.start(jax.random.key(0)).hop(work.mel[: work.hop])  # noqa: E731
    run()
    times = race({_OURS: run}, repeats)[_OURS]
    return [(f"{work.describe()}, first hop of {work.hop} frames with its state", "ms", _milliseconds(times))]


def _utterance(work: Workload, repeats: int) -> list[Figure]:
    """A stream's hops and flush against one piece, which says the same, and against upstream's way, which does not."""
    c, num_frames = work.config, len(work.mel)
    starts = range(0, num_frames, work.hop)
    keys = work.rows(1)[1]
    known = np.concatenate([work.mel, np.zeros((work.num_flush, c.num_mels), np.float32)])
    spans = [(start, start + work.hop) for start in starts] + [(num_frames, len(known))]

    def ours() -> np.ndarray:
        state, parts = init_state(c, 1), []
        for start, end in spans:
            count = np.array([end - start], np.int32)
            total = np.array([num_frames if start == num_frames else ENDLESS], np.int32)
            made, state = step(c, work.params, state, known[None, start:end], keys, count, total)
            parts.append(np.asarray(made.waveform[0]))
        return np.concatenate(parts)[work.hold_back :][: num_frames * c.mel_hop]

    def decode(start: int, end: int) -> np.ndarray:
        return np.asarray(_decode(c, work.params, jnp.asarray(work.mel[None, start:end]), keys)[0])

    runs: dict[str, Callable[[], Any]] = {
        _OURS: ours,
        _WHOLE: lambda: decode(0, num_frames),
        # The first hop, which has nothing before it, as long as the others: one shape to compile.
        _ANEW: lambda: [decode(first := max(start - _OVERLAP, 0), first + work.hop + _OVERLAP) for start in starts],
    }
    waves = [run() for run in runs.values()][:2]
    if c.dtype == "float32" and jax.default_backend() == "cpu":  # elsewhere products of fp32 are less than that
        require_equal("waveforms", waves, tolerance=_TOLERANCE)
    times = {name: _milliseconds(values) for name, values in race(runs, repeats).items()}
    case = f"{work.describe()}, {num_frames // c.frame_rate_hz} s in {len(starts)} hops and a flush"
    return [*compared(case, "ms", times), *_differences(f"{case}, off one piece", waves[0], waves[1])]


def _sizes(work: Workload) -> list[Figure]:
    """Of a stream's state, and how late it is with and without F0's look-ahead."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(init_state(work.config, 1)))
    figures: list[Figure] = [(f"{work.describe()}, state of a stream", "kB", [size / 1e3])]
    for look_ahead in (F0_LAYERS, 0):
        late = hold_back(dataclasses.replace(work.config, f0_look_ahead=look_ahead))
        case = f"{work.name}, hold-back with {look_ahead} of {F0_LAYERS} layers of F0 looking ahead"
        figures += [(case, "samples", [float(late)]), (case, "ms", [1e3 * late / work.config.rate_hz])]
    return figures


def _early(work: Workload) -> list[Figure]:
    """How near samples are that were made from guessed frames.

    One stream tells it of every hold-back: behind each hop it says all from the model's own to the smallest, guessed. Random
    parameters say little of a trained vocoder: their kernels are small, and few of their frames are voiced, whose F0 matters.
    """
    hop, (mel, keys) = work.hop, work.rows(1)
    stream = WaveStreams(make_wave_stage(work.config, work.params)).start(keys[0])
    chosen = [size for size in _HOLD_BACKS if size < work.hold_back]
    starts = range(0, len(work.mel) - hop, hop)  # not the last, whose end is no guess
    parts = [stream.hop(work.mel[start : start + hop], hold_back=min(chosen, default=None)) for start in starts]
    made = _speak(work.config, work.params, mel, keys)
    heard, exact = np.concatenate(parts), np.asarray(made.waveform[0])
    ends = work.config.mel_hop * (np.array(starts) + hop)
    voiced = 100 * float(np.mean(np.asarray(made.f0) > work.config.voiced_above_hz))
    figures: list[Figure] = [(f"{work.name}, frames taken for voiced", "%", [voiced])]
    for size in chosen:
        at = np.concatenate([np.arange(max(end - work.hold_back, 0), end - size) for end in ends])
        case = f"{work.name}, early samples at a hold-back of {size} (exact: {work.hold_back})"
        figures += _differences(case, heard[at], exact[at])
    return figures


def _differences(case: str, made: Float[np.ndarray, " W"], exact: Float[np.ndarray, " W"]) -> list[Figure]:
    """Signal over error, and the largest error."""
    error = made.astype(np.float64) - exact
    power = float(np.mean(exact.astype(np.float64) ** 2)), float(np.mean(error**2))
    decibels = 10 * np.log10(max(power[0], 1e-30) / max(power[1], 1e-30))
    largest = 100 * float(np.abs(error).max())
    return [(case, "dB", [min(float(decibels), _MOST_DECIBELS)]), (case, "% of full scale, largest", [largest])]


def _milliseconds(seconds: list[float]) -> list[float]:
    return [1e3 * s for s in seconds]


def main(arguments: list[str]) -> int:
    """Measures and leaves `PLACE/result.json`; 2 after a user's mistake, said on stderr."""
    part, options, place = arguments[0], BenchOptions(**json.loads(arguments[1])), pathlib.Path(arguments[2])
    try:
        figures = measure_vocoder(options)
    except UserError as error:
        print(f"bench {part}: {error}", file=sys.stderr)
        return 2
    measurements = [dataclasses.asdict(make_measurement(part, *figure)) for figure in figures]
    result = {"machine": describe_machine(), "measurements": measurements}
    (place / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
