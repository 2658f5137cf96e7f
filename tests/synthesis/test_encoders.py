from types import SimpleNamespace

import numpy as np
import pytest

from cv2jax.audio.io import AudioClip
from cv2jax.config import UserError
from cv2jax.nn.chunks import NO_CHUNK, ChunkMask
from cv2jax.synthesis import encoders
from cv2jax.synthesis.bundle import PromptMel
from cv2jax.synthesis.stages import SpeakerStage, TokenizerStage


def make_bundle(**changes):
    """Encoders that count: a token a 640 samples at 16 kHz, a frame a 480 at 24 kHz, the mean as embedding."""
    parts = {
        "tokenizer": TokenizerStage(tokenize=lambda wave: np.arange(len(wave) // 640, dtype=np.int32), hash="tok"),
        "speaker": SpeakerStage(embed=lambda wave: np.array([wave.mean(), len(wave)], np.float32), hash="spk"),
        "prompt_mel": PromptMel(make=lambda wave: np.zeros((len(wave) // 480 - 3, 5), np.float32), rate_hz=24_000),
    } | changes
    prompt_mel, chunk = parts.pop("prompt_mel"), parts.pop("chunk", 25)
    facts = SimpleNamespace(manifest={"stand_ins": True}, mask=ChunkMask(chunk=chunk))
    return SimpleNamespace(stages=SimpleNamespace(**parts), prompt_mel=prompt_mel, facts=facts)


def make_clip(waveform, rate_hz):
    return AudioClip(
        name="clip", waveform=waveform.astype(np.float32), rate_hz=rate_hz, num_channels=1, peak=0.5, clipped_share=0.0
    )


def load(monkeypatch, bundle):
    monkeypatch.setattr(encoders, "load_bundle", lambda path: bundle)
    return encoders.load_bundle_encoders("mine")


@pytest.mark.parametrize(("num_tokens", "num_frames", "wanted"), [(4, 9, 4), (5, 9, 4), (3, 0, 0), (0, 4, 0)])
def test_tokens_and_mel_are_cut_to_the_shorter_one(num_tokens, num_frames, wanted):
    tokens, mel = np.arange(num_tokens, dtype=np.int32), np.arange(2 * num_frames, dtype=np.float32).reshape(-1, 2)
    found_tokens, found_mel = encoders.fit_prompt(tokens, mel)
    np.testing.assert_array_equal(found_tokens, tokens[:wanted])
    np.testing.assert_array_equal(found_mel, mel[: 2 * wanted])


def test_each_encoder_of_a_bundle_hears_at_its_own_rate(monkeypatch):
    found = load(monkeypatch, make_bundle())
    clip = make_clip(np.full(48_000, 0.25), 48_000)
    tokens, mel = found.encode(clip)
    assert (len(tokens), mel.shape) == (23, (46, 5))  # 25 tokens, 47 frames
    assert found.embed is not None
    vectors = found.embed([clip, make_clip(np.zeros(8_000), 16_000)])
    np.testing.assert_allclose(vectors, [[0.25, 16_000], [0, 8_000]], rtol=1e-3, atol=1e-6)
    assert (found.speech_tokenizer, found.speaker_encoder) == ("tok", "spk")
    assert (found.chunk, found.stand_ins) == (25, True)
    assert load(monkeypatch, make_bundle(chunk=NO_CHUNK)).chunk is None  # the flow never streams


def test_a_bundle_without_encoders_says_so(monkeypatch):
    assert load(monkeypatch, make_bundle(speaker=None)).embed is None
    for bundle in (make_bundle(tokenizer=None), make_bundle(prompt_mel=None)):
        with pytest.raises(
            UserError, match="mine: the bundle has no speech tokenizer; enroll with the model directory"
        ):
            load(monkeypatch, bundle)
