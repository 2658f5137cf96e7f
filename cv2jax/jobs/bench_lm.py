"""`cv2jax bench lm-train` and `lm-decode`: the language model, and on a CPU beside it PyTorch with the same weights.

Repeats of all sides alternate, and a ratio is taken within a repeat, so that what else the machine does hits all alike.
What PyTorch does is in `bench_lm_torch.py`.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from cv2jax.convert.qwen import save_backbone
from cv2jax.jobs.bench_options import BenchOptions
from cv2jax.models.text_speech_lm import decode
from cv2jax.models.text_speech_lm.loss import packed_loss
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig, init_params
from cv2jax.models.text_speech_lm.qwen2 import Qwen2Config
from cv2jax.models.text_speech_lm.sequence import Row, build_row
from cv2jax.synthesis.sampling import RequestSampler, SamplingOptions

Figure = tuple[str, str, list[float]]  # case, unit, values

_HOP = 25  # speech tokens a dispatch: a second of speech, the official hop of the streaming runtime


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What is measured: sizes of the model, shapes of a training batch and of a request."""

    config: TextSpeechLmConfig
    num_rows: int  # B
    segments_per_row: int
    segment_length: int  # positions of an utterance
    num_prompt: int  # positions before the first token is drawn
    num_tokens: int  # speech tokens of a request
    batch_sizes: tuple[int, ...]  # of decoding
    matrix_size: int  # of the product that gives the rate of the machine

    @property
    def num_positions(self) -> int:
        """Of a training batch."""
        return self.num_rows * self.segments_per_row * self.segment_length

    def describe(self) -> str:
        """Sizes and precision, for a case."""
        c = self.config.backbone
        return f"{c.num_layers} layers of {c.width}, vocabulary {c.vocabulary_size:,}, {c.dtype}"


def make_workload(size: str, on_cpu: bool) -> Workload:
    """The workload of a size of SIZES; on a CPU the official one has 4 layers, fp32, and rows of one utterance."""
    if size == "tiny":
        sizes: dict[str, Any] = {"vocabulary_size": 500, "width": 64, "mlp_dim": 160, "num_heads": 4, "num_kv_heads": 2}
        config = TextSpeechLmConfig(
            backbone=Qwen2Config(num_layers=2, scan_layers=False, **sizes), num_speech_tokens=81
        )
        shape = {"num_rows": 2, "segments_per_row": 2, "segment_length": 32, "num_prompt": 12, "num_tokens": 30}
        return Workload(config=config, **shape, batch_sizes=(1, 2), matrix_size=256)
    # Unrolled, which is faster by a twentieth on a CPU: a scan stacks what the backward pass needs.
    backbone = Qwen2Config(num_layers=4, scan_layers=False) if on_cpu else Qwen2Config(dtype="bfloat16")
    request = {"num_prompt": 64, "num_tokens": 100 if on_cpu else 500, "batch_sizes": (1,) if on_cpu else (1, 8, 32)}
    shape = {"num_rows": 4 if on_cpu else 8, "segments_per_row": 1 if on_cpu else 4, "segment_length": 512}
    config = TextSpeechLmConfig(backbone=backbone)
    return Workload(config=config, **shape, **request, matrix_size=2048 if on_cpu else 8192)


def measure_lm_train(options: BenchOptions, place: pathlib.Path) -> list[Figure]:
    """Loss and all gradients of packed rows, without an optimizer: time, and share of the machine's matrix rate."""
    work, params, theirs = _sides(options, place)
    batch = training_batch(work)
    device_batch = jax.device_put(batch)
    step = jax.jit(jax.value_and_grad(functools.partial(packed_loss, work.config), has_aux=True))
    runs: dict[str, Callable[[], float]] = {
        "ours": lambda: float(jax.block_until_ready(step(params, device_batch))[0][0])
    }
    if theirs is not None:
        runs["official"] = lambda: theirs.train_step(batch, text_head=True)
        runs["bare backbone"] = lambda: theirs.train_step(batch, text_head=False)
    require_equal("losses", [run() for run in runs.values()])
    seconds = race(runs, options.repeats)
    rate = matrix_rate(work.matrix_size, work.config.backbone.dtype, options.repeats)
    flops = training_flops(work, batch["positions"])
    case = f"{work.describe()}, {work.num_rows} x {batch['token'].shape[1]}, no optimizer"
    figures: list[Figure] = [
        (f"{case}: ours", "tokens/s", [work.num_positions / s for s in seconds["ours"]]),
        (
            f"{case}: ours, of {rate / 1e12:.3g} Tflop/s in a product",
            "%",
            [100 * flops / s / rate for s in seconds["ours"]],
        ),
    ]
    return figures + compared(case, "s a step", seconds)


def measure_lm_decode(options: BenchOptions, place: pathlib.Path) -> list[Figure]:
    """Milliseconds a speech token of every request, behind a prefilled prompt, official sampling, no early end."""
    work, params, theirs = _sides(options, place)
    params = decode.decoder_params(work.config, params)
    prompt = training_batch(work)
    tokens, kinds = prompt["token"][:1, : work.num_prompt], prompt["kind"][:1, : work.num_prompt]
    figures: list[Figure] = []
    for batch_size in work.batch_sizes:
        ours = functools.partial(_decode, work, params, tokens, kinds, batch_size)
        runs: dict[str, Callable[[], Any]] = {"ours": ours}
        if theirs is not None and batch_size == 1:
            runs["official"] = lambda: theirs.decode(tokens[0], kinds[0], work.num_tokens)
        first = [run()[1] for run in runs.values()]
        for logits in first[1:]:
            require_equal("logits behind the prompt", [first[0], logits])
        # Each run reports its own seconds: the prompt is left out.
        times = race(runs, options.repeats, clock=lambda run: run()[0])
        each = {name: [1e3 * s / work.num_tokens for s in values] for name, values in times.items()}
        case = f"{work.describe()}, batch {batch_size}, {work.num_prompt} + {work.num_tokens} tokens"
        figures += compared(case, "ms a token", each)
    return figures


def training_batch(work: Workload) -> dict[str, Int[np.ndarray, "B T"]]:
    """Random utterances, a sixth of each text: `token kind targets positions segments`."""
    rng, c = np.random.default_rng(0), work.config
    num_text = work.segment_length // 6

    def utterance() -> Row:
        text = rng.integers(0, c.backbone.vocabulary_size, num_text)
        speech = rng.integers(0, c.num_speech_tokens, work.segment_length - num_text - 2)
        sizes = {"text_vocabulary_size": c.backbone.vocabulary_size, "num_speech_tokens": c.num_speech_tokens}
        return build_row(text, speech, bistream=False, **sizes)

    rows = [[utterance() for _ in range(work.segments_per_row)] for _ in range(work.num_rows)]
    names = ("token", "kind", "targets")
    batch = {name: np.stack([np.concatenate([getattr(u, name) for u in row]) for row in rows]) for name in names}
    index = np.broadcast_to(np.arange(batch["token"].shape[1], dtype=np.int32), batch["token"].shape)
    return batch | {"positions": index % work.segment_length, "segments": 1 + index // work.segment_length}


def training_flops(work: Workload, positions: Int[np.ndarray, "B T"]) -> float:
    """What a step has to compute: 6 a weight of a matrix and token, and attention to the visible keys alone."""
    c = work.config.backbone
    attention = 2 * c.width * c.width + 2 * c.width * c.num_kv_heads * c.head_dim
    weights = c.num_layers * (attention + 3 * c.width * c.mlp_dim) + c.width * work.config.num_outputs
    visible = float(np.sum(positions + 1, dtype=np.float64))
    return 6.0 * weights * positions.size + 3 * 4.0 * c.num_layers * c.width * visible


def _sides(options: BenchOptions, place: pathlib.Path) -> tuple[Workload, PyTree, Any]:
    """(workload, our parameters, PyTorch with equal ones or None)."""
    on_cpu = jax.default_backend() == "cpu"
    work = make_workload(options.size or "official", on_cpu)
    params = jax.jit(lambda key: nn.unbox(init_params(work.config, key)))(jax.random.key(0))
    if not options.against or not on_cpu:
        return work, params, None
    from cv2jax.jobs.bench_lm_torch import OfficialLm  # not above: torch is an extra

    save_backbone(params, work.config.backbone, place / "qwen2")
    rest: dict[str, Any] = {
        name: np.asarray(a) for name, a in params.items() if name not in ("backbone", "text_embedding")
    }
    return work, params, OfficialLm(place / "qwen2", rest)


def _decode(
    work: Workload,
    params: PyTree,
    tokens: Int[np.ndarray, "1 T"],
    kinds: Int[np.ndarray, "1 T"],
    batch_size: int,
) -> tuple[float, Array]:
    """(seconds of all tokens behind the prompt, logits [V] behind the prompt) of equal requests."""
    sampler, (num_tokens, num_prompt) = RequestSampler(), (work.num_tokens, tokens.shape[1])
    full = functools.partial(np.full, batch_size)
    fed = (
        np.repeat(tokens, batch_size, axis=0),
        np.repeat(kinds, batch_size, axis=0),
        full(num_prompt, dtype=np.int32),
    )
    length = decode.cache_length(num_prompt + num_tokens)
    state = decode.init_state(work.config, batch_size, length, sampler.win_size)
    state = decode.prefill(work.config, params, state, *fed)
    options = sampler.options(SamplingOptions())
    controls = decode.Controls(
        key=jax.random.split(jax.random.key(0), batch_size),
        options={name: jnp.full(batch_size, value) for name, value in options.items()},
        min_length=jnp.full(batch_size, num_tokens),
        max_length=jnp.full(batch_size, num_tokens),
        budget=jnp.full(batch_size, _HOP),
        may_end=jnp.ones(batch_size, bool),
    )
    logits = jax.block_until_ready(jnp.array(state.logits[0]))
    start = time.perf_counter()
    for _ in range(0, num_tokens, _HOP):
        state, drawn = decode.decode(work.config, sampler, params, state, controls, num_steps=_HOP)
        jax.device_get(drawn)  # as a server does, to send them on
    seconds = time.perf_counter() - start
    if np.any(np.asarray(state.num_generated) != num_tokens):
        raise RuntimeError(f"decoded {np.asarray(state.num_generated)} tokens instead of {num_tokens}")
    return seconds, logits


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def race(
    runs: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[Callable[[], Any]], float] = _seconds
) -> dict[str, list[float]]:
    """Seconds of every run, one of each in turn; each has run before."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(clock(run))
    return seconds


def compared(case: str, unit: str, values: Mapping[str, list[float]]) -> list[Figure]:
    """A figure a side, and how many times as fast as the others ours is."""
    figures = [(f"{case}: {name}", unit, list(each)) for name, each in values.items()]
    for name, each in values.items():
        if name != "ours":
            ratios = [other / own for other, own in zip(each, values["ours"], strict=True)]
            figures.append((f"{case}: ours against {name}", "x", ratios))
    return figures


def require_equal(what: str, values: list[Any], *, tolerance: float = 1e-3) -> None:
    """Both sides have to compute the same, or the comparison means nothing; RuntimeError where they do not."""
    for value in values[1:]:
        if not np.allclose(values[0], value, rtol=tolerance, atol=tolerance):
            largest = np.max(np.abs(np.asarray(values[0]) - np.asarray(value)))
            raise RuntimeError(f"the {what} of the two sides differ by up to {largest:.3g}; allowed: {tolerance}")


def matrix_rate(size: int, dtype: str, repeats: int) -> float:
    """Operations a second of a large square product, the best of the repeats."""
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: a @ b)
    run = lambda: jax.block_until_ready(functools.reduce(product, [matrix] * 8))  # noqa: E731
    run()
    return 7 * 2.0 * size**3 / min(_seconds(run) for _ in range(repeats))
