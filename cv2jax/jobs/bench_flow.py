"""`cv2jax bench flow-train`, `flow-offline` and `flow-stream`: the flow with random weights, and PyTorch beside it on a CPU.

As in `bench_lm` the sides of a comparison take turns, and a ratio is taken within a repeat. What PyTorch does is in
`bench_flow_torch.py`. Each part runs as `python -m cv2jax.jobs.bench_flow PART OPTIONS PLACE`, as those of `bench_parts.py`.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from cv2jax.config import load_config
from cv2jax.jobs.bench_lm import Figure, compared, matrix_rate, race, require_equal
from cv2jax.jobs.bench_options import BenchOptions
from cv2jax.jobs.bench_parts import describe_machine, make_measurement
from cv2jax.models.flow_matching.config import FRAMES_PER_TOKEN, LOOKAHEAD, FlowMatchingConfig
from cv2jax.models.flow_matching.draws import draw
from cv2jax.models.flow_matching.model import FlowMatching, flow_loss, init_params, padded_masks, solve
from cv2jax.models.flow_matching.step import FlowState, Hop, grow_state, init_state, step
from cv2jax.models.flow_matching.stream import recycle
from cv2jax.nn.cache import EMPTY, KeyValueCache
from cv2jax.nn.masks import NO_CHUNK, NO_LEFT, ChunkMask, MaskSpec
from cv2jax.nn.stack import unstack_layers
from cv2jax.synthesis.mel_stream import room_for

_TOKENS_PER_SECOND = 25
_CHUNK, _CACHED, _LEFT = 25, 75, 50  # tokens: the official chunk, 3 s of prompt, the left context where it is bounded
_PROMPT = _CACHED + LOOKAHEAD  # what a voice is solved for looks at nothing of a request
_HOPS, _CALL_FRAMES = (25, 50, 100), 250  # tokens, as upstream's runtime; of one call, as in spec/official.md D
_TOLERANCE, _MEGABYTE = 1e-4, 1 << 20  # absolute and relative, of what both sides compute; bytes
_OURS, _ANEW = "ours", "all solved anew each hop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, and what is asked of it."""

    name: str
    model: FlowMatching
    params: PyTree
    num_rows: int  # B of a training batch
    row_tokens: int  # L of it
    histories: tuple[int, int]  # seconds before a hop that sees all of them
    matrix_size: int = 1024  # of the product that gives the rate of the machine
    batch_sizes: tuple[int, ...] = (1,)  # of offline solves
    dtypes: tuple[str, ...] = ("float32",)  # of solves and streams
    schedules: tuple[tuple[int, ...], ...] = (_HOPS, (_CHUNK,))  # tokens of a stream's hops, the last again and again

    @functools.cached_property
    def step(self) -> Callable[..., tuple[Array, FlowState]]:
        """`step` of (params, state, hop), the state donated."""
        return jax.jit(functools.partial(step, self.model), donate_argnums=1)

    def solver(self, chunk: int) -> Callable[..., Array]:
        """`solve` of (params, batch, noise) with chunks of so many tokens."""
        mask = MaskSpec(kind="chunk", rows=(ChunkMask(chunk=chunk),))
        return jax.jit(lambda params, batch, noise: solve(self.model, params, batch, noise, mask))

    def in_dtype(self, dtype: str) -> "Workload":
        """The same, computed in another type."""
        config = dataclasses.replace(self.model.config, dtype=dtype)
        return dataclasses.replace(self, model=dataclasses.replace(self.model, config=config, parent=None))

    def unrolled(self) -> "Workload":
        """The same with each layer on its own: a scan on a CPU copies weights out of their stack."""
        config = dataclasses.replace(self.model.config, scan_layers=False)
        params = unstack_layers(self.params, ("blocks", "frame_blocks", "mid"))
        model = dataclasses.replace(self.model, config=config, parent=None)
        return dataclasses.replace(self, model=model, params=params)

    def describe(self) -> str:
        """Size and precision, for a case."""
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"{self.name} ({count / 1e6:.1f} M parameters), {self.model.config.dtype}"


def make_workload(size: str) -> Workload:
    """The workload of a size of SIZES; official caches hold 20 s where tiny ones hold 60 s, which would take 14 GB."""
    on_cpu, is_tiny = jax.default_backend() == "cpu", size == "tiny"
    config: Any = load_config("flow_matching_tiny").model if is_tiny else FlowMatchingConfig()
    config = dataclasses.replace(config, dtype="float32" if on_cpu else "bfloat16")
    num_rows, row_tokens = (16, 100) if is_tiny else (2, 125)
    return Workload(
        name=size,
        model=FlowMatching(config, impl=config.attention),
        params=jax.jit(lambda key: nn.unbox(init_params(config, key)))(jax.random.key(0)),
        num_rows=num_rows if on_cpu else 64,
        row_tokens=row_tokens if on_cpu else 250,
        histories=(5, 60) if is_tiny else (5, 20),
        matrix_size=2048 if on_cpu else 8192,
        batch_sizes=(1,) if on_cpu else (1, 16),
        dtypes=("float32",) if on_cpu else ("float32", "bfloat16"),
        schedules=(_HOPS,) if on_cpu and not is_tiny else (_HOPS, (_CHUNK,)),  # else an hour
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be solved: tokens [1 L], noise and prompt mel [1 F M], the speaker's embedding [1 E]."""

    speech_tokens: Int[np.ndarray, "1 L"]
    num_prompt: int  # tokens in front, 0 … L
    noise: Float[np.ndarray, "1 F M"]
    prompt_mel: Float[np.ndarray, "1 F M"]
    speaker_embedding: Float[np.ndarray, "1 E"]

    @property
    def num_tokens(self) -> int:
        """L."""
        return self.speech_tokens.shape[1]

    def ends(self, hops: tuple[int, ...] = _HOPS) -> list[int]:
        """Where hops end, the end of what the voice is solved for in front."""
        ends = [max(self.num_prompt - LOOKAHEAD, 0) // _CHUNK * _CHUNK]
        while ends[-1] < self.num_tokens:
            ends.append(min(ends[-1] + hops[min(len(ends), len(hops)) - 1], self.num_tokens))
        return ends

    def prefix(self, end: int) -> tuple[dict[str, Array], Array]:
        """(batch, noise) of `solve` for the tokens before `end`, with those that they look at and nothing else."""
        known = min(end + LOOKAHEAD, self.num_tokens)
        batch = {
            "speech_tokens": self.speech_tokens[:, :known],
            "num_tokens": np.array([end], np.int32),
            "num_lookahead": np.array([known - end], np.int32),
            "prompt_mel": self.prompt_mel[:, : FRAMES_PER_TOKEN * known],
            "speaker_embedding": self.speaker_embedding,
        }
        return jax.device_put((batch, self.noise[:, : FRAMES_PER_TOKEN * known]))

    def hop(self, start: int, end: int, *, left: int = NO_LEFT, prompt: int = 0) -> Hop:
        """The hop of the tokens [start, end); left and prompt: of its mask, in tokens."""
        known = min(end + LOOKAHEAD, self.num_tokens)
        frames = slice(FRAMES_PER_TOKEN * start, FRAMES_PER_TOKEN * end)
        one = lambda number: np.array([number], np.int32)  # noqa: E731
        fields = {
            "speech_tokens": np.pad(self.speech_tokens[:, start:known], [(0, 0), (0, LOOKAHEAD - (known - end))]),
            "num_tokens": one(end - start),
            "num_lookahead": one(known - end),
            "noise": self.noise[:, frames],
            "prompt_mel": self.prompt_mel[:, frames] if start < self.num_prompt else None,
            "speaker_embedding": self.speaker_embedding,
            "chunk": one(_CHUNK),
            "left": one(left),
            "prompt": one(prompt),
        }
        return Hop(**jax.device_put(fields))


def make_request(config: FlowMatchingConfig, num_tokens: int, num_prompt: int = 0) -> Request:
    """A random request of `num_tokens` tokens, a prompt of `num_prompt` in front."""
    rng, frames = np.random.default_rng(0), (1, FRAMES_PER_TOKEN * num_tokens, config.num_mels)
    prompt_mel = _normal(rng, *frames)
    prompt_mel[:, FRAMES_PER_TOKEN * num_prompt :] = 0
    return Request(
        speech_tokens=rng.integers(0, config.num_speech_tokens, (1, num_tokens), dtype=np.int32),
        num_prompt=num_prompt,
        noise=_normal(rng, *frames),
        prompt_mel=prompt_mel,
        speaker_embedding=_normal(rng, 1, config.speaker_dim),
    )


def filled_state(config: FlowMatchingConfig, num_tokens: int, num_slots: int, num_pinned: int) -> FlowState:
    """The state behind `num_tokens` tokens as `append` would leave it, with random keys and values, equal in all layers."""
    state, rng = init_state(config, 1, num_slots), np.random.default_rng(0)

    def fill(cache: KeyValueCache, rate: int) -> KeyValueCache:
        rows, slots = cache.positions.shape
        pinned, places = rate * num_pinned, np.arange(rate * num_tokens)
        positions = np.full(slots, EMPTY, np.int32)
        # Of places that share a slot numpy keeps the last.
        positions[np.where(places < pinned, places, pinned + (places - pinned) % (slots - pinned))] = places
        random = lambda a: jnp.broadcast_to(_normal(rng, *a.shape[1:]).astype(a.dtype), a.shape)  # noqa: E731
        positions = jnp.asarray(np.tile(positions, (rows, 1)))
        return KeyValueCache(keys=random(cache.keys), values=random(cache.values), positions=positions)

    encoder = dataclasses.replace(
        state.encoder, tokens=fill(state.encoder.tokens, 1), frames=fill(state.encoder.frames, FRAMES_PER_TOKEN)
    )
    done = jnp.array([num_tokens], jnp.int32)
    return dataclasses.replace(state, num_tokens=done, encoder=encoder, cache=fill(state.cache, FRAMES_PER_TOKEN))


class Stream:
    """A state that hops move on."""

    def __init__(self, work: Workload, state: FlowState) -> None:
        self.state, self._work = state, work

    def __call__(self, hop: Hop, num_slots: int = 0) -> Float[np.ndarray, "1 F M"]:
        """The mel of the next hop; makes room for `num_slots` tokens before, if there is less."""
        if FRAMES_PER_TOKEN * num_slots > self.state.cache.positions.shape[1]:
            self.state = grow_state(self.state, num_slots)
        mel, self.state = self._work.step(self._work.params, self.state, hop)
        jax.block_until_ready(self.state)
        return jax.device_get(mel)


def measure_flow_train(options: BenchOptions) -> list[Figure]:
    """Loss and all gradients, with the draws, of rows of equal length; and the memory that the program takes besides."""
    work, rng = make_workload(options.size or "tiny"), np.random.default_rng(0)
    config, rows = work.model.config, work.num_rows
    length = round(options.seconds * _TOKENS_PER_SECOND / rows) or work.row_tokens
    batch = {
        "speech_tokens": rng.integers(0, config.num_speech_tokens, (rows, length), dtype=np.int32),
        "num_tokens": np.full(rows, length, np.int32),
        "mel": _normal(rng, rows, FRAMES_PER_TOKEN * length, config.num_mels),
        "speaker_embedding": _normal(rng, rows, config.speaker_dim),
    }

    def loss(params: PyTree, batch: dict[str, Array], key: Array) -> tuple[Array, Array]:
        keys = jax.random.split(key)
        return flow_loss(work.model, params, batch, draw(config, keys[0], batch["num_tokens"], length), keys[1])

    inputs = (work.params, jax.device_put(batch), jax.random.key(1))
    program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*inputs).compile()
    run = lambda: jax.block_until_ready(program(*inputs))  # noqa: E731
    run()
    seconds = race({_OURS: run}, options.repeats)[_OURS]
    frames = FRAMES_PER_TOKEN * length
    case = f"{work.describe()}, {rows} x {frames} frames, no optimizer"
    memory: Any = program.memory_analysis()
    rate, flops = matrix_rate(work.matrix_size, config.dtype, options.repeats), _training_flops(work, batch)
    return [
        (case, "frames/s", [rows * frames / s for s in seconds]),
        (f"{case}, of {rate / 1e12:.3g} Tflop/s in a product", "%", [100 * flops / s / rate for s in seconds]),
        (case, "s a step", seconds),
        (f"{case}, temporaries of the program", "MB", [memory.temp_size_in_bytes / _MEGABYTE]),
    ]


def _training_flops(work: Workload, batch: dict[str, np.ndarray]) -> float:
    """Operations of a step: three times those of the loss, with layers unrolled, since a loop is counted once."""
    config = dataclasses.replace(work.model.config, scan_layers=False, remat="none")
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(lambda key: nn.unbox(init_params(config, key)), key)

    def loss(params: PyTree, batch: dict[str, Array], key: Array) -> Array:
        draws = draw(config, key, batch["num_tokens"], batch["speech_tokens"].shape[1])
        return flow_loss(FlowMatching(config), params, batch, draws)[0]

    cost: Any = jax.jit(loss).lower(params, batch, key).cost_analysis()
    return 3 * cost["flops"]


def measure_flow_offline(options: BenchOptions) -> list[Figure]:
    """One call of the velocity network under two masks, on a CPU beside PyTorch; the solve of utterances."""
    scanned, rng = make_workload(options.size or "tiny"), np.random.default_rng(0)
    work, config = scanned.unrolled(), scanned.model.config
    theirs = _pytorch(work) if options.against and jax.default_backend() == "cpu" else None
    mels, speaker = _normal(rng, 3, 2, _CALL_FRAMES, config.num_mels), _normal(rng, 2, config.num_mels)
    inputs = (mels[0], np.full(2, 0.3, np.float32), mels[1], speaker, mels[2])
    ours: Any = jax.jit(functools.partial(work.model.apply, method="velocity"))
    figures: list[Figure] = []
    for name, chunk in (("non-causal", NO_CHUNK), (f"chunks of {_CHUNK} tokens", _CHUNK)):
        num_tokens = _CALL_FRAMES // FRAMES_PER_TOKEN
        mask = MaskSpec(kind="chunk", rows=(ChunkMask(chunk=chunk),))
        mask = padded_masks(mask, jnp.full(2, num_tokens), num_tokens)[1]  # as `solve` has it
        sees = None if chunk == NO_CHUNK else np.array(mask.array(_CALL_FRAMES, _CALL_FRAMES)[0, 0])
        fed = jax.device_put((*inputs, mask))
        runs: dict[str, Callable[[], Any]] = {
            _OURS: lambda fed=fed: jax.device_get(ours({"params": work.params}, *fed)[0])
        }
        if theirs is not None:
            runs["PyTorch"] = functools.partial(theirs, *inputs, sees)
        require_equal("velocities", [run() for run in runs.values()], tolerance=_TOLERANCE)
        case = (
            f"{work.describe()}, one call of the velocity network, layers unrolled, 2 x {_CALL_FRAMES} frames, {name}"
        )
        figures += compared(case, "ms", _milliseconds(race(runs, options.repeats)))
    return figures + _whole_solve(scanned, options)


def _whole_solve(work: Workload, options: BenchOptions) -> list[Figure]:
    """Of rows of equal length; in another type also the mean difference that it makes to the log-mel."""
    seconds, figures = options.seconds or 10.0, []
    request = make_request(work.model.config, round(seconds * _TOKENS_PER_SECOND))
    for num_rows in work.batch_sizes:
        fed = jax.tree.map(lambda x, n=num_rows: jnp.repeat(x, n, axis=0), request.prefix(request.num_tokens))
        mels: list[np.ndarray] = []
        for each in map(work.in_dtype, work.dtypes):
            solver = each.solver(NO_CHUNK)
            run = lambda solver=solver, fed=fed: jax.block_until_ready(solver(work.params, *fed))  # noqa: E731
            mels.append(jax.device_get(run()))
            times = race({_OURS: run}, options.repeats)[_OURS]
            steps = f"{work.model.config.num_steps} steps"
            case = f"{each.describe()}, solve of {num_rows} x {seconds:g} s, {steps}, non-causal"
            figures += [(case, "s", times), (case, "x realtime", [num_rows * seconds / s for s in times])]
            if len(mels) > 1:
                figures.append((f"{case}, off {work.dtypes[0]}", "log-mel", [float(np.abs(mels[-1] - mels[0]).mean())]))
    return figures


def measure_flow_stream(options: BenchOptions) -> list[Figure]:
    """A hop behind short and long histories; then an utterance in hops, against solving all of it anew for each hop."""
    work = make_workload(options.size or "tiny")
    figures = []
    for each in map(work.in_dtype, work.dtypes):
        figures += _measure_hop(each, options.repeats, (5, 60), is_bounded=True)
        figures += _measure_hop(each, options.repeats, work.histories, is_bounded=False) + _utterance(each, options)
    return figures


def _measure_hop(work: Workload, repeats: int, histories: tuple[int, int], *, is_bounded: bool) -> list[Figure]:
    """Each repeat goes on with the state of the one before, the oldest frames making room."""
    config, prompt = work.model.config, _CACHED if is_bounded else 0
    request = make_request(config, _CHUNK + LOOKAHEAD)
    hop = request.hop(0, _CHUNK, left=_LEFT if is_bounded else NO_LEFT, prompt=prompt)
    runs: dict[str, Callable[[], Any]] = {}
    for seconds in histories:
        num_tokens = seconds * _TOKENS_PER_SECOND
        state = filled_state(config, num_tokens, prompt + _LEFT if is_bounded else num_tokens, prompt)
        runs[f"{seconds} s"] = functools.partial(Stream(work, state), hop)
    for run in runs.values():
        run()
    times = race(runs, repeats)
    seen = f"{prompt} + {_LEFT} tokens" if is_bounded else "all"
    case = f"{work.describe()}, hop of {_CHUNK} tokens, seen before it: {seen}"
    figures = [(f"{case}, after {name}", "ms", values) for name, values in _milliseconds(times).items()]
    (near, short), (far, long) = times.items()
    growth = [b / a for a, b in zip(short, long, strict=True)]
    return [*figures, (f"{case}, time after {far} over time after {near}", "x", growth)]


def _utterance(work: Workload, options: BenchOptions) -> list[Figure]:
    """Both sides see the same and have to give the same mel; ours starts with the prompt solved, as a voice is cached."""
    seconds, params, solver = options.seconds or 20.0, work.params, work.solver(_CHUNK)
    request = make_request(work.model.config, _PROMPT + round(seconds * _TOKENS_PER_SECOND), _PROMPT)
    voice = Stream(work, init_state(work.model.config, 1, room_for(_CACHED)))
    voice(request.hop(0, _CACHED))
    stream = Stream(work, jax.tree.map(jnp.copy, voice.state))

    def ours(ends: list[int]) -> tuple[float, list[Any]]:
        begin = time.perf_counter()
        stream.state = recycle(stream.state, voice.state)  # what the request before has grown, as `MelStreams` does
        mels = [stream(request.hop(*span), room_for(span[1])) for span in itertools.pairwise(ends)]
        return time.perf_counter() - begin, mels

    def anew(ends: list[int]) -> tuple[float, list[Any]]:
        begin, mels = time.perf_counter(), []
        for start, end in itertools.pairwise(ends):
            mel = jax.device_get(solver(params, *request.prefix(end)))
            mels.append(mel[:, FRAMES_PER_TOKEN * start : FRAMES_PER_TOKEN * end])
        return time.perf_counter() - begin, mels

    parts, figures = {f"first hop, {_CHUNK} + {LOOKAHEAD} tokens": request.ends()[:2]}, []
    for hops in work.schedules:
        ends = request.ends(hops)
        # Both compile, ours for grown caches too.
        mels = [np.concatenate(run(ends)[1], axis=1) for run in (ours, ours, anew)]
        if work.model.config.dtype == "float32":
            require_equal("mels", mels, tolerance=_TOLERANCE)
        parts[f"{seconds:g} s in {len(ends) - 1} hops of {', '.join(map(str, hops))} tokens"] = ends
    for name, ends in parts.items():
        runs = {_OURS: functools.partial(ours, ends), _ANEW: functools.partial(anew, ends)}
        times = _milliseconds(race(runs, options.repeats, clock=lambda run: run()[0]))
        figures += compared(f"{work.describe()}, voice of {_CACHED} tokens, caches reused, {name}", "ms", times)
    return figures


def _pytorch(work: Workload) -> Any:
    from cv2jax.jobs.bench_flow_torch import OfficialEstimator  # not above: torch is an extra

    return OfficialEstimator(work.model.config.estimator, jax.device_get(work.params["estimator"]))


def _normal(rng: np.random.Generator, *shape: int) -> Float[np.ndarray, "..."]:
    return rng.standard_normal(shape, np.float32)


def _milliseconds(times: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [1e3 * s for s in each] for name, each in times.items()}


PARTS = {"flow-train": measure_flow_train, "flow-offline": measure_flow_offline, "flow-stream": measure_flow_stream}


def main(arguments: list[str]) -> int:
    """Measures one part and leaves `PLACE/result.json`."""
    part, options, place = arguments[0], BenchOptions(**json.loads(arguments[1])), pathlib.Path(arguments[2])
    measurements = [dataclasses.asdict(make_measurement(part, *figure)) for figure in PARTS[part](options)]
    result = {"machine": describe_machine(), "measurements": measurements}
    (place / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
