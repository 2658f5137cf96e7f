"""The flow-matching stage: prepared audio and its speech tokens → mel on the device → velocity of chunk-aware flow."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cv2jax.audio.mel import MEL_BINS
from cv2jax.config import TrainConfig, UserError
from cv2jax.data.batch import Batch
from cv2jax.data.corpus_batches import CorpusBatches
from cv2jax.evaluation.flow import FlowScore, TokenMeans
from cv2jax.models.flow_matching.config import DRAWN_PROMPT, FRAMES_PER_TOKEN, FlowMatchingConfig
from cv2jax.models.flow_matching.draws import draw
from cv2jax.models.flow_matching.features import mel_features, speaker_number, stand_in_embedding
from cv2jax.models.flow_matching.generate import generate, offline_mask, stream_mask
from cv2jax.models.flow_matching.model import FlowMatching, flow_loss, init_params
from cv2jax.nn.masks import ChunkMask, length_mask
from cv2jax.nn.splash import TILE
from cv2jax.parallel.distributed import global_batch, to_host
from cv2jax.parallel.sharding import computation_dtype, platform, replicated
from cv2jax.tasks.trained import load_params
from cv2jax.train.optimizer import make_optimizer
from cv2jax.train.state import TrainState, evaluation_params, init_train_state, restart
from cv2jax.train.step import CompiledByShape, StepFunction, lower_evaluation, make_train_step

MODEL_CONFIG = FlowMatchingConfig
BASELINE_BATCHES = 256  # of training, whose mean mel a token evaluations compare with


def make_task(config: TrainConfig) -> "FlowMatchingTask":
    """The task on the corpus and the speech tokens that `config.data` names."""
    return FlowMatchingTask(config, CorpusBatches(config, require_text=False, speech_tokens=True))


class FlowMatchingTask:
    """Trains and evaluates a `FlowMatching`; each speaker of the corpus has a stand-in embedding made from its name."""

    def __init__(self, config: TrainConfig, data: CorpusBatches) -> None:
        self._config, self._data = config, data
        self.model_config = _fit(config, data)
        speakers = data.corpus.speakers
        self._speaker_numbers = np.array([speaker_number(name) for name in speakers], np.uint32)
        self._optimizer = make_optimizer(config.optimizer, config.num_steps)

    def facts(self) -> dict[str, Any]:
        """What decides the numbers besides the config; with the checkpoint, all that synthesis needs."""
        model = dataclasses.asdict(self.model_config)
        for name in ("remat", "scan_layers", "attention"):  # how it is computed, and kept
            model.pop(name)
        tokens = self._data.tokens
        assert tokens is not None
        return {
            "corpus_hash": self._data.corpus.hash,
            "plan_hash": self._data.plan.hash,
            "tokens_hash": tokens.hash,
            "speech_tokenizer": tokens.tokenizer,
            "model": model,
        }

    def init_state(self, key: jax.Array) -> TrainState:
        """The state at step 0, boxed with logical axes."""
        return init_train_state(self.init_params(key), {}, self._optimizer)

    def init_params(self, key: jax.Array) -> Any:
        """Fresh parameters, boxed with logical axes."""
        return init_params(self.model_config, key)

    def warm_start(self, state: TrainState) -> TrainState:
        """The state at step 0 with the parameters of the run that `config.init_from` names."""
        if not self._config.init_from:
            return state
        mesh = jax.tree.leaves(state.params)[0].sharding.mesh
        params, _ = load_params(self._config.init_from, self.init_params, mesh, ema=True)
        return restart(state, params, self._optimizer)

    def keep(self, workdir: pathlib.Path) -> None:
        """Nothing: `run.json` and the checkpoint are all that synthesis needs."""
        del workdir

    def prepare(self, batch: dict[str, jax.Array], multiple: int = 1) -> dict[str, jax.Array]:
        """What the model reads, made on the device: `speech_tokens`, `num_tokens`, `mel`, `speaker_embedding`.

        Rows are padded to a multiple of so many tokens.
        """
        tokens = batch["speech_tokens"]
        tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % multiple)))
        num_speech = jnp.where(batch["row_mask"], batch["num_speech_tokens"], 0)
        arguments = (batch["waveform"], batch["num_samples"], num_speech, self._data.rate_hz, tokens.shape[1])
        mel, num_tokens = mel_features(*arguments)
        numbers = jnp.asarray(self._speaker_numbers)[batch["speaker"]]
        embedding = stand_in_embedding(numbers, self.model_config.speaker_dim)
        return {"speech_tokens": tokens, "num_tokens": num_tokens, "mel": mel, "speaker_embedding": embedding}

    def make_step(self) -> StepFunction:
        """The loss of one draw for each utterance and its gradient."""
        c = self.model_config
        model = FlowMatching(c, impl=c.attention)

        def loss(params: Any, model_state: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Any]:
            is_static = _uses_kernel(c) and c.mask_per == "utterance"
            ready = self.prepare(batch, TILE // FRAMES_PER_TOKEN if is_static else 1)
            draw_key, dropout_key = jax.random.split(key)
            num_slots = ready["speech_tokens"].shape[1]
            draws = draw(c, draw_key, ready["num_tokens"], num_slots, static_masks=is_static)
            value, error = flow_loss(model, params, ready, draws, dropout_key if c.encoder.dropout else None)
            row_finite = jnp.all(jnp.isfinite(error), axis=1)
            return value, ({"num_frames": 2 * jnp.sum(ready["num_tokens"]), "row_finite": row_finite}, model_state)

        return make_train_step(loss, self._optimizer)

    def batch_specs(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """One a bucket of the plan."""
        return self._data.training_shapes()

    def batch_sizes(self) -> set[int]:
        """Of training and evaluation."""
        return self._data.sizes()

    def batches(self, start_step: int, num_steps: int, mesh: Mesh) -> Iterator[tuple[int, int, Batch]]:
        """This process's rows of each step's batch."""
        return self._data.training(start_step, num_steps, mesh)

    def utterance_ids(self, step: int) -> list[str]:
        """Manifest ids of a step's rows."""
        return self._data.utterance_ids(step)

    def make_evaluate(self, mesh: Mesh, abstract: TrainState) -> Callable[[TrainState], dict[str, Any]]:
        """The loss of the held-out utterances by time and by mask, and the mel that is generated for their tokens."""
        c = self.model_config
        model = FlowMatching(c)

        def judge(params: Any, model_state: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            ready = self.prepare(batch)
            # The same draws at every evaluation; a batch is known by its first row.
            key = jax.random.fold_in(jax.random.key(self._config.seed), batch["utterance"][0])
            draws = draw(c, key, ready["num_tokens"], ready["speech_tokens"].shape[1])
            _, error = flow_loss(model, params, ready, draws)
            keys = self._keys(batch)
            return {
                **{name: ready[name] for name in ("speech_tokens", "num_tokens")},
                **{"error": error, "time": draws.time, "mask_index": draws.mask_index, "truth": ready["mel"]},
                "offline": generate(model, params, ready, keys, offline_mask(c)),
                "streamed": generate(model, params, ready, keys, stream_mask(c)),
            }

        shapes = self._data.held_out_shapes()
        compiled = CompiledByShape("the evaluation", lambda s: lower_evaluation(judge, abstract, s, mesh), shapes)

        means = functools.cache(lambda: self._token_means(mesh))  # at the first evaluation

        def evaluate(state: TrainState) -> dict[str, Any]:
            score = FlowScore(c.mask_chunks, means())
            for size, local in self._data.judged(mesh):
                batch = global_batch(mesh, local, size)
                score.add(to_host(compiled.for_batch(batch)(evaluation_params(state), state.model_state, batch)))
            return score.metrics()

        return evaluate

    def mel_distances(self, params: Any, mesh: Mesh, masks: Sequence[ChunkMask]) -> list[float]:
        """Mean |difference| between the held-out utterances' log-mel and what is generated under each mask (tokens)."""
        model, totals, count = FlowMatching(self.model_config), np.zeros(len(masks)), 0

        @functools.partial(jax.jit, out_shardings=replicated(mesh))
        def errors(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            ready = self.prepare(batch)
            valid = length_mask(2 * ready["num_tokens"], ready["mel"].shape[1])[..., None]
            made = [generate(model, params, ready, self._keys(batch), mask) for mask in masks]
            sums = [jnp.sum(jnp.where(valid, jnp.abs(mel - ready["mel"]), 0)) for mel in made]
            return jnp.stack(sums), jnp.sum(valid) * ready["mel"].shape[2]

        for size, local in self._data.judged(mesh):
            sums, num = to_host(errors(params, global_batch(mesh, local, size)))
            totals, count = totals + sums, count + int(num)
        return (totals / max(count, 1)).tolist()

    def _keys(self, batch: dict[str, jax.Array]) -> jax.Array:
        """Of each held-out utterance, always the same."""
        return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(self._config.seed), row))(batch["utterance"])

    def _token_means(self, mesh: Mesh) -> TokenMeans:
        """Of the first batches of training, each shown once."""
        c, plan = self.model_config, self._data.plan
        means = TokenMeans(c.num_speech_tokens, c.num_mels)
        ready = jax.jit(self.prepare, out_shardings=replicated(mesh))
        for _, size, local in self._data.training(0, min(plan.num_batches, BASELINE_BATCHES), mesh):
            shown = to_host(ready(global_batch(mesh, local, size)))
            means.add(shown["speech_tokens"], shown["num_tokens"], shown["mel"])
        return means


def _fit(config: TrainConfig, data: CorpusBatches) -> FlowMatchingConfig:
    """The model's config with this machine's dtype; UserError where corpus and model do not fit."""
    model, tokens = config.model, data.tokens
    assert tokens is not None
    if config.lora.rank:
        raise UserError(f"lora.rank={config.lora.rank}: is for the language model; set 0")
    if model.num_mels != MEL_BINS:
        raise UserError(f"model.num_mels={model.num_mels}: the features have {MEL_BINS} bins; set that")
    if tokens.num_codes > model.num_speech_tokens:
        raise UserError(
            f"data.speech_tokens={config.data.speech_tokens}: has tokens up to {tokens.num_codes - 1}, and"
            f" model.num_speech_tokens={model.num_speech_tokens}; set that to the size of the tokenizer's codebook"
        )
    _require_masks(model, data)
    fitted = dataclasses.replace(model, dtype=computation_dtype(config.compute_dtype))
    for part in (fitted, fitted.encoder, fitted.estimator):
        part.validate()
    return fitted


def _uses_kernel(model: FlowMatchingConfig) -> bool:
    return model.attention == "splash" or (model.attention == "auto" and platform() == "tpu")


def _require_masks(model: FlowMatchingConfig, data: CorpusBatches) -> None:
    """Raises UserError where a kernel, which is compiled for its mask, cannot do what the config asks for."""
    mend = "or set model.attention=xla"
    if _uses_kernel(model) and model.mask_per == "utterance" and DRAWN_PROMPT in model.mask_prompts:
        raise UserError(
            f"model.mask_prompts={model.mask_prompts}: -1 is drawn, and kernels need numbers; give some, {mend}"
        )
    if model.attention != "splash":
        return
    if model.mask_per == "batch":
        raise UserError(f"model.mask_per=batch: the kernel's masks are dealt out to utterances; set that, {mend}")
    for spec in data.training_shapes():
        if (rows := spec["waveform"].shape[0]) % len(model.masks):
            raise UserError(
                f"data.batch_multiple: a batch of {rows} rows cannot be dealt out to {len(model.masks)} masks;"
                f" give a multiple of masks and devices, {mend}"
            )
