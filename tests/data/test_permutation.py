import numpy as np
import pytest

from cv2jax.data.permutation import fold_key, permute


@pytest.mark.parametrize("size", [*range(1, 70), 1000, 4095, 4096, 4097, 65_537])
def test_permute_is_a_bijection(size: int) -> None:
    shuffled = permute(np.arange(size), size, fold_key(3, size))
    np.testing.assert_array_equal(np.sort(shuffled), np.arange(size))


def test_huge_sizes_stay_inside_and_distinct() -> None:
    size = 100_000_000_007
    shuffled = permute(np.arange(size - 20_000, size), size, 5)
    assert shuffled.min() >= 0
    assert shuffled.max() < size
    assert len(np.unique(shuffled)) == 20_000
    # Neighbours are scattered over the whole range, not over a corner of it.
    assert np.histogram(shuffled, bins=10, range=(0, size))[0].min() > 1700


def test_the_order_is_frozen() -> None:
    # Written down once: a change would silently reorder every run that is resumed after an upgrade.
    assert permute(np.arange(10), 10, fold_key(7, 0, 1)).tolist() == [3, 7, 4, 0, 5, 6, 8, 1, 2, 9]
    assert permute(np.array([0, 1, 99_999_999]), 100_000_000, fold_key(1)).tolist() == [
        66_995_519,
        50_959_746,
        53_317_779,
    ]


def test_an_index_maps_alone_as_it_does_among_others() -> None:
    together = permute(np.arange(1000), 1000, 11)
    assert [int(permute(np.array([i]), 1000, 11)[0]) for i in (0, 17, 999)] == together[[0, 17, 999]].tolist()


@pytest.mark.parametrize("size", [3, 5, 8])
def test_every_place_is_equally_likely(size: int) -> None:
    num_keys = 800
    counts = np.zeros((size, size))
    for key in range(num_keys):
        counts[np.arange(size), permute(np.arange(size), size, fold_key(key))] += 1
    expected = num_keys / size
    assert ((counts - expected) ** 2 / expected).sum() / (size * (size - 1)) < 1.8  # 1 on average


def test_keys_depend_on_every_part_and_their_order() -> None:
    keys = {fold_key(1, 2, 3), fold_key(3, 2, 1), fold_key(1, 2), fold_key(1, 2, 4), fold_key(2, 2, 3), fold_key(-1)}
    assert len(keys) == 6
    assert len({tuple(permute(np.arange(50), 50, key)) for key in keys}) == 6


def test_an_index_outside_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\[0, 8\)"):
        permute(np.array([8]), 8, 1)
