"""The smallest task: a linear layer on numbers made from the step, two batch shapes, and a poisoned step on demand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cv2jax.config import OptimizerConfig, TrainConfig
from cv2jax.data.content import BatchContent
from cv2jax.parallel.distributed import local_rows
from cv2jax.train.optimizer import make_optimizer
from cv2jax.train.state import init_train_state
from cv2jax.train.step import make_train_step

WIDTH = 8
SHAPES = (4, 6)  # numbers a row


class ToyTask:
    """Learns y = sum(x); noise from the step key makes a wrong key visible. `poison` is the step index of a NaN row."""

    def __init__(self, config: TrainConfig, *, poison: int = -1, corpus: str = "one", on_step=None) -> None:
        self.config, self.poison, self.corpus, self.on_step = config, poison, corpus, on_step

    def facts(self):
        return {"corpus": self.corpus}

    def init_state(self, key):
        make = nn.with_logical_partitioning(nn.initializers.normal(0.5), ("embed", "mlp"))
        params = {"layer": {"kernel": make(key, (WIDTH, 4))}}
        return init_train_state(params, {"mean": jnp.zeros(())}, self._optimizer())

    def _optimizer(self):
        return make_optimizer(self.config.optimizer, self.config.num_steps)

    def warm_start(self, state):
        return state

    def keep(self, workdir):
        pass

    def make_step(self):
        def loss(params, model_state, batch, key):
            x = jnp.pad(batch["x"], ((0, 0), (0, WIDTH - batch["x"].shape[1])))
            noise = 0.01 * jax.random.normal(key, x.shape)
            rows = ((x + noise) @ params["layer"]["kernel"]).sum(-1) - x.sum(-1)
            mean = 0.9 * model_state["mean"] + 0.1 * x.mean()
            return (rows**2).mean(), ({"row_finite": jnp.isfinite(rows)}, {"mean": mean})

        return make_train_step(loss, self._optimizer())

    def batch_specs(self):
        return [{"x": jax.ShapeDtypeStruct((8, n), np.float32)} for n in SHAPES]

    def batches(self, start_step, num_steps, mesh):
        for step in range(start_step, num_steps):
            if self.on_step:
                self.on_step(step)
            random = np.random.default_rng(step)
            x = random.normal(size=(8, SHAPES[random.integers(len(SHAPES))])).astype(np.float32)
            if step == self.poison:
                x[3] = np.nan
            yield step, 8, {"x": x[local_rows(mesh, 8)]}

    def content(self, step, local):
        size = local["x"].size
        share = {"used": 0.75 * size, "slots": float(size), "unit": "tokens"}
        return BatchContent(epoch=step // 10, bucket=local["x"].shape[1] // 6, num_utterances=8, **share)

    def planned_padding(self):
        return 0.25

    def utterance_ids(self, step):
        return [f"utterance-{step}-{row}" for row in range(8)]

    def batch_sizes(self):
        return {8}

    def make_evaluate(self, mesh, abstract):
        def evaluate(state):
            return {"norm": float(jnp.linalg.norm(state.params["layer"]["kernel"]))}

        return evaluate


def toy_config(**changes) -> TrainConfig:
    """A run of 20 steps that logs, evaluates and saves at different paces."""
    defaults = {
        "name": "toy",
        "task": "toy",
        "model": OptimizerConfig(),
        "num_steps": 20,
        "log_every": 3,
        "evaluate_every": 5,
        "save_every": 4,
        "optimizer": OptimizerConfig(learning_rate=0.1, warmup_steps=2),
    }
    return TrainConfig(**{**defaults, **changes})
