"""`ablate quantizer`: the paper's Table 4 on your corpus: fsq, vq and none with one budget, one data order, equal seeds.

It composes the train job; each run is resumable, so a killed ablation goes on where it stopped.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import logging

from cv2jax.config import UserError, load_config, override, validate
from cv2jax.evaluation.ablation import VariantResult, draw_table, markdown_table
from cv2jax.tasks import make_task
from cv2jax.train.loop import train
from cv2jax.train.metrics import read_metrics

QUANTIZERS = ("fsq", "vq", "none")


def ablate_quantizer(
    preset: str, workdir: str | pathlib.Path, *, seeds: Sequence[int] = (0,), assignments: Sequence[str] = ()
) -> tuple[int, str]:
    """Trains every quantizer with every seed under `workdir`, then writes table.md, table.png and table.json there.

    Returns (exit code, the table): train's code with an empty table when a run was stopped by SIGTERM. Raises UserError
    when `assignments` set what the ablation itself varies.
    """
    workdir = pathlib.Path(workdir)
    for assignment in assignments:
        if assignment.split("=")[0].strip() in ("model.quantizer", "seed"):
            raise UserError(f"--set {assignment}: the ablation varies it itself; use --seeds for seeds")
    repeated = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if repeated:
        raise UserError(f"--seeds: {repeated[0]} is given twice; a seed twice is the same run, not another one")
    base = override(load_config(preset), assignments)
    finals: dict[str, list[dict[str, Any]]] = {name: [] for name in QUANTIZERS}
    for seed in seeds:
        for name in QUANTIZERS:
            config = override(base, [f"model.quantizer={name}", f"seed={seed}", f"name={name}_{seed}"])
            validate(config)
            run = workdir / f"{name}_{seed}"
            logging.info("quantizer %s, seed %d in %s", name, seed, run)
            code = train(make_task(config), config, run)
            if code:
                return code, ""
            lines = [x for x in read_metrics(run / "metrics.jsonl") if x["kind"] == "evaluate"]
            finals[name].append(lines[-1])
    sizes = {"fsq": 3**base.model.fsq_dim, "vq": base.model.codebook_size, "none": 0}
    results = [_collect(name, sizes[name], finals[name]) for name in QUANTIZERS]
    held_out = finals["fsq"][0]
    caption = (
        f"Held-out error rate by quantizer: {base.num_steps} steps of {base.data.batch_seconds:g} s, "
        f"{len(seeds)} seed(s), {held_out['num_utterances']} utterances ({held_out['num_speech_tokens']} speech tokens); "
        f"fsq with balance_weight={base.model.balance_weight:g}, vq with vq_restart_below={base.model.vq_restart_below:g}."
    )
    table = markdown_table(results, caption)
    (workdir / "table.md").write_text(table, encoding="utf-8")
    (workdir / "table.png").write_bytes(draw_table(results, caption))
    (workdir / "table.json").write_text(json.dumps(finals, ensure_ascii=False), encoding="utf-8")
    return 0, table


def _collect(name: str, codebook_size: int, lines: list[dict[str, Any]]) -> VariantResult:
    return VariantResult(
        name=name,
        codebook_size=codebook_size,
        character_error_rates=tuple(x["cer"] for x in lines),
        word_error_rates=tuple(x["wer"] for x in lines),
        codes_used=tuple(x.get("codes_used", 0) for x in lines),
        perplexities=tuple(x.get("perplexity", 0.0) for x in lines),
        num_speech_tokens=lines[0].get("num_speech_tokens", 0),
    )
