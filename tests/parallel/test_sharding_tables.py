"""The official stages' parameters lie on a pod as the golden tables say (`python -m tests.parallel.sharding_tables`)."""

import pytest

from tests.parallel.sharding_tables import GOLDENS, STAGES, table


@pytest.mark.parametrize("stage", STAGES)
def test_the_table_is_that_of_before(stage):
    made = table(stage)
    assert made == (GOLDENS / f"{stage}.txt").read_text(encoding="utf-8")
    parts = [int(line.rsplit(" ", 1)[1]) for line in made.splitlines()[1:]]
    assert max(parts) == 32  # the largest kernels are split over both axes
