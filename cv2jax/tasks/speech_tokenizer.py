"""The speech tokenizer stage: prepared speech → log-mel on the device → FSQ inside a recogniser → held-out error rates."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from cv2jax.audio.mel import WHISPER_BINS, WHISPER_RATE_HZ
from cv2jax.audio.pitch import pitch_track
from cv2jax.config import TrainConfig, UserError
from cv2jax.data.corpus_batches import CorpusBatches
from cv2jax.evaluation.recognition import RecognitionScore
from cv2jax.models.speech_tokenizer.augment import spec_augment
from cv2jax.models.speech_tokenizer.config import SpeechTokenizerConfig
from cv2jax.models.speech_tokenizer.decode import transcribe
from cv2jax.models.speech_tokenizer.features import speech_features
from cv2jax.models.speech_tokenizer.loss import tokenizer_loss
from cv2jax.models.speech_tokenizer.model import SpeechTokenizer, SpeechTokenizerOutput, init_model_state, init_params
from cv2jax.parallel.distributed import global_batch, to_host
from cv2jax.parallel.sharding import computation_dtype
from cv2jax.tasks.audio_task import AudioTask
from cv2jax.tasks.trained import load_params
from cv2jax.text.characters import CharacterVocabulary
from cv2jax.train.optimizer import make_optimizer
from cv2jax.train.state import TrainState, init_train_state, restart
from cv2jax.train.step import CompiledByShape, StepFunction, lower_evaluation, make_train_step

MODEL_CONFIG = SpeechTokenizerConfig
TOKEN_SAMPLES = 640  # at 16 kHz: one speech token is 40 ms


def make_task(config: TrainConfig) -> "SpeechTokenizerTask":
    """The task on the corpus that `config.data` names."""
    return SpeechTokenizerTask(config, CorpusBatches(config, require_text=True))


class SpeechTokenizerTask(AudioTask):
    """Trains and evaluates a `SpeechTokenizer`; the vocabulary and the longest transcript come from the corpus."""

    def __init__(self, config: TrainConfig, data: CorpusBatches) -> None:
        if config.model.num_mels != WHISPER_BINS:
            raise UserError(f"model.num_mels={config.model.num_mels}: the features have {WHISPER_BINS} bands; set that")
        for name, value in (("lora.rank", config.lora.rank), ("optimizer.ema_decay", config.optimizer.ema_decay)):
            if value:  # `cv2jax encode` reads the parameters as they are
                raise UserError(f"{name}={value}: is for the language model; set 0")
        if config.init_from and config.model.quantizer == "vq":
            raise UserError(
                f"init_from={config.init_from}: a vq codebook cannot be taken over; train from scratch, or fsq"
            )
        super().__init__(data)
        self.vocabulary = CharacterVocabulary.from_counts(data.train.characters)
        self._encode_text = self.vocabulary.encode
        unknown = set(data.held_out.characters) - set(self.vocabulary.characters)
        if unknown:
            logging.warning("characters of split %s that training never shows: %s", data.held_out.name, sorted(unknown))
        self.model_config: SpeechTokenizerConfig = dataclasses.replace(
            config.model,
            vocabulary_size=self.vocabulary.size,
            max_text_tokens=max(config.model.max_text_tokens, data.max_text),
            dtype=computation_dtype(config.compute_dtype),
        )
        self.model_config.validate()
        self._init_from = config.init_from
        self._optimizer = make_optimizer(config.optimizer, config.num_steps)

    def facts(self) -> dict[str, Any]:
        """What decides the numbers besides the config; also all that `cv2jax encode` needs beside the checkpoint."""
        return {
            "corpus_hash": self._data.corpus.hash,
            "plan_hash": self._data.plan.hash,
            "vocabulary": list(self.vocabulary.characters),
            # Rematerialisation decides memory, never a number.
            "model": {k: v for k, v in dataclasses.asdict(self.model_config).items() if k != "remat"},
        }

    def init_state(self, key: jax.Array) -> TrainState:
        """The state at step 0, boxed with logical axes."""
        params_key, state_key = jax.random.split(key)
        params = init_params(self.model_config, params_key)
        return init_train_state(params, init_model_state(self.model_config, state_key), self._optimizer)

    def warm_start(self, state: TrainState) -> TrainState:
        """The state at step 0 with the parameters of the run that `config.init_from` names."""
        if not self._init_from:
            return state
        mesh = jax.tree.leaves(state.params)[0].sharding.mesh
        params, _ = load_params(self._init_from, functools.partial(init_params, self.model_config), mesh)
        return restart(state, params, self._optimizer)

    def make_step(self) -> StepFunction:
        """Augment, teacher-force, cross-entropy and what else the config weighs."""
        model, c, rate_hz = SpeechTokenizer(self.model_config), self.model_config, self._data.rate_hz
        masks = ("num_freq_masks", "max_freq_bins", "num_time_masks", "max_time_share")
        masking = {name: getattr(c, name) for name in masks}

        def loss(params: Any, model_state: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Any]:
            augment_key, dropout_key = jax.random.split(key)
            waveform, num_samples, mel, num_frames = speech_features(batch["waveform"], batch["num_samples"], rate_hz)
            if c.pitch_weight > 0:
                f0, f0_mask = pitch_track(waveform, num_samples, WHISPER_RATE_HZ, TOKEN_SAMPLES)
                batch = batch | {"f0": jnp.asarray(f0), "f0_mask": jnp.asarray(f0_mask)}
            applied = model.apply(
                {"params": params},
                spec_augment(mel, num_frames, augment_key, **masking),
                num_frames,
                batch["text_tokens"],
                batch["num_text_tokens"],
                model_state,
                deterministic=False,
                row_mask=batch["row_mask"],
                rngs={"dropout": dropout_key},
            )
            output = cast(SpeechTokenizerOutput, applied)
            value, metrics = tokenizer_loss(output, batch, c)
            row_finite = jnp.isfinite(metrics.pop("row_loss"))
            return value, ({**metrics, "row_finite": row_finite}, output.model_state)

        return make_train_step(loss, self._optimizer)

    def make_evaluate(self, mesh: Mesh, abstract: TrainState) -> Callable[[TrainState], dict[str, Any]]:
        """Greedy transcription of the held-out utterances and use of the codebook."""
        c, rate_hz, shapes = self.model_config, self._data.rate_hz, self._data.held_out_shapes()

        def recognise(params: Any, model_state: Any, batch: dict[str, jax.Array]) -> dict[str, Any]:
            _, _, mel, num_frames = speech_features(batch["waveform"], batch["num_samples"], rate_hz)
            # A runaway decoder is an error, and ends.
            longest = min(2 * batch["text_tokens"].shape[1], c.max_text_tokens)
            heard = vars(transcribe(c, params, mel, num_frames, longest, model_state))
            # References come back from the device: no process reads the audio of another's rows.
            references = {"reference_tokens": batch["text_tokens"], "num_reference_tokens": batch["num_text_tokens"]}
            return {k: v for k, v in heard.items() if v is not None} | references | {"row_mask": batch["row_mask"]}

        compiled = CompiledByShape(
            "the evaluation", lambda specs: lower_evaluation(recognise, abstract, specs, mesh), shapes
        )

        def evaluate(state: TrainState) -> dict[str, Any]:
            levels = 3 if c.quantizer == "fsq" else None
            score = RecognitionScore(self.vocabulary, 0 if c.quantizer == "none" else c.num_codes, levels)
            for size, local in self._data.judged(mesh, self.vocabulary.encode):
                batch = global_batch(mesh, local, size)
                score.add(to_host(compiled.for_batch(batch)(state.params, state.model_state, batch)))
            return score.metrics()

        return evaluate
