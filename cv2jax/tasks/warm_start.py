"""Weights that a language model or a flow starts from: of a run of its own kind, or of a Hugging Face Qwen2 backbone."""

import dataclasses
import functools
import os
from typing import Any

import jax

from cv2jax.config import UserError
from cv2jax.convert.qwen import load_backbone
from cv2jax.models.flow_matching.config import FlowMatchingConfig
from cv2jax.models.flow_matching.model import init_params as init_flow_params
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig, init_params
from cv2jax.nn.stack import match_layers
from cv2jax.remote import as_path
from cv2jax.tasks.trained import InitParams, flow_matching_config, load_params, text_speech_lm_config
from cv2jax.text.tokenizer import check_same_tokenizer, load_text_tokenizer
from cv2jax.train.run import load_run

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")


def load_initial(
    place: str, config: TextSpeechLmConfig, params: Any, text_tokenizer: str | os.PathLike[str]
) -> dict[str, Any]:
    """The parameters in `place` by the names, shapes and shardings that they have in `params`; not all need be there.

    Of a run's workdir all, its moving average where it keeps one, factors merged, whether its layers are scanned or not; of
    a Qwen2 directory the backbone and the text table. `text_tokenizer` is the corpus's: UserError where another made what
    was learnt, and where neither a run nor a backbone lies.
    """
    directory, ours = as_path(place), load_text_tokenizer(text_tokenizer)
    if (directory / "run.json").is_file():
        described = load_run(directory)
        theirs = text_speech_lm_config(described, place)
        check_same_tokenizer(ours, described["facts"]["text_tokenizer"], place)
        backbone = dataclasses.replace(config.backbone, scan_layers=theirs.backbone.scan_layers)
        return _load(place, functools.partial(init_params, dataclasses.replace(config, backbone=backbone)), params)
    if not (directory / "config.json").is_file():
        raise UserError(
            f"init_from={place}: is neither the --workdir of a text_speech_lm (no run.json) nor the directory of a Qwen2"
            " backbone (no config.json)"
        )
    if any((directory / name).is_file() for name in _TOKENIZER_FILES):
        theirs = load_text_tokenizer(directory, single_chinese=ours.single_chinese)
        check_same_tokenizer(ours, theirs.hash, place)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), params)
    return load_backbone(place, config.backbone, abstract)


def load_initial_flow(place: str, config: FlowMatchingConfig, params: Any) -> dict[str, Any]:
    """As `load_initial` of a run's workdir, a flow's parameters; UserError where no run of a flow lies there."""
    theirs = flow_matching_config(load_run(as_path(place)), place)
    init = functools.partial(init_flow_params, dataclasses.replace(config, scan_layers=theirs.scan_layers))
    return _load(place, init, params)


def _load(place: str, init: InitParams, params: Any) -> dict[str, Any]:
    """A run's parameters, which `init` makes as the run has them, as `params` has them."""
    loaded, _ = load_params(place, init, jax.tree.leaves(params)[0].sharding.mesh, ema=True)
    like = {name: params[name] for name in loaded}
    if jax.tree.structure(loaded) == jax.tree.structure(like):
        return loaded
    shardings = jax.tree.map(lambda a: a.sharding, like)
    return jax.jit(functools.partial(match_layers, like=like), out_shardings=shardings)(loaded)
