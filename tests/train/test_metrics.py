"""The record: what a kill cut short is forgiven, anything else that is wrong is named, and nothing is rewritten then."""

import pytest

from cv2jax.config import UserError
from cv2jax.train.metrics import TIME_FIELDS, MetricWriter, read_metrics

GOOD = b'{"step": 1, "kind": "train", "loss": 2.0}\n'


@pytest.mark.parametrize("rest", [b"", b'{"step": 2, "ki', b"\x00\x00", b'{"step": 2, "kind": "\xe4'])
def test_a_last_line_that_a_kill_cut_short_is_left_out(tmp_path, rest):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + rest)
    assert read_metrics(path) == [{"step": 1, "kind": "train", "loss": 2.0}]


@pytest.mark.parametrize(
    "bad", [b"{", b"\xff", b"[]", b"7", b'{"step": 2}', b'{"kind": "train"}', b'{"step": "2", "kind": "a"}']
)
def test_any_other_bad_line_is_named_and_a_resume_rewrites_nothing(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + bad + b"\n" + GOOD)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a metrics line; remove that line"):
        MetricWriter(tmp_path, 1)
    assert path.read_bytes() == GOOD + bad + b"\n" + GOOD
    assert not path.with_suffix(".tmp").exists()


def test_the_times_that_are_written_are_the_ones_that_are_named(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    times = dict.fromkeys(TIME_FIELDS, 2.0)
    del times["seconds"]  # which the writer adds
    writer.write(1, "train", {"loss": 1.0, **times})
    writer.close()
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert set(line) == {"step", "kind", "loss", *TIME_FIELDS}
