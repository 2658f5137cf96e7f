"""The vocoder stage: prepared audio and its F0 → windows on the device → a GAN step → held-out copy synthesis."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from cv2jax.audio.mel import FLOW_MEL, MEL_HOP, mel_spectrogram
from cv2jax.config import TrainConfig, UserError, differences
from cv2jax.data.corpus_batches import CorpusBatches
from cv2jax.evaluation.copies import CopyScore
from cv2jax.models.hift_vocoder.config import HiftTrainingConfig
from cv2jax.models.hift_vocoder.discriminators import Discriminators
from cv2jax.models.hift_vocoder.losses import adversarial_loss, discriminator_loss, tpr_loss
from cv2jax.models.hift_vocoder.model import HiftVocoder, init_params, recount
from cv2jax.models.hift_vocoder.spectral import mel_distance, stft_distance
from cv2jax.models.hift_vocoder.stream import require_mel
from cv2jax.models.hift_vocoder.windows import cut_windows
from cv2jax.parallel.distributed import global_batch, to_host
from cv2jax.parallel.sharding import computation_dtype
from cv2jax.tasks.audio_task import AudioTask
from cv2jax.tasks.trained import load_vocoder
from cv2jax.train.gan_step import (
    GENERATOR,
    evaluation_generator,
    gan_optimizer,
    init_gan_state,
    make_gan_step,
)
from cv2jax.train.optimizer import make_optimizer
from cv2jax.train.state import TrainState, restart
from cv2jax.train.step import CompiledByShape, StepFunction, lower_evaluation

MODEL_CONFIG = HiftTrainingConfig


def make_task(config: TrainConfig) -> "HiftVocoderTask":
    """The task on the corpus that `config.data` names and the F0 that `cv2jax f0` wrote beside it."""
    return HiftVocoderTask(config, CorpusBatches(config, require_text=False, f0=True))


class HiftVocoderTask(AudioTask):
    """Trains a `HiftVocoder` against its `Discriminators`, and judges its copies of held-out speech."""

    def __init__(self, config: TrainConfig, data: CorpusBatches) -> None:
        super().__init__(data)
        self._config = config
        self.model_config: HiftTrainingConfig = _fit(config, data)
        dtype = self.model_config.generator.dtype
        self._vocoder = HiftVocoder(self.model_config.generator)
        self._judges = Discriminators(
            self.model_config.discriminators, dtype=dtype, remat=self.model_config.remat_discriminators
        )
        rate = self.model_config.discriminator_learning_rate
        theirs = dataclasses.replace(
            config.optimizer,
            learning_rate=rate,
            final_learning_rate=min(rate, config.optimizer.final_learning_rate),
            ema_decay=0.0,
        )
        if self.model_config.adversarial_from >= config.num_steps:
            logging.warning("model.adversarial_from lies behind the last step: the discriminators will not be trained")
        # Their schedule starts with them: an optimizer counts only the steps that it takes.
        num_contests = max(config.num_steps - self.model_config.adversarial_from, 1)
        self._optimizers = make_optimizer(config.optimizer, config.num_steps), make_optimizer(theirs, num_contests)

    def facts(self) -> dict[str, Any]:
        """What decides the numbers besides the config; with the checkpoint, all that synthesis needs."""
        f0 = self._data.f0
        assert f0 is not None
        return {
            "corpus_hash": self._data.corpus.hash,
            "plan_hash": self._data.plan.hash,
            "f0_hash": f0.hash,
            "mel": dataclasses.asdict(FLOW_MEL),
            "model": dataclasses.asdict(self.model_config.generator),
        }

    def init_state(self, key: jax.Array) -> TrainState:
        """Both networks at step 0, boxed with logical axes."""
        generator_key, judges_key = jax.random.split(key)
        window = jnp.zeros((1, MEL_HOP * self.model_config.window_frames))
        judges = self._judges.init(judges_key, window)["params"]
        return init_gan_state(init_params(self.model_config.generator, generator_key), judges, *self._optimizers)

    def warm_start(self, state: TrainState) -> TrainState:
        """The state at step 0 with the generator of the run that `config.init_from` names."""
        if not self._config.init_from:
            return state
        mesh = jax.tree.leaves(state.params)[0].sharding.mesh
        own = self.model_config.generator
        units = {"mel_origin": own.mel_origin, "upsampling_unit": own.upsampling_unit}
        theirs, params = recount(*load_vocoder(self._config.init_from, mesh), **units)
        free = {"dtype": "", "f0_look_ahead": 0}  # neither changes a shape
        ours = dataclasses.asdict(own) | free
        lines = differences(ours, dataclasses.asdict(theirs) | free, "model.generator.")
        if lines:
            raise UserError(
                f"init_from={self._config.init_from}: is another vocoder ({'; '.join(lines)}); set the same sizes"
            )
        return restart(state, {GENERATOR: params}, gan_optimizer(*self._optimizers))

    def make_step(self) -> StepFunction:
        """Windows, the generator's spectral losses, and the contest."""
        c = self.model_config

        def prepare(batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
            arguments = (batch["waveform"], batch["num_samples"], batch["f0"], key)
            return cut_windows(*arguments, c.window_frames, c.windows_per_utterance)

        def generate(params: Any, windows: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Any]:
            f0_key, noise_key = jax.random.split(key)
            keys = jax.random.split(noise_key, windows["mel"].shape[0])
            uses_target = jax.random.bernoulli(f0_key, c.target_f0_share, (len(keys),))
            options: Any = {"f0": windows["f0"], "uses_f0": uses_target} if c.target_f0_share else {}
            made: Any = self._vocoder.apply({"params": params}, windows["mel"], keys, **options)
            return made.waveform, made.f0

        def spectral(made: jax.Array, f0: Any, windows: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
            by_row = mel_distance(made, windows["waveform"])
            f0_by_row = jnp.mean(jnp.abs(f0 - windows["f0"]), axis=1)
            mel, f0_error = jnp.mean(by_row), jnp.mean(f0_by_row)
            value = c.mel_weight * mel + c.f0_weight * f0_error
            metrics = {"mel_l1": mel, "f0_l1_hz": f0_error}
            if c.stft_weight:
                metrics["stft_l1"] = jnp.mean(stft_distance(made, windows["waveform"]))
                value = value + c.stft_weight * metrics["stft_l1"]
            row_finite = jnp.isfinite(by_row + f0_by_row).reshape(-1, c.windows_per_utterance).all(axis=1)
            return value, metrics | {"row_finite": row_finite}

        return make_gan_step(
            prepare=prepare,
            generate=generate,
            spectral_loss=spectral,
            discriminator_loss=self._discriminator_loss,
            adversarial_loss=self._adversarial_loss,
            real=lambda windows: windows["waveform"],
            optimizer_generator=self._optimizers[0],
            optimizer_discriminators=self._optimizers[1],
            adversarial_from=c.adversarial_from,
        )

    def _compare(self, params: Any, fake: jax.Array, real: jax.Array) -> tuple[Any, Any, jax.Array]:
        compared: Any = self._judges.apply({"params": params}, fake, real, method="compare")
        feature_loss = sum((c.feature_loss for c in compared), start=jnp.zeros(()))
        return [c.generated for c in compared], [c.recorded for c in compared], feature_loss

    def _discriminator_loss(self, params: Any, fake: jax.Array, real: jax.Array) -> tuple[jax.Array, Any]:
        made, recorded, _ = self._compare(params, fake, real)
        relative = tpr_loss(recorded, made)
        return discriminator_loss(recorded, made) + self.model_config.tpr_weight * relative, {}

    def _adversarial_loss(self, params: Any, fake: jax.Array, real: jax.Array) -> tuple[jax.Array, Any]:
        c = self.model_config
        made, recorded, matching = self._compare(params, fake, real)
        adversarial = adversarial_loss(made)
        value = adversarial + c.feature_weight * matching + c.tpr_weight * tpr_loss(made, recorded)
        return value, {"adversarial_loss": adversarial, "feature_loss": matching}

    def make_evaluate(self, mesh: Mesh, abstract: TrainState) -> Callable[[TrainState], dict[str, Any]]:
        """Copies of whole held-out utterances, with predicted F0, and their distances."""
        seed = self._config.seed

        def copy(params: Any, model_state: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            del model_state
            real, counts = batch["waveform"].astype(jnp.float32) / 32768, batch["num_samples"]
            mel, num_frames = map(jnp.asarray, mel_spectrogram(real, counts))
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), batch["utterance"])
            made: Any = self._vocoder.apply({"params": params}, jnp.swapaxes(mel, 1, 2), keys, num_frames)
            return {
                "truth": real[:, : made.waveform.shape[1]],
                "copy": made.waveform,
                "f0": made.f0,
                "target_f0": batch["f0"][:, : mel.shape[2]],
                "num_frames": jnp.where(batch["row_mask"], num_frames, 0),
            }

        def lower(specs: Any) -> jax.stages.Lowered:
            generator = dataclasses.replace(abstract, params=abstract.params[GENERATOR])
            return lower_evaluation(copy, generator, specs, mesh)

        compiled = CompiledByShape("the evaluation", lower, self._data.held_out_shapes())
        voiced_above = self.model_config.generator.voiced_above_hz

        def evaluate(state: TrainState) -> dict[str, Any]:
            score = CopyScore(voiced_above)
            for size, local in self._data.judged(mesh):
                batch = global_batch(mesh, local, size)
                score.add(to_host(compiled.for_batch(batch)(evaluation_generator(state), state.model_state, batch)))
            return score.metrics()

        return evaluate


def _fit(config: TrainConfig, data: CorpusBatches) -> HiftTrainingConfig:
    """The model's config with this machine's dtype; UserError where corpus and model do not fit."""
    model: HiftTrainingConfig = config.model
    if config.lora.rank:
        raise UserError(f"lora.rank={config.lora.rank}: is for the language model; set 0")
    require_mel(model.generator, FLOW_MEL)
    dtype = computation_dtype(config.compute_dtype)
    fitted = dataclasses.replace(model, generator=dataclasses.replace(model.generator, dtype=dtype))
    for part in (fitted, fitted.generator, fitted.discriminators):
        part.validate()
    return fitted
