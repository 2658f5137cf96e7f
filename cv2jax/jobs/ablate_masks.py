"""`ablate masks`: the flow trained with one mask at a time and with all of them, heard under each (paper 2.4).

Every model has the same budget, data order and seed; each is then asked for the held-out mel under every mask, whether it
was trained for it or not. The times are those of the streamed solve, on this machine.
"""

import json
import pathlib
import statistics
import time
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np
from absl import logging

from cv2jax.config import TrainConfig, UserError, load_config, override, validate
from cv2jax.evaluation.mask_ablation import MaskTimes, draw_masks_table, masks_table
from cv2jax.models.flow_matching.config import FRAMES_PER_TOKEN, LOOKAHEAD, FlowMatchingConfig
from cv2jax.models.flow_matching.model import init_params
from cv2jax.nn.masks import NO_CHUNK, ChunkMask
from cv2jax.parallel.mesh import make_mesh
from cv2jax.synthesis.mel_stream import MelStream, MelStreams
from cv2jax.synthesis.prompt import Prompt
from cv2jax.tasks import make_task
from cv2jax.tasks.stages import make_mel_stage
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
    if base.task != "flow_matching":
        raise UserError(
            f"{preset}: is a preset of {base.task}; masks are compared in the flow, give one of flow_matching"
        )
    base = override(base, ["model.mask_per=utterance"])
    names = [mask.name for mask in base.model.masks]
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
    times = {name: time_mask(base.model, mask) for name, mask in zip(names, base.model.masks, strict=True)}
    caption = f"Held-out mel distance by masks: {base.num_steps} steps of {base.data.batch_seconds:g} s, one seed."
    table = masks_table(distances, times, caption)
    (workdir / "table.md").write_text(table, encoding="utf-8")
    (workdir / "table.png").write_bytes(draw_masks_table(distances, times, caption))
    record = {"distances": distances, "times": {name: vars(value) for name, value in times.items()}}
    (workdir / "table.json").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    return 0, table


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


def time_mask(config: FlowMatchingConfig, mask: ChunkMask) -> MaskTimes:
    """Tokens that must be there before the first audio, and seconds that a first and a later hop of one chunk take."""
    if mask.chunk == NO_CHUNK:
        return MaskTimes(first_tokens=None, first_seconds=None, hop_seconds=None)
    params, key, size = nn.unbox(init_params(config, jax.random.key(0))), jax.random.key(0), mask.chunk
    streams = MelStreams(make_mel_stage(config, params), mask, hop_sizes=(size,))
    # The prompt of a bounded mask comes out of the voice.
    prompt = np.zeros(mask.prompt, np.int32)
    mel = np.zeros((FRAMES_PER_TOKEN * mask.prompt, config.num_mels), np.float32)
    voice = streams.enroll(Prompt(speaker_embedding=np.ones(config.speaker_dim), speech_tokens=prompt, mel=mel))
    first, later = [], []
    for _ in range(NUM_TIMINGS + 1):  # the first one compiles
        stream = streams.start(voice, key)
        first.append(_seconds(stream, stream.num_to_border()))
        _seconds(stream, -(-HISTORY_TOKENS // size) * size)
        later.append(_seconds(stream, size))
    return MaskTimes(
        first_tokens=size + LOOKAHEAD,
        first_seconds=statistics.median(first[1:]),
        hop_seconds=statistics.median(later[1:]),
    )


def _seconds(stream: MelStream, num_tokens: int) -> float:
    begun = time.perf_counter()
    stream.hop(np.zeros(num_tokens, np.int32), np.zeros(LOOKAHEAD, np.int32))
    return time.perf_counter() - begun
