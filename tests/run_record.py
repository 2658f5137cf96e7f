"""What a run wrote down, without what differs between equal runs; and how a test kills one."""

from cv2jax.train.metrics import TIME_FIELDS, read_metrics


def record(workdir):
    """The lines of a workdir's metrics without times."""
    return [{k: v for k, v in x.items() if k not in TIME_FIELDS} for x in read_metrics(workdir / "metrics.jsonl")]


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
