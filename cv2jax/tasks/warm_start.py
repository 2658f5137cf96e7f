"""Weights that a language model starts from: of a run of its own kind, or of a Hugging Face Qwen2 backbone."""

import functools
import os
import pathlib
from typing import Any

import jax

from cv2jax.config import UserError
from cv2jax.convert.qwen import load_backbone
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig, init_params
from cv2jax.tasks.trained import load_params, text_speech_lm_config
from cv2jax.text.tokenizer import check_same_tokenizer, load_text_tokenizer
from cv2jax.train.run import load_run

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")


def load_initial(
    place: str, config: TextSpeechLmConfig, params: Any, text_tokenizer: str | os.PathLike[str]
) -> dict[str, Any]:
    """The parameters in `place` by the names, shapes and shardings that they have in `params`; not all need be there.

    Of a run's workdir all, its moving average where it keeps one, factors merged; of a Qwen2 directory the backbone and
    the text table. `text_tokenizer` is the corpus's: UserError where another made what was learnt, and where neither a
    run nor a backbone lies.
    """
    directory, ours = pathlib.Path(place), load_text_tokenizer(text_tokenizer)
    if (directory / "run.json").is_file():
        described = load_run(directory)
        text_speech_lm_config(described, place)  # UserError for a run of another stage
        check_same_tokenizer(ours, described["facts"]["text_tokenizer"], place)
        mesh = jax.tree.leaves(params)[0].sharding.mesh
        return load_params(place, functools.partial(init_params, config), mesh, ema=True)[0]
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
