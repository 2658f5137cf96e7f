"""The language model stage: a token corpus, packed → next-token loss → what it says freely, read by the tokenizer's ASR."""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from cv2jax.config import TrainConfig, UserError
from cv2jax.data.batch import Batch
from cv2jax.data.content import BatchContent
from cv2jax.data.token_batches import LayOut, TokenBatches
from cv2jax.data.token_corpus import TEXT_TOKENIZER
from cv2jax.evaluation.free_running import mean_metrics
from cv2jax.models.text_speech_lm.augment import replace_speech
from cv2jax.models.text_speech_lm.loss import packed_loss
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig, init_params
from cv2jax.models.text_speech_lm.sequence import build_mixed_row, row_length
from cv2jax.nn.splash import TILE
from cv2jax.parallel.distributed import global_batch, to_host
from cv2jax.parallel.sharding import computation_dtype
from cv2jax.tasks.free_run import FreeRun
from cv2jax.tasks.warm_start import load_initial
from cv2jax.train.lora import add_lora, effective_params, trained_by
from cv2jax.train.optimizer import make_optimizer
from cv2jax.train.state import TrainState, evaluation_params, init_train_state, restart
from cv2jax.train.step import CompiledByShape, StepFunction, lower_evaluation, make_train_step

MODEL_CONFIG = TextSpeechLmConfig


def make_task(config: TrainConfig) -> "TextSpeechLmTask":
    """The task on the token corpus that `config.data` names."""
    return TextSpeechLmTask(config, TokenBatches(config, overhead=int(row_length(0, 0))))


class TextSpeechLmTask:
    """Trains and evaluates a `TextSpeechLm`; the corpus gives the text vocabulary where the model leaves it open."""

    def __init__(self, config: TrainConfig, data: TokenBatches) -> None:
        self._config, self._data = config, data
        self.model_config = _fit_to_corpus(config, data)
        self._lay_out: LayOut = functools.partial(
            build_mixed_row,
            text_vocabulary_size=self.model_config.backbone.vocabulary_size,
            num_speech_tokens=self.model_config.num_speech_tokens,
            ratio=self.model_config.ratio,
            max_length=config.data.row_length,
        )
        self._optimizer = make_optimizer(config.optimizer, config.num_steps)
        self._is_trained = trained_by(config.lora)
        self._free_run = FreeRun(config, self.model_config, data)

    def facts(self) -> dict[str, Any]:
        """What decides the numbers besides the config; with the checkpoint, all that decoding needs."""
        model = dataclasses.asdict(self.model_config)
        for name in ("remat", "scan_layers"):  # how it is computed, and kept
            model["backbone"].pop(name)
        for name in ("attention", "loss_chunk"):
            model.pop(name)
        return {
            "corpus_hash": self._data.corpus.hash,
            "plan_hash": self._data.plan.hash,
            "text_tokenizer": self._data.corpus.metadata.text_tokenizer,
            "speech_tokenizer": self._data.corpus.metadata.speech_tokenizer,
            "prefix": self._data.corpus.metadata.prefix,
            "normalizer": self._data.corpus.metadata.normalizer,
            "model": model,
        }

    def init_state(self, key: jax.Array) -> TrainState:
        """The state at step 0, boxed with logical axes."""
        params_key, lora_key = jax.random.split(key)
        params = add_lora(init_params(self.model_config, params_key), self._config.lora, lora_key)
        return init_train_state(params, {}, self._optimizer, self._is_trained)

    def warm_start(self, state: TrainState) -> TrainState:
        """The state at step 0 with the weights that `config.init_from` names, of a run or of a Qwen2 directory."""
        place = self._config.init_from
        if not place:
            return state
        params = load_initial(place, self.model_config, state.params, self._data.corpus.text_tokenizer)
        logging.info("starting from the weights in %s", place)
        return restart(state, params, self._optimizer, self._is_trained)

    def keep(self, workdir: pathlib.Path) -> None:
        """The text tokenizer."""
        place, whole = workdir / TEXT_TOKENIZER, workdir / f".{TEXT_TOKENIZER}.tmp"
        if not place.is_dir():
            shutil.rmtree(whole, ignore_errors=True)  # of a killed process
            shutil.copytree(self._data.corpus.text_tokenizer, whole)
            whole.rename(place)

    def make_step(self) -> StepFunction:
        """The loss of packed rows and its gradient, of all parameters or of the low-rank factors."""

        c = self.model_config

        def loss(params: Any, model_state: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Any]:
            if c.speech_noise:
                batch = batch | {"token": replace_speech(batch["token"], batch["kind"], key, c.speech_noise)}
            value, metrics = packed_loss(c, effective_params(params, self._config.lora), batch)
            return value, (metrics, model_state)

        return make_train_step(loss, self._optimizer, self._is_trained)

    def batch_specs(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """One: packed rows have one shape."""
        return [self._data.shapes()]

    def batch_sizes(self) -> set[int]:
        """Of training and evaluation."""
        return {self._config.data.batch_rows}

    def batches(self, start_step: int, num_steps: int, mesh: Mesh) -> Iterator[tuple[int, int, Batch]]:
        """This process's rows of each step's batch."""
        return self._data.training(start_step, num_steps, mesh, self._lay_out)

    def content(self, step: int, local: Batch) -> BatchContent:
        """What a step's batch holds."""
        return self._data.content(step, local)

    def planned_padding(self) -> float:
        """Padding share of an epoch."""
        return 1 - self._data.plan.fill

    def utterance_ids(self, step: int) -> list[str]:
        """Manifest ids of the utterances in each of a step's rows."""
        return self._data.utterance_ids(step)

    def make_evaluate(self, mesh: Mesh, abstract: TrainState) -> Callable[[TrainState], dict[str, Any]]:
        """Teacher-forced metrics of the held-out utterances, and what is said freely for their texts.

        Decoding compiles at its first call.
        """
        lora = self._config.lora

        def forced(params: Any, model_state: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            return packed_loss(self.model_config, effective_params(params, lora), batch)[1]

        specs = [self._data.shapes()]
        compiled = CompiledByShape("the evaluation", lambda s: lower_evaluation(forced, abstract, s, mesh), specs)
        merge = jax.jit(lambda params: effective_params(params, lora))

        def evaluate(state: TrainState) -> dict[str, Any]:
            params, metrics = evaluation_params(state), []
            for size, local in self._data.judged(mesh, self._lay_out):
                batch = global_batch(mesh, local, size)
                metrics.append(to_host(compiled.for_batch(batch)(params, state.model_state, batch)))
            merged = merge(params) if lora.rank else params
            return mean_metrics(metrics) | self._free_run.metrics(merged, mesh)

        return evaluate


def _fit_to_corpus(config: TrainConfig, data: TokenBatches) -> TextSpeechLmConfig:
    """The model's config with the corpus's text vocabulary, if it leaves that open, and this machine's dtype."""
    metadata, model = data.corpus.metadata, config.model
    size = model.backbone.vocabulary_size or metadata.vocabulary_size
    for name, ours, theirs in (
        ("backbone.vocabulary_size", size, metadata.vocabulary_size),
        ("num_speech_tokens", model.num_speech_tokens, metadata.num_codes),
    ):
        if ours < theirs:
            raise UserError(f"model.{name}={ours}: the corpus {config.data.corpus} has {theirs} tokens; set that")
    rows = config.data.row_length
    if model.attention == "splash" and rows % TILE:
        raise UserError(f"model.attention=splash: data.row_length={rows} must be a multiple of {TILE}; or set auto")
    dtype = computation_dtype(config.compute_dtype)
    if model.attention == "cudnn" and (jax.default_backend() != "gpu" or dtype != "bfloat16"):
        raise UserError(
            f"model.attention=cudnn: needs a GPU and bfloat16, not {jax.default_backend()} and {dtype}; set auto"
        )
    backbone = dataclasses.replace(model.backbone, vocabulary_size=size, dtype=dtype)
    fitted = dataclasses.replace(model, backbone=backbone)
    fitted.validate()
    backbone.validate()
    return fitted
