"""The speaker encoder stage: crops of prepared speech → fbank on the device → CAM++ with AAM-softmax → held-out EER."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from cv2jax.audio.fbank import FBANK_BINS, FBANK_RATE_HZ
from cv2jax.config import TrainConfig, UserError
from cv2jax.data.corpus_batches import CorpusBatches
from cv2jax.evaluation.speaker import SpeakerScore
from cv2jax.models.speaker_encoder.aam import aam_loss, margin_at
from cv2jax.models.speaker_encoder.config import SpeakerEncoderConfig
from cv2jax.models.speaker_encoder.features import speaker_features, training_features
from cv2jax.models.speaker_encoder.model import embed, embed_in_training, init_model_state, init_params
from cv2jax.parallel.distributed import global_batch, to_host
from cv2jax.parallel.sharding import computation_dtype
from cv2jax.tasks.audio_task import AudioTask
from cv2jax.train.optimizer import make_optimizer
from cv2jax.train.state import TrainState, init_train_state
from cv2jax.train.step import CompiledByShape, StepFunction, lower_evaluation, make_train_step

MODEL_CONFIG = SpeakerEncoderConfig
_NAMED = 8  # speakers with a single utterance that a warning names


def make_task(config: TrainConfig) -> "SpeakerEncoderTask":
    """The task on the corpus that `config.data` names."""
    return SpeakerEncoderTask(config, CorpusBatches(config, require_text=False, speaker=True))


class SpeakerEncoderTask(AudioTask):
    """Trains a `CamPlus` to tell the speakers of the training split apart, and judges it by pairs of held-out utterances."""

    def __init__(self, config: TrainConfig, data: CorpusBatches) -> None:
        super().__init__(data)
        self._config = config
        self.model_config = _fit(config)
        self._names = data.corpus.speakers
        self._class_of = _number_speakers(self._names, data)
        speeds = len(self.model_config.speeds)
        self._init_params = functools.partial(
            init_params, self.model_config, num_speakers=speeds * (int(self._class_of.max()) + 1)
        )
        self._optimizer = make_optimizer(config.optimizer, config.num_steps)

    def facts(self) -> dict[str, Any]:
        """What decides the numbers besides the config; with the checkpoint, all that `cv2jax embed` needs."""
        model = dataclasses.asdict(self.model_config)
        model.pop("remat")  # decides memory, never a number
        return {
            "corpus_hash": self._data.corpus.hash,
            "plan_hash": self._data.plan.hash,
            "num_speakers": int(self._class_of.max()) + 1,
            "features": {
                "kind": "kaldi_fbank",
                "rate_hz": FBANK_RATE_HZ,
                "num_mels": FBANK_BINS,
                "subtract_mean": True,
            },
            "model": model,
        }

    def init_state(self, key: jax.Array) -> TrainState:
        """The state at step 0, boxed with logical axes."""
        return init_train_state(self._init_params(key), init_model_state(self.model_config), self._optimizer)

    def warm_start(self, state: TrainState) -> TrainState:
        """The state as it is: `config.init_from` is refused."""
        return state

    def make_step(self) -> StepFunction:
        """A crop of each row, disturbed, and the AAM-softmax of its speaker; silent rows teach nothing."""
        c, rate_hz, class_of = self.model_config, self._data.rate_hz, self._class_of

        def loss(params: Any, model_state: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Any]:
            features, num_frames, speed = training_features(c, key, batch["waveform"], batch["num_samples"], rate_hz)
            num_frames = jnp.where(batch["row_mask"], num_frames, 0)
            margin = margin_at(model_state["num_batches"], margin=c.margin, start=c.margin_start, end=c.margin_end)
            embedding, new_state = embed_in_training(c, params, model_state, features, num_frames)
            labels = jnp.asarray(class_of)[batch["speaker"]] * len(c.speeds) + speed
            row_loss, right = aam_loss(embedding, params["classes"], labels, margin, c.scale)
            counted = num_frames > 0
            mean = lambda values: jnp.sum(jnp.where(counted, values, 0)) / jnp.maximum(jnp.sum(counted), 1)  # noqa: E731
            metrics = {
                "accuracy": mean(right),
                "margin": margin,
                "num_left_out": jnp.sum(batch["row_mask"] & ~counted),
                "row_finite": jnp.isfinite(row_loss) | ~counted,
            }
            return mean(row_loss), (metrics, new_state)

        return make_train_step(loss, self._optimizer)

    def make_evaluate(self, mesh: Mesh, abstract: TrainState) -> Callable[[TrainState], dict[str, Any]]:
        """The equal-error rate over pairs of held-out utterances, each embedded whole."""
        c, rate_hz, shapes = self.model_config, self._data.rate_hz, self._data.held_out_shapes()

        def embed_rows(params: Any, model_state: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            features, num_frames = speaker_features(batch["waveform"], batch["num_samples"], rate_hz)
            embedding = embed(c, params, model_state, features, num_frames)
            known = {name: batch[name] for name in ("speaker", "row_mask")}
            return known | {"embedding": embedding, "usable": num_frames > 0}

        compiled = CompiledByShape(
            "the evaluation", lambda specs: lower_evaluation(embed_rows, abstract, specs, mesh), shapes
        )

        def evaluate(state: TrainState) -> dict[str, Any]:
            score = SpeakerScore(self._names, self._config.seed)
            for size, local in self._data.judged(mesh):
                batch = global_batch(mesh, local, size)
                score.add(**to_host(compiled.for_batch(batch)(state.params, state.model_state, batch)))
            return score.metrics()

        return evaluate


def _fit(config: TrainConfig) -> SpeakerEncoderConfig:
    """The model's config with this machine's dtype; UserError for what this stage cannot do."""
    model = config.model
    for name, value in (("lora.rank", config.lora.rank), ("optimizer.ema_decay", config.optimizer.ema_decay)):
        if value:  # an average of parameters has no batch-norm statistics of its own
            raise UserError(f"{name}={value}: is not for the speaker encoder; set 0")
    if config.init_from:
        raise UserError(
            f"init_from={config.init_from}: is not for the speaker encoder, which trains from scratch; leave it"
        )
    if model.num_mels != FBANK_BINS:
        raise UserError(f"model.num_mels={model.num_mels}: the features have {FBANK_BINS} bins; set that")
    fitted = dataclasses.replace(model, dtype=computation_dtype(config.compute_dtype))
    fitted.validate()
    return fitted


def _number_speakers(names: list[str], data: CorpusBatches) -> np.ndarray:
    """The class of each speaker of the corpus, -1 of those that training never hears; UserError for fewer than two."""
    counts = np.bincount(data.train.speaker, minlength=len(names))
    heard, single = np.flatnonzero(counts), np.flatnonzero(counts == 1)
    if len(heard) < 2:
        raise UserError(
            f"data.corpus={data.corpus.path}: split {data.train.name} has one speaker ({names[int(heard[0])]}), and two or"
            " more are told apart; give a corpus whose manifest names its speakers"
        )
    if len(single):
        shown = ", ".join(names[i] for i in single[:_NAMED].tolist()) + (", …" if len(single) > _NAMED else "")
        logging.warning("%d speakers have a single utterance to train on: %s", len(single), shown)
    numbers = np.full(len(names), -1, np.int32)
    numbers[heard] = np.arange(len(heard), dtype=np.int32)
    return numbers
