"""`ablate masks`: the flow trained with one mask at a time and with all of them, heard under each (paper 2.4).

Every model has the same budget, data order and seed; each is then asked for the held-out mel under every mask, whether it
was trained for it or not. The times are those of the streamed solve, on this machine.
"""

import json
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import logging

from cv2jax.config import TrainConfig, UserError, load_config, override, validate
from cv2jax.evaluation.mask_ablation import MaskTimes, draw_masks_table, masks_table
from cv2jax.models.flow_matching.config import FRAMES_PER_TOKEN, LOOKAHEAD
from cv2jax.models.flow_matching.model import FlowMatching, init_params
from cv2jax.models.flow_matching.step import FlowState, Hop, init_state, step
from cv2jax.nn.masks import NO_CHUNK, NO_LEFT, ChunkMask
from cv2jax.parallel.mesh import make_mesh
from cv2jax.tasks import make_task
from cv2jax.tasks.trained import load_params
from cv2jax.train.loop import train

MIXED = "mixed"
HISTORY_TOKENS = 125  # 5 s before the hop that is timed
NUM_TIMINGS = 5


def ablate_masks(preset: str, workdir: str | pathlib.Path, *, assignments: Sequence[str] = ()) -> tuple[int, str]:
    """Trains a model for each mask of the preset and one for all, then writes table.md, table.png and table.json.

    Returns (exit code, the table): train's code with an empty table when a run was stopped by SIGTERM. Each run is
    resumable. Raises UserError when `assignments` set what the ablation itself varies, and for a single mask.
    """
    workdir = pathlib.Path(workdir)
    for assignment in assignments:
        if assignment.split("=")[0].strip() == "model.mask_per":
            raise UserError(f"--set {assignment}: the ablation draws a mask an utterance")
    base = override(load_config(preset), assignments)
    names = [mask_name(mask) for mask in base.model.masks]
    if len(set(names)) < 2:
        raise UserError(f"model.mask_chunks={base.model.mask_chunks}: give two different masks or more to compare")
    distances: dict[str, dict[str, float]] = {}
    for trained in (*names, MIXED):
        config = _variant(base, names, trained)
        run = workdir / trained.replace(" ", "_")
        logging.info("trained for %s in %s", trained, run)
        task = make_task(config)
        code = train(task, config, run)
        if code:
            return code, ""
        mesh = make_mesh(config.mesh)
        params, _ = load_params(run, task.init_params, mesh, ema=True)
        found = task.mel_distances(params, mesh, base.model.masks)
        distances[trained] = dict(zip(names, found, strict=True))
    times = {name: time_mask(base, mask) for name, mask in zip(names, base.model.masks, strict=True)}
    caption = f"Held-out mel distance by masks: {base.num_steps} steps of {base.data.batch_seconds:g} s, one seed."
    table = masks_table(distances, times, caption)
    (workdir / "table.md").write_text(table, encoding="utf-8")
    (workdir / "table.png").write_bytes(draw_masks_table(distances, times, caption))
    record = {"distances": distances, "times": {name: vars(value) for name, value in times.items()}}
    (workdir / "table.json").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    return 0, table


def mask_name(mask: ChunkMask) -> str:
    """As tables and directories call it."""
    kind = {NO_CHUNK: "all", 1: "causal"}.get(mask.chunk, f"chunk {mask.chunk}")
    return kind if mask.left is None else f"{kind} left {mask.left}"


def _variant(base: TrainConfig, names: Sequence[str], trained: str) -> TrainConfig:
    """The config whose model is trained for the mask of that name alone, or for all."""
    sets = [f"name=masks_{trained.replace(' ', '_')}"]
    if trained != MIXED:
        at = names.index(trained)
        for field in ("mask_chunks", "mask_lefts", "mask_prompts"):
            sets.append(f"model.{field}=({getattr(base.model, field)[at]},)")
    config = override(base, sets)
    validate(config)
    return config


def time_mask(config: TrainConfig, mask: ChunkMask) -> MaskTimes:
    """Tokens that must be there before the first audio, and seconds that a first and a later hop of one chunk take."""
    if mask.chunk == NO_CHUNK:
        return MaskTimes(first_tokens=None, first_seconds=None, hop_seconds=None)
    model, size = FlowMatching(config.model), mask.chunk
    params = nn.unbox(init_params(config.model, jax.random.key(0)))
    run = jax.jit(lambda state, hop: step(model, params, state, hop))
    borders = -(-HISTORY_TOKENS // size) * size
    start = init_state(config.model, 1, borders + size)
    later = start
    while int(later.num_tokens[0]) < borders:
        _, later = run(later, _hop(config, mask, size))
    return MaskTimes(
        first_tokens=size + LOOKAHEAD,
        first_seconds=_seconds(run, start, _hop(config, mask, size)),
        hop_seconds=_seconds(run, later, _hop(config, mask, size)),
    )


def _hop(config: TrainConfig, mask: ChunkMask, size: int) -> Hop:
    c, one = config.model, jnp.ones((1,), jnp.int32)
    return Hop(
        speech_tokens=jnp.zeros((1, size + LOOKAHEAD), jnp.int32),
        num_tokens=size * one,
        num_lookahead=LOOKAHEAD * one,
        noise=jnp.zeros((1, FRAMES_PER_TOKEN * size, c.num_mels)),
        prompt_mel=None,
        speaker_embedding=jnp.ones((1, c.speaker_dim)),
        chunk=mask.chunk * one,
        left=(NO_LEFT if mask.left is None else mask.left) * one,
        prompt=mask.prompt * one,
    )


def _seconds(run: Any, state: FlowState, hop: Hop) -> float:
    """Median over NUM_TIMINGS calls behind one that compiles."""
    took = []
    for _ in range(NUM_TIMINGS + 1):
        begun = time.perf_counter()
        jax.block_until_ready(run(state, hop))
        took.append(time.perf_counter() - begun)
    return statistics.median(took[1:])
