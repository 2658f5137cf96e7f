"""Framing, reflection at each row's end, power spectra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.audio.stft import frame, hann_window, power_spectrum, reflect_pad, row_mask, trim_rows


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_reflection_equals_numpy_at_every_length(convert):
    waveform = np.random.default_rng(0).normal(size=(6, 30)).astype(np.float32)
    counts = np.array([30, 17, 8, 3, 2, 1], np.int32)
    rows, counts_out = trim_rows(convert(waveform), convert(counts))
    padded = np.asarray(reflect_pad(rows, counts_out, 7))
    for row, count in enumerate(counts):
        np.testing.assert_array_equal(padded[row, : count + 14], np.pad(waveform[row, :count], 7, mode="reflect"))
        np.testing.assert_array_equal(padded[row, count + 14 :], 0.0)


def test_counts_are_clipped_to_the_row():
    rows, counts = trim_rows(np.ones((3, 5), np.float32), np.array([-2, 3, 9], np.int64))
    assert counts.tolist() == [0, 3, 5]
    np.testing.assert_array_equal(rows.sum(axis=1), [0, 3, 5])
    np.testing.assert_array_equal(row_mask(counts, 5).sum(axis=1), [0, 3, 5])


@pytest.mark.parametrize(("length", "hop"), [(400, 160), (1920, 480), (16, 4), (5, 5), (3, 7)])
def test_frames_equal_strided_windows(length, hop):
    waveform = np.arange(2 * 4000, dtype=np.float32).reshape(2, 4000)
    count = 1 + (4000 - length) // hop
    expected = np.lib.stride_tricks.sliding_window_view(waveform, length, axis=1)[:, ::hop]
    np.testing.assert_array_equal(frame(waveform, length, hop, count), expected)


@pytest.mark.parametrize("length", [400, 512])
def test_matrix_equals_fft(length):
    frames = np.random.default_rng(1).normal(size=(2, 3, 400)) * hann_window(400)
    expected = np.abs(np.fft.rfft(frames, length)) ** 2
    for dft in ("auto", "fft", "matmul"):
        np.testing.assert_allclose(power_spectrum(frames, length, dft), expected, atol=1e-9)
        single = power_spectrum(jnp.asarray(frames, jnp.float32), length, dft)
        np.testing.assert_allclose(single, expected, atol=1e-5 * expected.max())


def test_auto_takes_the_fft_on_a_cpu_and_the_matrix_elsewhere():
    function = jax.jit(lambda frames: power_spectrum(frames, 400))
    traced = function.trace(jax.ShapeDtypeStruct((1, 4, 400), jnp.float32))
    programs = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu", "cuda")}
    uses = {platform: ("dot_general" in text, "stablehlo.fft" in text) for platform, text in programs.items()}
    assert uses == {"cpu": (False, True), "cuda": (True, False), "tpu": (True, False)}
