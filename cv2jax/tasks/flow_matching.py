"""The flow-matching stage: prepared audio and its speech tokens → mel on the device → velocity of chunk-aware flow."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cv2jax.audio.mel import MEL_BINS
from cv2jax.config import TrainConfig, UserError
from cv2jax.data.corpus_batches import CorpusBatches
from cv2jax.models.flow_matching.cfm import masked_mean
from cv2jax.models.flow_matching.config import DRAWN_PROMPT, FRAMES_PER_TOKEN, FlowMatchingConfig
from cv2jax.models.flow_matching.draws import draw
from cv2jax.models.flow_matching.features import mel_features, speaker_number, stand_in_embedding
from cv2jax.models.flow_matching.model import FlowMatching, flow_loss, init_params
from cv2jax.nn.masks import ChunkMask, length_mask
from cv2jax.nn.splash import TILE
from cv2jax.parallel.sharding import computation_dtype, platform
from cv2jax.tasks.audio_task import AudioTask
from cv2jax.tasks.heard_flow import HeardFlow
from cv2jax.tasks.model_directory import EMBEDDINGS_FACT, STAND_IN
from cv2jax.tasks.warm_start import load_initial_flow
from cv2jax.train.optimizer import make_optimizer
from cv2jax.train.state import TrainState, init_train_state, restart
from cv2jax.train.step import StepFunction, make_train_step

MODEL_CONFIG = FlowMatchingConfig


def make_task(config: TrainConfig) -> "FlowMatchingTask":
    """The task on the corpus, the speech tokens and the speaker embeddings that `config.data` names."""
    return FlowMatchingTask(config, CorpusBatches(config, require_text=False, speech_tokens=True, embeddings=True))


class FlowMatchingTask(AudioTask):
    """Trains and evaluates a `FlowMatching` on `config.data.speaker_embeddings`.

    Without these, each speaker of the corpus has a stand-in embedding made from its name.
    """

    def __init__(self, config: TrainConfig, data: CorpusBatches) -> None:
        super().__init__(data)
        self._config = config
        self.model_config = _fit(config, data)
        speakers = data.corpus.speakers
        self._speaker_numbers = np.array([speaker_number(name) for name in speakers], np.uint32)
        self._optimizer = make_optimizer(config.optimizer, config.num_steps)
        self._heard = HeardFlow(self.model_config, data, self.prepare, config.seed)

    def facts(self) -> dict[str, Any]:
        """What decides the numbers besides the config; with the checkpoint, all that synthesis needs."""
        model = dataclasses.asdict(self.model_config)
        for name in ("remat", "scan_layers", "attention"):  # how it is computed, and kept
            model.pop(name)
        tokens = self._data.tokens
        assert tokens is not None
        speakers: dict[str, Any] = {EMBEDDINGS_FACT: STAND_IN}
        if (vectors := self._data.embeddings) is not None:
            said = {"encoder": vectors.encoder, "of": vectors.of}
            speakers = {EMBEDDINGS_FACT: said, "speaker_embeddings_hash": vectors.hash}
        return {
            "corpus_hash": self._data.corpus.hash,
            "plan_hash": self._data.plan.hash,
            "tokens_hash": tokens.hash,
            "speech_tokenizer": tokens.tokenizer,
            **speakers,
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
        params = load_initial_flow(self._config.init_from, self.model_config, state.params)
        return restart(state, params, self._optimizer)

    def prepare(self, batch: dict[str, jax.Array], multiple: int = 1) -> dict[str, jax.Array]:
        """What the model reads, made on the device: `speech_tokens`, `num_tokens`, `mel`, `speaker_embedding`.

        Rows are padded to a multiple of so many tokens.
        """
        tokens = batch["speech_tokens"]
        tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % multiple)))
        num_speech = jnp.where(batch["row_mask"], batch["num_speech_tokens"], 0)
        arguments = (batch["waveform"], batch["num_samples"], num_speech, self._data.rate_hz, tokens.shape[1])
        mel, num_tokens = mel_features(*arguments)
        if self._data.embeddings is not None:
            embedding = batch["speaker_embedding"]
        else:
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
            is_frame = length_mask(FRAMES_PER_TOKEN * ready["num_tokens"], error.shape[1])
            metrics = {
                "num_frames": jnp.sum(is_frame),
                "velocity_loss": masked_mean(error, is_frame),  # without that of the prior
                "row_finite": jnp.all(jnp.isfinite(error), axis=1),
            }
            return value, (metrics, model_state)

        return make_train_step(loss, self._optimizer)

    def make_evaluate(self, mesh: Mesh, abstract: TrainState) -> Callable[[TrainState], dict[str, Any]]:
        """As `HeardFlow.make_evaluate`."""
        return self._heard.make_evaluate(mesh, abstract)

    def mel_distances(self, params: Any, mesh: Mesh, masks: Sequence[ChunkMask]) -> list[float]:
        """As `HeardFlow.mel_distances`."""
        return self._heard.mel_distances(params, mesh, masks)


def _fit(config: TrainConfig, data: CorpusBatches) -> FlowMatchingConfig:
    """The model's config with this machine's dtype; UserError where corpus and model do not fit."""
    model, tokens = config.model, data.tokens
    assert tokens is not None
    if config.lora.rank:
        raise UserError(f"lora.rank={config.lora.rank}: is for the language model; set 0")
    if model.num_mels != MEL_BINS:
        raise UserError(f"model.num_mels={model.num_mels}: the features have {MEL_BINS} bins; set that")
    if not tokens.num_codes:
        raise UserError(
            f"data.speech_tokens={config.data.speech_tokens}: does not say how many codes its tokenizer has; run"
            " `cv2jax encode` again"
        )
    if tokens.num_codes > model.num_speech_tokens:
        raise UserError(
            f"data.speech_tokens={config.data.speech_tokens}: has tokens up to {tokens.num_codes - 1}, and"
            f" model.num_speech_tokens={model.num_speech_tokens}; set that to the size of the tokenizer's codebook"
        )
    if (vectors := data.embeddings) is not None and vectors.dim != model.speaker_dim:
        raise UserError(
            f"data.speaker_embeddings={config.data.speaker_embeddings}: has embeddings of {vectors.dim}, and"
            f" model.speaker_dim={model.speaker_dim}; set that to {vectors.dim}"
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
