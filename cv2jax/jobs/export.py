"""`cv2jax export`: a run's parameters in a form that others read: a Hugging Face directory, a side file of factors.

A target is one function in TARGETS. What it writes appears whole or not at all.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cv2jax.config import LoraConfig, MeshConfig, UserError, from_dict
from cv2jax.convert.qwen import save_backbone
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig, init_params
from cv2jax.parallel.mesh import make_mesh
from cv2jax.remote import as_path
from cv2jax.tasks.trained import find_step, find_text_tokenizer, load_params, text_speech_lm_config
from cv2jax.text.tokenizer import TextTokenizer, check_same_tokenizer, load_text_tokenizer
from cv2jax.train.lora import save_lora, trained_by
from cv2jax.train.run import load_run
from cv2jax.train.state import partition

DTYPES = ("float32", "bfloat16")
# Of a carried tokenizer: ours says the same in its other files.
_NOT_CARRIED = ("special_tokens_map.json", "added_tokens.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What a target may be told; TARGETS says which of it each takes."""

    dtype: str = "float32"  # of the tensors
    carry_from: str = ""  # Hugging Face directory that the backbone came from: the rest of its config, its text head
    text_tokenizer: str = ""  # directory of the one that made the text tokens; "": in the run
    lora: str = ""  # side file that was trained on this run


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportResult:
    """Which of the run was written."""

    step: int
    num_parameters: int
    averaged: bool  # the moving average


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """A checkpoint of a run, not read yet."""

    run: pathlib.Path
    described: dict[str, Any]  # run.json
    step: int
    averaged: bool

    def load(self, config: TextSpeechLmConfig, *, merge: bool = True, lora_file: str = "") -> Any:
        """The parameters on one device; UserError where some are not finite."""
        mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
        init = functools.partial(init_params, config)
        params, _ = load_params(
            self.run, init, mesh, step=self.step, ema=self.averaged, merge=merge, lora_file=lora_file
        )
        finite = jax.jit(lambda tree: jnp.all(jnp.array([jnp.isfinite(a).all() for a in jax.tree.leaves(tree)])))
        if not finite(params):
            place = self.run / "checkpoints" / str(self.step)
            raise UserError(f"{place}: holds NaN or infinite parameters; give an earlier --step")
        return params


def export(
    run: str | os.PathLike[str],
    target: str,
    out: str | os.PathLike[str],
    *,
    options: ExportOptions = ExportOptions(),
    step: int | None = None,
    ema: bool = True,
) -> ExportResult:
    """Writes a checkpoint (default: the newest) of the workdir `run` as `target`, a key of TARGETS, to `out`.

    `ema`: the moving average of the parameters where the run keeps one, else the last ones. Raises UserError for a run,
    checkpoint, option or place that is unfit, and for parameters that are not finite.
    """
    run, out = as_path(run), pathlib.Path(out)
    if target not in TARGETS:
        raise UserError(f"--to {target}: there is no such target; choose one of {', '.join(TARGETS)}")
    write, taken = TARGETS[target]
    for field in dataclasses.fields(options):
        if field.name not in taken and getattr(options, field.name) != field.default:
            raise UserError(f"--{field.name} is not for --to {target}; leave it out")
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype {options.dtype}: choose {' or '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists already; give a new place")
    described = load_run(run)
    averaged = ema and bool(described["config"].get("optimizer", {}).get("ema_decay"))
    source = _Source(run=run, described=described, step=find_step(run, step), averaged=averaged)
    params = write(source, out, options)
    return ExportResult(
        step=source.step, num_parameters=sum(a.size for a in jax.tree.leaves(params)), averaged=averaged
    )


def _write_qwen2(source: _Source, out: pathlib.Path, options: ExportOptions) -> Any:
    """Backbone and text embedding, with a low-rank adaptation merged, and the text tokenizer beside them."""
    config = text_speech_lm_config(source.described, source.run)
    tokenizer = _find_tokenizer(source, options)
    params = source.load(config, lora_file=options.lora)

    def finish(place: pathlib.Path) -> None:
        for name in _NOT_CARRIED:
            (place / name).unlink(missing_ok=True)
        tokenizer.save(place)

    carry_from = options.carry_from or None
    save_backbone(params, config.backbone, out, dtype=options.dtype, carry_from=carry_from, finish=finish)
    return {name: params[name] for name in ("backbone", "text_embedding")}


def _find_tokenizer(source: _Source, options: ExportOptions) -> TextTokenizer:
    """The text tokenizer of the run, by its hash; a directory to carry from must not have another."""
    tokenizer = find_text_tokenizer(source.described, source.run, options.text_tokenizer)
    carried = pathlib.Path(options.carry_from)
    if options.carry_from and (carried / "tokenizer_config.json").is_file():
        other = load_text_tokenizer(carried, single_chinese=tokenizer.single_chinese)
        mend = "give the directory that the backbone came from"
        check_same_tokenizer(other, tokenizer.hash, source.run, name=f"--carry_from {carried}", mend=mend)
    return tokenizer


def _write_lora(source: _Source, out: pathlib.Path, options: ExportOptions) -> Any:
    """What a low-rank adaptation trained, as `load_lora` reads it; fp32."""
    del options
    config = text_speech_lm_config(source.described, source.run)
    lora = from_dict(LoraConfig, source.described["config"].get("lora", {}))
    if not lora.rank:
        raise UserError(f"{source.run}: trained without low-rank factors (lora.rank=0); export it --to qwen2")
    if out.suffix != ".safetensors" or out.is_dir():
        raise UserError(f"--out {out}: give a new file that ends in .safetensors")
    params = source.load(config, merge=False)
    save_lora(out, params, lora)
    return partition(params, trained_by(lora))[0]


# What each target takes of ExportOptions beside how it is written; the functions return what they wrote.
TARGETS: dict[str, tuple[Callable[[_Source, pathlib.Path, ExportOptions], Any], tuple[str, ...]]] = {
    "qwen2": (_write_qwen2, ("dtype", "carry_from", "text_tokenizer", "lora")),
    "lora": (_write_lora, ()),
}
