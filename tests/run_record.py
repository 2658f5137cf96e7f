"""What a run wrote down, without what differs between equal runs; and how a test kills one."""

import jax

from cv2jax.parallel.distributed import global_batch
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state
from cv2jax.tasks import make_task
from cv2jax.train.metrics import TIME_FIELDS, read_metrics
from cv2jax.train.state import make_state
from cv2jax.train.step import compile_steps


def record(workdir):
    """The lines of a workdir's metrics without times."""
    return [{k: v for k, v in x.items() if k not in TIME_FIELDS} for x in read_metrics(workdir / "metrics.jsonl")]


def first_steps(config, mesh_config, num_devices, num_steps=2):
    """(metrics of each of a task's first steps on the first devices, the state after them)."""
    mesh, task = make_mesh(mesh_config, jax.devices()[:num_devices]), make_task(config)
    abstract, shardings = abstract_state(task.init_state, mesh)
    state = make_state(task.init_state, shardings, jax.random.key(0))
    steps = compile_steps(task.make_step(), abstract, shardings, task.batch_specs(), mesh)
    got = []
    for _, size, local in task.batches(0, num_steps, mesh):
        batch = global_batch(mesh, local, size)
        state, metrics = steps.for_batch(batch)(state, batch, jax.random.key(1))
        got.append(jax.device_get(metrics))
    return got, state


def losses(config, mesh_config, num_devices):
    """(loss, batch hash) of each of a task's first steps."""
    return [(float(m["loss"]), int(m["batch_hash"])) for m in first_steps(config, mesh_config, num_devices)[0]]


class Killed(BaseException):
    """Stands for a kill: nothing between it and the test catches it."""


def stopping_at(task, at, on_step=None):
    """The task whose run is killed before a step, or calls a function before each."""
    batches = task.batches

    def until(*arguments):
        for step, size, local in batches(*arguments):
            if step == at:
                raise Killed
            if on_step:
                on_step(step)
            yield step, size, local

    task.batches = until
    return task
