"""The held-out score of a vocoder: means by hand, over batches, without padding and without what is not finite."""

import numpy as np
import pytest

from cv2jax.evaluation.copies import NUM_PICTURES, CopyScore
from cv2jax.evaluation.vocoder import spectral_distances

HOP = 480


def batch(num_frames=(4, 3), seed: int = 0, width: int = 6):
    rng = np.random.default_rng(seed)
    rows = len(num_frames)
    truth = rng.normal(0, 0.1, (rows, width * HOP)).astype(np.float32)
    return {
        "truth": truth,
        "copy": truth + rng.normal(0, 0.05, truth.shape).astype(np.float32),
        "f0": rng.choice([0.0, 100.0, 150.0], (rows, width)).astype(np.float32),
        "target_f0": rng.choice([0.0, 110.0, 140.0], (rows, width)).astype(np.float32),
        "num_frames": np.array(num_frames, np.int32),
    }


def by_hand(*batches) -> dict[str, float]:
    rows = [
        {name: b[name][i, : count * (HOP if name in ("truth", "copy") else 1)] for name in b if name != "num_frames"}
        for b in batches
        for i, count in enumerate(b["num_frames"])
        if count and np.isfinite(b["copy"][i, : count * HOP]).all()
    ]
    spectra = [spectral_distances(*(row[name].astype(np.float64) for name in ("truth", "copy"))) for row in rows]
    f0, target = (np.concatenate([row[name] for row in rows]) for name in ("f0", "target_f0"))
    both = (f0 > 10) & (target > 10)
    return {
        **{name: np.mean([found[name] for found in spectra]) for name in spectra[0]},
        "voicing_error": ((f0 > 10) != (target > 10)).mean(),
        "f0_rmse_hz": np.sqrt(np.square(f0 - target)[both].mean()),
    }


def scored(*batches):
    score = CopyScore(10.0)
    for one in batches:
        score.add(one)
    return score.metrics()


def test_means_are_over_all_batches():
    batches = batch((4, 3)), batch((6, 1), seed=1)
    found = scored(*batches)
    for name, want in by_hand(*batches).items():
        assert found[name] == pytest.approx(want, rel=1e-5), name
    assert found["num_non_finite"] == 0
    assert found["f0_rmse_hz"] > 5


def test_padding_and_rows_of_nothing_count_nothing():
    plain, padded = batch((4, 3)), batch((4, 3))
    for name in ("truth", "copy", "f0", "target_f0"):
        padded[name][0, 4 * (HOP if name in ("truth", "copy") else 1) :] = np.nan
        padded[name] = np.concatenate([padded[name], np.full_like(padded[name][:1], np.nan)])
    padded["num_frames"] = np.append(padded["num_frames"], np.int32(0))
    assert scored(padded) == scored(plain)


def test_a_copy_that_is_not_finite_is_counted_and_in_no_mean():
    broken = batch((4, 3))
    broken["copy"][0, 2 * HOP + 1] = np.inf
    broken["f0"][1, 0], broken["target_f0"][1, 0] = 100, 140  # one frame at least is voiced in both
    found = scored(broken)
    assert found["num_non_finite"] == 1
    for name, want in by_hand(broken).items():
        assert found[name] == pytest.approx(want, rel=1e-5), name
    assert len(found["spectrograms"]) == 1
    broken["copy"][1, 0] = np.nan
    none = scored(broken)
    assert none == {"num_non_finite": 2, "spectrograms": []}


def test_without_voice_there_is_no_error_in_hertz():
    silent = batch()
    silent["f0"][:] = 9.9
    found = scored(silent)
    assert "f0_rmse_hz" not in found
    assert "f0_squared" not in found
    assert found["voicing_error"] == pytest.approx(by_hand_voiced(silent))


def by_hand_voiced(one) -> float:
    target = np.concatenate([row[:n] for row, n in zip(one["target_f0"], one["num_frames"], strict=True)])
    return float((target > 10).mean())


def test_a_perfect_copy_scores_nothing():
    one = batch()
    one |= {"copy": one["truth"], "f0": one["target_f0"]}
    found = scored(one)
    assert [found[n] for n in ("mel_l1", "log_spectral_distance", "voicing_error", "f0_rmse_hz")] == [0, 0, 0, 0]


def test_a_few_pictures_are_kept():
    found = scored(batch((4, 3)), batch((6, 1), seed=1))
    assert len(found["spectrograms"]) == NUM_PICTURES
    assert [picture["shape"] for picture in found["spectrograms"]] == [[4, 80], [3, 80]]
    assert {"truth", "copy"} <= set(found["spectrograms"][0])


def test_nothing_scored_is_no_error():
    assert scored() == {"num_non_finite": 0, "spectrograms": []}
