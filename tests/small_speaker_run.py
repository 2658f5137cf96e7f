"""A prepared corpus of four made-up voices, and a small speaker encoder for it."""

import pathlib

import numpy as np

from cv2jax.data.corpus_index import write_corpus
from cv2jax.data.shards import Record

RATE = 24_000
SMALL_SPEAKER = (
    "model.head_channels=2",
    "model.init_channels=8",
    "model.growth=4",
    "model.bn_size=2",
    "model.block_layers=(1,2)",
    "model.dilations=(1,2)",
    "model.embedding_dim=8",
    "model.segment_frames=20",
    "model.crop_seconds=0.4",
    "model.margin_start=2",
    "model.margin_end=5",
    "model.noise_share=0.5",
    "data.batch_seconds=8",
    "data.num_buckets=1",
    "optimizer.warmup_steps=2",
    "evaluate_utterances=0",
)


def make_voice(speaker: int, seed: int, seconds: float = 0.6, rate_hz: int = RATE) -> np.ndarray:
    """int16 harmonics of the speaker's pitch under the speaker's slope, in noise."""
    rng = np.random.default_rng([speaker, seed])
    t = np.arange(int(seconds * rate_hz)) / rate_hz
    pitch = (110, 160, 230, 330)[speaker % 4] * rng.uniform(0.97, 1.03)
    slope = (0.6, 0.9)[speaker % 2]
    wave = sum(slope**k * np.sin(2 * np.pi * pitch * k * t + rng.uniform(0, 6)) for k in range(1, 12))
    return (2500 * wave + 150 * rng.normal(size=t.size)).astype(np.int16)


def make_speaker_corpus(
    root: pathlib.Path, num_train: int = 40, num_test: int = 12, *, lone: bool = False
) -> pathlib.Path:
    """`root` as a corpus with the splits train and test; `lone` adds a speaker with one utterance to each, and a silent one."""

    def record(name: str, i: int, speaker: str | None = None, waveform: np.ndarray | None = None) -> Record:
        return Record(
            id=f"{name}-{i}",
            text=None,
            speaker=speaker or f"s{i % 4}",
            language="en",
            rate_hz=RATE,
            waveform=make_voice(i % 4, hash_of(name, i), 0.45 + 0.02 * (i % 8)) if waveform is None else waveform,
        )

    splits = {
        name: [record(name, i) for i in range(count)] for name, count in (("train", num_train), ("test", num_test))
    }
    if lone:
        for name, records in splits.items():
            records.append(record(name, 900, "hermit"))
            records.append(record(name, 901, "s0", np.zeros(12_000, np.int16)))
    write_corpus(root, splits, rate_hz=RATE, encoding="pcm16", shard_utterances=16)
    return root


def hash_of(name: str, number: int) -> int:
    """A seed that differs between the splits."""
    return number + (1000 if name == "test" else 0)
