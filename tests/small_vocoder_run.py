"""The small corpus at 24 kHz with its F0, and a small vocoder with small discriminators for it."""

import pathlib

from cv2jax.jobs.f0 import compute_f0
from tests.small_corpus import make_small_corpus

SMALL_GENERATOR = {
    "width": 16,
    "f0_width": 8,
    "block_kernels": (3,),
    "source_kernels": (3, 3, 3),
    "dilations": (1,),
}
SMALL_VOCODER = (
    *(f"model.generator.{name}={value}" for name, value in SMALL_GENERATOR.items()),
    "model.discriminators.periods=(2,)",
    "model.discriminators.period_channels=(4,4)",
    "model.discriminators.fft_sizes=(128,)",
    "model.discriminators.hop_lengths=(48,)",
    "model.discriminators.window_lengths=(128,)",
    "model.discriminators.spectral_channels=4",
    "model.window_frames=8",
    "model.windows_per_utterance=2",
    "model.target_f0_share=0.5",
    "data.batch_seconds=8",
    "data.min_seconds=0.1",
    "optimizer.warmup_steps=2",
    "evaluate_utterances=4",
)


def make_small_vocoder_corpus(root: pathlib.Path) -> pathlib.Path:
    """`root` as a prepared corpus with F0."""
    make_small_corpus(root, rate_hz=24000)
    compute_f0(root, method="dio", workers=1)
    return root
