"""What a run wrote down, without what differs between equal runs."""

from cv2jax.train.metrics import TIME_FIELDS, read_metrics


def record(workdir):
    """The lines of a workdir's metrics without times."""
    return [{k: v for k, v in x.items() if k not in TIME_FIELDS} for x in read_metrics(workdir / "metrics.jsonl")]
