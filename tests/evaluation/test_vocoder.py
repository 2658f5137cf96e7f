"""Measures of copy synthesis: zero for the same, growing with the damage, defined (or left out) for whatever comes."""

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.evaluation import perceptual
from cv2jax.evaluation.vocoder import VocoderScore, draw_pairs, f0_sums, magnitudes, spectral_distances

RATE_HZ = 24000


def voice(hz: float = 150.0, seconds: float = 0.6) -> np.ndarray:
    time = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    return sum(np.sin(2 * np.pi * k * hz * time) / k for k in range(1, 9)) * 0.1


def test_magnitudes_are_those_of_a_sine() -> None:
    found = magnitudes(0.5 * np.sin(2 * np.pi * 3000 * np.arange(12000) / RATE_HZ), 512, 50, 240)
    assert found.shape == (241, 257)
    assert found[120].argmax() == 64
    # Half of the amplitude times the window's sum.
    assert found[120, 64] == pytest.approx(0.25 * 120, rel=1e-3)
    assert magnitudes(np.zeros(100), 512, 50, 240) == pytest.approx(1e-7**0.5)


def test_equal_waveforms_have_no_distance_and_half_the_amplitude_has_a_known_one() -> None:
    waveform = np.random.default_rng(0).standard_normal(12000)
    assert set(spectral_distances(waveform, waveform).values()) == {0.0}
    found = spectral_distances(waveform, waveform / 2)
    assert found["stft_convergence"] == pytest.approx(0.5)
    assert found["stft_log_magnitude"] == pytest.approx(np.log(2), rel=1e-4)
    assert found["stft_distance"] == pytest.approx(0.5 + np.log(2), rel=1e-4)
    assert found["log_spectral_distance"] == pytest.approx(20 * np.log10(2), rel=1e-3)
    assert found["mel_l1"] == pytest.approx(np.log(2), rel=1e-4)


def test_distances_grow_with_the_noise() -> None:
    noise, clean = np.random.default_rng(0).standard_normal(14400), voice()
    rows = [spectral_distances(clean, clean + level * noise) for level in (1e-4, 1e-3, 1e-2)]
    for name in rows[0]:
        assert rows[0][name] < rows[1][name] < rows[2][name]


def test_f0_is_pooled_over_frames() -> None:
    one = np.array([0, 100, 100, 200, 200, 0], np.float32)
    other = np.array([0, 100, 0, 220, 400, 90], np.float32)
    sums = f0_sums(one, other)
    assert sums["voiced_frames"] == 3
    assert sums["squared_hz"] == 20**2 + 200**2
    assert sums["squared_cents"] == pytest.approx(1200**2 + (1200 * np.log2(1.1)) ** 2)
    assert sums["gross_errors"] == 1
    assert (sums["voicing_errors"], sums["f0_frames"]) == (2, 6)


def test_a_copy_of_another_pitch_is_told() -> None:
    score = VocoderScore(perceptual=False)
    low, high = voice(150), voice(165)
    assert score.add("same", low, low)["f0_rmse_hz"] == 0
    found = score.add("higher", low, high)
    assert found["status"] == "ok"
    assert found["f0_rmse_hz"] == pytest.approx(15, abs=1)
    assert found["f0_rmse_cents"] == pytest.approx(165, abs=10)
    assert found["voicing_error"] < 0.1
    metrics = score.metrics()
    assert metrics["f0_rmse_hz"] == pytest.approx(15 / 2**0.5, abs=1)
    assert metrics["num_utterances"] == 2
    assert metrics["stft_distance"] == pytest.approx(found["stft_distance"] / 2)


def test_what_has_no_pitch_is_counted_and_left_out() -> None:
    score = VocoderScore()
    silent = score.add("silent", np.zeros(9000), np.zeros(8640))
    short = score.add("50ms", voice(seconds=0.05), voice(seconds=0.04))
    tiny = score.add("tiny", voice(seconds=0.01), voice(seconds=0.012))
    one = score.add("one", np.ones(1), np.ones(1))
    for found in (silent, short, tiny, one):
        assert found["status"] == "no_f0"
        assert not {"f0_rmse_hz", "f0_rmse_cents", "pesq", "stoi"} & found.keys()
        assert np.isfinite([value for value in found.values() if isinstance(value, float)]).all()
    assert silent["stft_distance"] == silent["voicing_error"] == 0
    assert "mel_l1" in short
    assert not {"mel_l1", "voicing_error"} & tiny.keys()  # no frame at all
    metrics = score.metrics()
    assert metrics["num_without_f0"] == metrics["num_utterances"] == 4
    assert "f0_rmse_hz" not in metrics
    assert np.isfinite(list(metrics.values())).all()


def test_one_silent_side_is_no_f0_but_a_voicing_error() -> None:
    found = VocoderScore().add("mute", voice(), np.zeros(14400))
    assert found["status"] == "no_f0"
    assert found["voicing_error"] > 0.9
    assert found["stft_convergence"] > 0.99


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_reported_and_in_no_mean(bad: float) -> None:
    score, waveform = VocoderScore(perceptual=False), voice()
    score.add("good", waveform, waveform)
    spoilt = waveform.copy()
    spoilt[500] = bad
    assert score.add("bad", waveform, spoilt) == {"id": "bad", "status": "non_finite"}
    metrics = score.metrics()
    assert (metrics["num_utterances"], metrics["num_non_finite"]) == (1, 1)
    assert metrics["stft_distance"] == 0
    with pytest.raises(UserError, match=r"^x: the original holds NaN or infinite samples"):
        score.add("x", spoilt, waveform)


@pytest.mark.parametrize("lengths", [(2000, 1520), (480, 960), (0, 0), (100, 0)])
def test_lengths_that_do_not_belong_together_are_refused(lengths: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=rf"^x: {lengths[1]} samples were synthesised from {lengths[0]}; less than 480"):
        VocoderScore().add("x", *map(np.ones, lengths))


def test_nothing_judged_is_nothing_told() -> None:
    assert VocoderScore().metrics() == {"num_utterances": 0, "num_non_finite": 0, "num_without_f0": 0}


def test_judges_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert perceptual.available() == ()
    assert perceptual.perceptual_scores(voice(), voice(), RATE_HZ) == {}


def test_judges_that_are_installed_are_heard() -> None:
    pytest.importorskip("pesq")
    pytest.importorskip("pystoi")
    random = np.random.default_rng(0)
    # Syllables: both look for speech that comes and goes.
    speech = np.concatenate([voice(hz, 0.25) * np.hanning(6000) for hz in (110, 150, 190, 130, 170, 120, 160, 140)])
    same = perceptual.perceptual_scores(speech, speech, RATE_HZ)
    worse = perceptual.perceptual_scores(speech, speech + 0.05 * random.standard_normal(len(speech)), RATE_HZ)
    assert same["pesq"] == pytest.approx(4.64, abs=0.01)
    assert same["stoi"] == pytest.approx(1)
    assert worse["pesq"] < 3 < same["pesq"]
    assert worse["stoi"] < same["stoi"]
    for strange in (np.zeros(24000), speech[:1200]):
        assert perceptual.perceptual_scores(strange, strange, RATE_HZ) == {}


def test_pairs_are_drawn_whatever_they_hold() -> None:
    pairs = [
        ("voice", voice(), voice(180)),
        ("short", voice(seconds=0.05), np.zeros(1200)),
        ("nan", voice(), voice() * np.nan),
    ]
    png = draw_pairs(pairs)
    assert png.startswith(b"\x89PNG")
    assert len(png) > 20_000
