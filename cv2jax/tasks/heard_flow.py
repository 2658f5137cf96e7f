"""What a flow in training says for held-out speech tokens: its loss by time and by mask, and the mel under trained masks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cv2jax.data.corpus_batches import CorpusBatches
from cv2jax.evaluation.flow import FlowScore, TokenMeans
from cv2jax.models.flow_matching.config import FRAMES_PER_TOKEN, FlowMatchingConfig
from cv2jax.models.flow_matching.draws import draw
from cv2jax.models.flow_matching.generate import generate, offline_mask
from cv2jax.models.flow_matching.model import FlowMatching, flow_loss
from cv2jax.nn.chunks import stream_mask
from cv2jax.nn.masks import ChunkMask, length_mask
from cv2jax.parallel.distributed import global_batch, to_host
from cv2jax.parallel.sharding import replicated
from cv2jax.train.state import TrainState, evaluation_params
from cv2jax.train.step import CompiledByShape, lower_evaluation

BASELINE_BATCHES = 256  # of training, whose mean mel a token evaluations compare with


class HeardFlow:
    """The held-out utterances of a corpus, with the same draws and noise at every evaluation.

    Args:
      prepare: makes of a batch of the corpus what the model reads. seed: of draws and noise.
    """

    def __init__(
        self,
        config: FlowMatchingConfig,
        data: CorpusBatches,
        prepare: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
        seed: int,
    ) -> None:
        self._config, self._data, self._prepare, self._seed = config, data, prepare, seed

    def make_evaluate(self, mesh: Mesh, abstract: TrainState) -> Callable[[TrainState], dict[str, Any]]:
        """The loss of the held-out utterances by time and by mask, and the mel that is generated for their tokens."""
        c = self._config
        model = FlowMatching(c)

        def judge(params: Any, model_state: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            ready = self._prepare(batch)
            # The same draws at every evaluation; a batch is known by its first row.
            key = jax.random.fold_in(jax.random.key(self._seed), batch["utterance"][0])
            draws = draw(c, key, ready["num_tokens"], ready["speech_tokens"].shape[1])
            _, error = flow_loss(model, params, ready, draws)
            keys = self._keys(batch)
            return {
                **{name: ready[name] for name in ("speech_tokens", "num_tokens")},
                **{"error": error, "time": draws.time, "mask_index": draws.mask_index, "truth": ready["mel"]},
                "offline": generate(model, params, ready, keys, offline_mask(c)),
                "streamed": generate(model, params, ready, keys, stream_mask(c.masks)),
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
        model, totals, count = FlowMatching(self._config), np.zeros(len(masks)), 0

        @functools.partial(jax.jit, out_shardings=replicated(mesh))
        def errors(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            ready = self._prepare(batch)
            valid = length_mask(FRAMES_PER_TOKEN * ready["num_tokens"], ready["mel"].shape[1])[..., None]
            made = [generate(model, params, ready, self._keys(batch), mask) for mask in masks]
            sums = [jnp.sum(jnp.where(valid, jnp.abs(mel - ready["mel"]), 0)) for mel in made]
            return jnp.stack(sums), jnp.sum(valid) * ready["mel"].shape[2]

        for size, local in self._data.judged(mesh):
            sums, num = to_host(errors(params, global_batch(mesh, local, size)))
            totals, count = totals + sums, count + int(num)
        return (totals / max(count, 1)).tolist()

    def _keys(self, batch: dict[str, jax.Array]) -> jax.Array:
        """Of each held-out utterance, always the same."""
        return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(self._seed), row))(batch["utterance"])

    def _token_means(self, mesh: Mesh) -> TokenMeans:
        """Of the first batches of training, each shown once."""
        c, plan = self._config, self._data.plan
        means = TokenMeans(c.num_speech_tokens, c.num_mels)
        ready = jax.jit(self._prepare, out_shardings=replicated(mesh))
        for _, size, local in self._data.training(0, min(plan.num_batches, BASELINE_BATCHES), mesh):
            shown = to_host(ready(global_batch(mesh, local, size)))
            means.add(shown["speech_tokens"], shown["num_tokens"], shown["mel"])
        return means
