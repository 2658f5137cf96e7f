"""What a stage takes from runs that are trained already: parameters to start from or to export, a recogniser."""

import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import Integer

from cv2jax.audio.mel import MelDefinition
from cv2jax.config import LoraConfig, OptimizerConfig, UserError, from_dict
from cv2jax.data.token_corpus import TEXT_TOKENIZER
from cv2jax.models.flow_matching.config import FlowMatchingConfig
from cv2jax.models.flow_matching.model import init_params as init_flow_params
from cv2jax.models.hift_vocoder.config import HiftVocoderConfig
from cv2jax.models.hift_vocoder.model import init_params as init_vocoder_params
from cv2jax.models.hift_vocoder.stream import require_mel
from cv2jax.models.speech_tokenizer.config import SpeechTokenizerConfig
from cv2jax.models.speech_tokenizer.decode import transcribe_tokens
from cv2jax.models.speech_tokenizer.model import init_model_state, init_params
from cv2jax.models.speech_tokenizer.tokenize import tokenizer_hash
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig
from cv2jax.nn.stack import match_layers, stack_layers, unstack_layers
from cv2jax.parallel.sharding import abstract_state
from cv2jax.remote import as_path, fetched
from cv2jax.text.characters import CharacterVocabulary
from cv2jax.text.tokenizer import TextTokenizer, check_same_tokenizer, load_text_tokenizer
from cv2jax.train.checkpoint import complete_steps, load_subtree
from cv2jax.train.gan_step import GENERATOR, init_gan_state
from cv2jax.train.lora import add_lora, effective_params, load_lora, trained_by
from cv2jax.train.optimizer import AverageState, make_optimizer
from cv2jax.train.run import load_run
from cv2jax.train.state import TrainState, combine, init_train_state, partition

InitParams = Callable[[jax.Array], Any]  # key → boxed parameters
_LENGTH_MULTIPLE = 128  # speech tokens: few shapes to compile


def find_step(run: str | os.PathLike[str], step: int | None = None) -> int:
    """The newest step of which a run's workdir has a checkpoint, or `step` if it has that; UserError where it has not."""
    checkpoints = as_path(run) / "checkpoints"
    steps = complete_steps(checkpoints)
    if not steps:
        raise UserError(f"no checkpoint in {checkpoints}; train first, or give the directory of a run")
    if step is not None and step not in steps:
        raise UserError(f"no checkpoint of step {step} in {checkpoints}; choose one of {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def load_params(
    run: str | os.PathLike[str],
    init: InitParams,
    mesh: Mesh,
    *,
    step: int | None = None,
    ema: bool = False,
    merge: bool = True,
    lora_file: str = "",
) -> tuple[Any, dict[str, Any]]:
    """(parameters of a checkpoint in a run's workdir, sharded over the mesh; what `run.json` says).

    Args:
      run: the workdir. init: makes the model's boxed parameters.
      step: of the checkpoint; default: the newest.
      ema: take the moving average of what was trained, where the run keeps one.
      merge: add a low-rank adaptation to its kernels; else its factors lie under LORA.
      lora_file: side file of an adaptation that was trained on these parameters; all is merged then.

    Raises: UserError where there is no run or no such checkpoint, where it is of another model, and for a side file that
    `load_lora` refuses.
    """
    run = as_path(run)
    described = load_run(run)
    step = find_step(run, step)
    config = described["config"]
    lora = from_dict(LoraConfig, config.get("lora", {}))
    optimizer_config = from_dict(OptimizerConfig, config.get("optimizer", {}))

    def init_state(key: jax.Array) -> TrainState:
        optimizer = make_optimizer(optimizer_config, config.get("num_steps", 1))
        return init_train_state(add_lora(init(key), lora, key), {}, optimizer, trained_by(lora))

    abstract, _ = abstract_state(init_state, mesh)
    wanted = {"params": abstract.params}
    if ema and optimizer_config.ema_decay:  # in place of what was trained
        _, frozen = partition(abstract.params, trained_by(lora))
        wanted = {"opt_state": _average_alone(abstract.opt_state)} | ({"params": frozen} if frozen else {})
    loaded = load_subtree(run / "checkpoints", wanted, step)
    params = combine(loaded.get("params", {}), optax.tree.get(loaded.get("opt_state"), "ema_params", {}))
    if lora.rank and (merge or lora_file):
        params = _merged(params, lora)
    return (_merge_file(pathlib.Path(lora_file), params) if lora_file else params), described


_merged = jax.jit(effective_params, static_argnums=1)


def _merge_file(path: pathlib.Path, params: Any) -> Any:
    """The parameters with a side file's adaptation, which may have been trained with the layers in the other form."""
    try:
        return _merged(*load_lora(path, params))
    except UserError as error:
        backbone = params.get("backbone", {})
        if "blocks" in backbone:
            other = unstack_layers(params)
        elif "blocks_0" in backbone:
            other = params | {"backbone": stack_layers(backbone)}
        else:
            raise
        try:
            loaded = load_lora(path, other)
        except UserError:
            raise error from None
    return match_layers(_merged(*loaded), params)


def _average_alone(opt_state: Any) -> Any:
    """An optimizer's state with None for all but the moving average: Orbax wants the whole structure of a tuple."""
    is_average = lambda part: isinstance(part, AverageState)  # noqa: E731
    return jax.tree.map(lambda part: part if is_average(part) else None, opt_state, is_leaf=is_average)


def text_speech_lm_config(described: dict[str, Any], run: str | os.PathLike[str]) -> TextSpeechLmConfig:
    """The language model of which `run.json` (`described`) tells, in fp32 and with the layers as its checkpoints have them.

    Raises UserError where `run` is a run of another stage.
    """
    task, facts = described["config"].get("task"), described["facts"]
    if task != "text_speech_lm" or not {"model", "text_tokenizer"} <= set(facts):
        raise UserError(f"{run}: is a run of {task or 'no known stage'}; give the --workdir of a text_speech_lm")
    # Not among the facts: layers in one tree or in one each are the same model.
    scan_layers = described["config"]["model"]["backbone"]["scan_layers"]
    backbone = facts["model"]["backbone"] | {"dtype": "float32", "remat": "none", "scan_layers": scan_layers}
    return from_dict(TextSpeechLmConfig, facts["model"] | {"backbone": backbone})


def flow_matching_config(described: dict[str, Any], run: str | os.PathLike[str]) -> FlowMatchingConfig:
    """As `text_speech_lm_config`, the flow."""
    task, facts = described["config"].get("task"), described["facts"]
    if task != "flow_matching" or "model" not in facts:
        raise UserError(f"{run}: is a run of {task or 'no known stage'}; give the --workdir of a flow_matching")
    kept = {"dtype": "float32", "scan_layers": described["config"]["model"]["scan_layers"]}
    return from_dict(FlowMatchingConfig, facts["model"] | kept)


def load_flow(run: str | os.PathLike[str], mesh: Mesh, *, step: int | None = None) -> tuple[FlowMatchingConfig, Any]:
    """(config in fp32, parameters over the mesh) of a flow's run, for `make_mel_stage`.

    Args: as `load_params`; the moving average is taken, where the run keeps one. Raises UserError as that, and where `run`
    is a run of another stage.
    """
    config = flow_matching_config(load_run(as_path(run)), run)
    params, _ = load_params(run, functools.partial(init_flow_params, config), mesh, step=step, ema=True)
    return config, params


def hift_vocoder_config(described: dict[str, Any], run: str | os.PathLike[str]) -> HiftVocoderConfig:
    """As `text_speech_lm_config`, the vocoder; UserError also for one of another mel than it records."""
    task, facts = described["config"].get("task"), described["facts"]
    if task != "hift_vocoder" or not {"model", "mel"} <= set(facts):
        raise UserError(f"{run}: is a run of {task or 'no known stage'}; give the --workdir of a hift_vocoder")
    config = from_dict(HiftVocoderConfig, facts["model"] | {"dtype": "float32"})
    require_mel(config, from_dict(MelDefinition, facts["mel"]))
    return config


def load_vocoder(run: str | os.PathLike[str], mesh: Mesh, *, step: int | None = None) -> tuple[HiftVocoderConfig, Any]:
    """(config in fp32, the generator's parameters over the mesh) of a vocoder's run, for `make_wave_stage`.

    Args: as `load_params`; the moving average is taken, where the run keeps one. Raises UserError as that, and where `run`
    is a run of another stage.
    """
    run = as_path(run)
    described = load_run(run)
    config = hift_vocoder_config(described, run)
    optimizer_config = from_dict(OptimizerConfig, described["config"].get("optimizer", {}))

    def init_state(key: jax.Array) -> TrainState:
        # The discriminators are left out: a checkpoint is read in part.
        optimizer = make_optimizer(optimizer_config, described["config"].get("num_steps", 1))
        return init_gan_state(init_vocoder_params(config, key), {}, optimizer, optax.identity())

    abstract, _ = abstract_state(init_state, mesh)
    wanted: dict[str, Any] = {"params": {GENERATOR: abstract.params[GENERATOR]}}
    if optimizer_config.ema_decay:
        wanted = {"opt_state": {GENERATOR: _average_alone(abstract.opt_state[GENERATOR])}}
    loaded = load_subtree(run / "checkpoints", wanted, find_step(run, step))
    average = optax.tree.get(loaded.get("opt_state"), "ema_params", {})
    return config, combine(loaded.get("params", {}).get(GENERATOR, {}), average)


def find_text_tokenizer(described: dict[str, Any], run: str | os.PathLike[str], place: str = "") -> TextTokenizer:
    """The text tokenizer of a language model's run, in the directory `place` or, by default, in the run itself.

    Raises UserError where there is none, and for one whose hash is not that of the run.
    """
    expected, where = described["facts"]["text_tokenizer"], as_path(place) if place else as_path(run) / TEXT_TOKENIZER
    if not place and not where.is_dir():
        raise UserError(f"{where}: the text tokenizer of {run} is gone; give its --text_tokenizer")
    tokenizer = load_text_tokenizer(fetched(where))
    mend = "give the one that made the corpus's text tokens"
    check_same_tokenizer(tokenizer, expected, run, name=f"--text_tokenizer {where}", mend=mend)
    return tokenizer


class TokenReader:
    """The recogniser of a speech tokenizer's run, on this process's first device.

    Raises UserError for a directory that is no such run, and for one whose tokenizer's hash is not `expected`.
    """

    def __init__(self, run: str, expected: str) -> None:
        facts = load_run(as_path(run))["facts"]
        if "quantizer" not in facts.get("model", {}) or facts["model"]["quantizer"] == "none":
            raise UserError(f"data.speech_tokenizer={run}: is no run of a speech tokenizer with a codebook")
        config = self._config = from_dict(SpeechTokenizerConfig, facts["model"] | {"dtype": "float32", "remat": "none"})
        self._vocabulary = CharacterVocabulary.from_json(facts["vocabulary"], f"{run}/run.json")
        shapes = jax.eval_shape(
            lambda key: nn.unbox({"params": init_params(config, key), "model_state": init_model_state(config, key)}),
            jax.random.key(0),
        )
        where = SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), shapes)
        loaded = load_subtree(as_path(run) / "checkpoints", abstract, find_step(run))
        self._params, self._model_state = loaded["params"], loaded["model_state"]
        found = tokenizer_hash(config, self._params, self._model_state)
        if found != expected:
            raise UserError(
                f"data.speech_tokenizer={run}: its tokenizer {found[:12]} did not make the corpus's tokens, which are of"
                f" {expected[:12]}; give the run that made them"
            )
        self._transcribe = jax.jit(transcribe_tokens, static_argnums=(0, 4))

    def read(self, speech_tokens: Sequence[Integer[np.ndarray, "_"]]) -> list[str]:
        """What is heard in each."""
        longest = max([1, *map(len, speech_tokens)])
        ids = np.zeros((len(speech_tokens), -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE), np.int32)
        for row, tokens in zip(ids, speech_tokens, strict=True):
            row[: len(tokens)] = tokens
        counts = np.array([len(tokens) for tokens in speech_tokens], np.int32)
        heard: Any = self._transcribe(
            self._config, self._params, ids, np.maximum(counts, 1), self._config.max_text_tokens, self._model_state
        )
        text, num_text = (np.asarray(a) for a in heard)
        return [
            self._vocabulary.decode(text[i, : num_text[i]]).replace("\N{REPLACEMENT CHARACTER}", "?")
            if counts[i]
            else ""
            for i in range(len(ids))
        ]
