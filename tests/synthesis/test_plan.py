"""Plans of hops: sizes of the default plan, and a player that never waits, for any prompt and any speed up to the plan's."""

import itertools

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.synthesis.plan import HopPlan, Pace
from cv2jax.synthesis.stages import LOOKAHEAD

HOLD_BACK = 9480 / 960  # tokens, of the official vocoder


def hops(plan, num_prompt=0, chunk=25, num=8, **settings):
    pace, place, sizes = Pace(plan, **({"chunk": chunk, "hold_back": HOLD_BACK} | settings)), num_prompt, []
    for _ in range(num):
        sizes.append(pace.next_hop(chunk - place % chunk))
        pace.add(sizes[-1])
        place += sizes[-1]
    return sizes


@pytest.mark.parametrize(
    ("factor", "num_prompt", "sizes"),
    [
        (0.5, 0, [25, 25, 50, 100, 100]),
        (0.05, 0, [25, 50, 100, 100, 100]),
        (0.5, 87, [38, 50, 100, 100, 100]),  # a hop of 13 tokens would last 0.1 s behind what is held back
        (0.05, 87, [13, 50, 100, 100, 100]),
        (0.05, 90, [35, 50, 100, 100, 100]),  # 10 tokens are heard for 5 ms, and the next hop takes 56
        (0.05, 91, [34, 50, 100, 100, 100]),  # 9 tokens are all held back
        (3.0, 0, [25, 50, 100, 100, 100]),  # nothing helps: as early as can be, then as cheap
        (3.0, 91, [34, 50, 100, 100, 100]),
    ],
)
def test_sizes_follow_from_the_speed_and_the_prompt(factor, num_prompt, sizes):
    assert hops(HopPlan(real_time_factor=factor), num_prompt)[:5] == sizes


@pytest.mark.parametrize("factor", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("speed", [1.0, 1.7])
def test_a_player_never_waits_at_the_plans_speed(factor, speed):
    if factor * speed >= 1:
        speed = 1.0
    for num_prompt, chunk in itertools.product(range(0, 50, 3), (1, 5, 25)):
        sizes = hops(HopPlan(real_time_factor=factor), num_prompt, chunk, num=30, speed=speed)
        assert all((num_prompt + end) % chunk == 0 for end in np.cumsum(sizes))
        made = np.cumsum(sizes) / speed
        heard = np.maximum(made - HOLD_BACK, 0)
        first = int(np.argmax(heard > 0))
        # Tokens of work until a hop is there, in tokens of time, from the first sound on.
        work = np.cumsum(np.where(np.arange(30) > first, factor * np.array(sizes), 0))
        waits = work[first + 1 :] - heard[first:-1]
        assert waits.max() <= 1e-9, (num_prompt, chunk, sizes)
        assert sizes[first] <= HOLD_BACK * speed + 2 * chunk + factor * (chunk + LOOKAHEAD) * speed


def test_growth_and_longest_hop_are_bounds():
    assert hops(HopPlan(real_time_factor=0.01, growth=3, max_chunks=6))[:4] == [25, 75, 150, 150]
    assert set(hops(HopPlan(real_time_factor=0.01, growth=1))) == {25}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"real_time_factor": 0.0}, "plan.real_time_factor=0.0: must be positive"),
        ({"real_time_factor": float("nan")}, "plan.real_time_factor=nan"),
        ({"growth": 0}, "plan.growth=0: must be 1 or more"),
        ({"max_chunks": -1}, "plan.max_chunks=-1"),
    ],
)
def test_what_is_no_plan(settings, message):
    with pytest.raises(UserError, match=message):
        HopPlan(**settings).validate()
