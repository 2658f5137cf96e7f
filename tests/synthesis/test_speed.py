"""Speech at another speed: interpolated frames as upstream's, the same for any hops."""

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.synthesis.speed import SpeedChanger, check_speed


def whole(mel, speed):
    """By its definition, all at once."""
    count = max(int(len(mel) / speed), 1)
    places = np.maximum((np.arange(count) + 0.5) * speed - 0.5, 0)
    left = np.floor(places).astype(int)
    weight = (places - left)[:, None]
    return mel[left] * (1 - weight) + mel[np.minimum(left + 1, len(mel) - 1)] * weight


@pytest.mark.parametrize("speed", [0.5, 0.7, 0.93, 1.0, 1.25, 1.6, 2.0])
@pytest.mark.parametrize("num_frames", [1, 2, 7, 50])
def test_any_hops_give_the_whole(speed, num_frames):
    rng = np.random.default_rng(num_frames)
    mel = rng.normal(size=(num_frames, 3)).astype(np.float32)
    want = SpeedChanger(speed).push(mel, last=True)
    np.testing.assert_allclose(want, whole(mel, speed), rtol=0, atol=1e-5)
    for _ in range(10):
        changer, parts, place = SpeedChanger(speed), [], 0
        while place < num_frames:
            size = int(rng.integers(0, 5))
            parts.append(changer.push(mel[place : place + size]))
            place += size
            behind = min(place, num_frames) / speed - sum(map(len, parts))
            assert behind <= 1 + 2 / speed  # two frames late at most
        parts.append(changer.push(mel[:0], last=True))
        np.testing.assert_array_equal(np.concatenate(parts), want)


def test_what_whole_frames_come_of_is_upstreams_interpolation():
    """Frame j of torch's linear interpolation to n of F frames lies at (j + 0.5) · F / n - 0.5."""
    mel = np.linspace(0, 1, 520, dtype=np.float32)[:, None]
    places = np.clip((np.arange(416) + 0.5) * (520 / 416) - 0.5, 0, 519)
    got = SpeedChanger(1.25).push(mel, last=True)
    np.testing.assert_allclose(got[:, 0], places / 519, rtol=0, atol=1e-6)


def test_no_frames_stay_none():
    changer = SpeedChanger(1.5)
    assert changer.push(np.zeros((0, 4), np.float32)).shape == (0, 4)
    assert changer.push(np.zeros((0, 4), np.float32), last=True).shape == (0, 4)


@pytest.mark.parametrize("speed", [0.49, 2.1, 0.0, float("nan")])
def test_other_speeds_are_refused(speed):
    with pytest.raises(UserError, match=f"speed={speed}: give a number from 0.5"):
        check_speed(speed)
