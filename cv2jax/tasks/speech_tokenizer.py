"""The speech tokenizer stage: prepared speech → log-mel on the device → FSQ inside a recogniser → held-out error rates."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from cv2jax.audio.mel import WHISPER_RATE_HZ
from cv2jax.audio.pitch import pitch_track
from cv2jax.config import TrainConfig, UserError
from cv2jax.data.batch import batch_spec
from cv2jax.data.loader import make_evaluation_batches, make_loader
from cv2jax.data.plan import Plan, make_plan
from cv2jax.data.shards import Corpus
from cv2jax.data.subset import SplitSubset, spread_rows
from cv2jax.evaluation.recognition import RecognitionScore
from cv2jax.models.speech_tokenizer.augment import spec_augment
from cv2jax.models.speech_tokenizer.config import SpeechTokenizerConfig
from cv2jax.models.speech_tokenizer.decode import transcribe
from cv2jax.models.speech_tokenizer.features import speech_features
from cv2jax.models.speech_tokenizer.loss import tokenizer_loss
from cv2jax.models.speech_tokenizer.model import SpeechTokenizer, SpeechTokenizerOutput, init_model_state, init_params
from cv2jax.parallel.distributed import global_batch, local_rows, to_host
from cv2jax.text.characters import CharacterVocabulary
from cv2jax.train.optimizer import make_optimizer
from cv2jax.train.state import TrainState, init_train_state
from cv2jax.train.step import CompiledByShape, StepFunction, lower_evaluation, make_train_step

MODEL_CONFIG = SpeechTokenizerConfig
TOKEN_SAMPLES = 640  # at 16 kHz: one speech token is 40 ms


def make_task(config: TrainConfig) -> "SpeechTokenizerTask":
    """The task on the corpus that `config.data` names."""
    if not config.data.corpus:
        raise UserError("data.corpus is not set: give --corpus DIR, a directory written by `cv2jax prepare`")
    return SpeechTokenizerTask(config, Corpus(config.data.corpus))


class SpeechTokenizerTask:
    """Trains and evaluates a `SpeechTokenizer`; the vocabulary and the longest transcript come from the corpus."""

    def __init__(self, config: TrainConfig, corpus: Corpus) -> None:
        data = config.data
        self._config, self._corpus = config, corpus
        self._train, self._eval = corpus.split(data.train_split), corpus.split(data.eval_split)
        self.vocabulary = CharacterVocabulary.from_counts(self._train.characters)
        unknown = set(self._eval.characters) - set(self.vocabulary.characters)
        if unknown:
            logging.warning("characters of split %s that training never shows: %s", self._eval.name, sorted(unknown))
        self._plan = self._make_plan(self._train, data.num_buckets)
        self._eval_split = SplitSubset(self._eval, spread_rows(len(self._eval), config.evaluate_utterances))
        self._eval_plan = self._make_plan(self._eval_split, min(data.num_buckets, 2))
        # Of whole splits and not of what is evaluated: the model's shape must not hang on how often we look at it.
        longest = max(int(np.max(split.num_characters)) for split in (self._train, self._eval))
        dtype = config.compute_dtype
        if dtype == "auto":
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        self.model_config: SpeechTokenizerConfig = dataclasses.replace(
            config.model,
            vocabulary_size=self.vocabulary.size,
            max_text_tokens=max(config.model.max_text_tokens, longest + 8),  # buckets round up to 8
            dtype=dtype,
        )
        self.model_config.validate()
        self._optimizer = make_optimizer(config.optimizer, config.num_steps)
        logging.info("training batches of %s\n%s", config.data.corpus, self._plan.table())

    def _make_plan(self, split: Any, num_buckets: int) -> Plan:
        data = self._config.data
        return make_plan(
            split.num_samples,
            split.num_characters,
            rate_hz=self._corpus.rate_hz,
            seed=self._config.seed,
            batch_seconds=data.batch_seconds,
            batch_multiple=data.batch_multiple,
            num_buckets=num_buckets,
            min_seconds=data.min_seconds,
            max_seconds=data.max_seconds,
            require_text=True,
            name=split.name,
        )

    def facts(self) -> dict[str, Any]:
        """What decides the numbers besides the config; also all that `cv2jax encode` needs beside the checkpoint."""
        return {
            "corpus_hash": self._corpus.hash,
            "plan_hash": self._plan.hash,
            "vocabulary": list(self.vocabulary.characters),
            "model": dataclasses.asdict(self.model_config),
        }

    def init_state(self, key: jax.Array) -> TrainState:
        """The state at step 0, boxed with logical axes."""
        params_key, state_key = jax.random.split(key)
        params = init_params(self.model_config, params_key)
        return init_train_state(params, init_model_state(self.model_config, state_key), self._optimizer)

    def make_step(self) -> StepFunction:
        """Augment, teacher-force, cross-entropy and what else the config weighs."""
        model, c, rate_hz = SpeechTokenizer(self.model_config), self.model_config, self._corpus.rate_hz

        def loss(params: Any, model_state: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Any]:
            augment_key, dropout_key = jax.random.split(key)
            waveform, num_samples, mel, num_frames = speech_features(batch["waveform"], batch["num_samples"], rate_hz)
            if c.pitch_weight > 0:
                f0, f0_mask = pitch_track(waveform, num_samples, WHISPER_RATE_HZ, TOKEN_SAMPLES)
                batch = batch | {"f0": jnp.asarray(f0), "f0_mask": jnp.asarray(f0_mask)}
            mel = spec_augment(
                mel,
                num_frames,
                augment_key,
                num_freq_masks=c.num_freq_masks,
                max_freq_bins=c.max_freq_bins,
                num_time_masks=c.num_time_masks,
                max_time_share=c.max_time_share,
            )
            applied = model.apply(
                {"params": params},
                mel,
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

    def batch_specs(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """One a bucket of the plan."""
        return _specs(self._plan)

    def batch_sizes(self) -> set[int]:
        """Of training and evaluation."""
        return {bucket.batch_size for plan in (self._plan, self._eval_plan) for bucket in plan.buckets}

    def batches(self, start_step: int, num_steps: int, mesh: Mesh) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
        """This process's rows of each step's batch."""
        data = self._config.data
        loader = make_loader(
            self._train,
            self._plan,
            self.vocabulary.encode,
            start_step=start_step,
            num_steps=num_steps - start_step,
            rows=self._rows(mesh),
            num_workers=data.num_workers,
            num_threads=data.num_threads,
            prefetch=data.prefetch,
        )
        with loader:
            for step, batch in loader:
                yield step, self._plan.buckets[self._plan.batch(step)[1]].batch_size, batch

    def _rows(self, mesh: Mesh) -> Callable[[int], np.ndarray]:
        """Which rows of a batch are ours: a table and not a function of the mesh, as loader processes touch no device."""
        return {size: local_rows(mesh, size) for size in self.batch_sizes()}.__getitem__

    def utterance_ids(self, step: int) -> list[str]:
        """Manifest ids of a step's rows."""
        return [self._train.read(int(row)).id for row in self._plan.batch(step)[2]]

    def make_evaluate(self, mesh: Mesh, abstract: TrainState) -> Callable[[TrainState], dict[str, Any]]:
        """Greedy transcription of the held-out utterances and use of the codebook."""
        c, rate_hz = self.model_config, self._corpus.rate_hz

        def recognise(params: Any, model_state: Any, batch: dict[str, jax.Array]) -> dict[str, Any]:
            _, _, mel, num_frames = speech_features(batch["waveform"], batch["num_samples"], rate_hz)
            longest = min(
                2 * batch["text_tokens"].shape[1], c.max_text_tokens
            )  # a runaway decoder is an error, and ends
            heard = vars(transcribe(c, params, mel, num_frames, longest, model_state))
            # References come back from the device: no process reads the audio of another's rows.
            references = {"reference_tokens": batch["text_tokens"], "num_reference_tokens": batch["num_text_tokens"]}
            return {k: v for k, v in heard.items() if v is not None} | references | {"row_mask": batch["row_mask"]}

        compiled = CompiledByShape(
            "the evaluation", lambda specs: lower_evaluation(recognise, abstract, specs, mesh), _specs(self._eval_plan)
        )

        def evaluate(state: TrainState) -> dict[str, Any]:
            levels = 3 if c.quantizer == "fsq" else None
            score = RecognitionScore(self.vocabulary, 0 if c.quantizer == "none" else c.num_codes, levels)
            loader = make_evaluation_batches(
                self._eval_split, self._eval_plan, self.vocabulary.encode, rows=self._rows(mesh)
            )
            with loader:
                for index, local in loader:
                    size = self._eval_plan.buckets[self._eval_plan.evaluation_batch(index)[0]].batch_size
                    batch = global_batch(mesh, local, size)
                    score.add(to_host(compiled.for_batch(batch)(state.params, state.model_state, batch)))
            return score.metrics()

        return evaluate


def _specs(plan: Plan) -> list[dict[str, jax.ShapeDtypeStruct]]:
    return [
        {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in batch_spec(bucket).items()}
        for bucket in plan.buckets
    ]
