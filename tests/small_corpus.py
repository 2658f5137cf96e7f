"""A prepared corpus of tones in a second, and a small model for it: enough for shapes, order and resume."""

import pathlib

import numpy as np

from cv2jax.data.corpus_index import write_corpus
from cv2jax.data.shards import Record

RATE = 16000
# Everything that draws is on: a wrong key or a draw that depends on the mesh must show.
SMALL_RUN = (
    "model.width=16",
    "model.num_heads=2",
    "model.num_layers=1",
    "model.encoder2_layers=1",
    "model.decoder_layers=1",
    "model.dropout=0.1",
    "model.num_freq_masks=2",
    "model.num_time_masks=2",
    "data.batch_seconds=8",
    "data.num_buckets=2",
    "optimizer.warmup_steps=2",
)


def make_small_corpus(
    root: pathlib.Path, num_train: int = 40, num_test: int = 8, *, rate_hz: int = RATE
) -> pathlib.Path:
    """`root` as a corpus with the splits train and test."""
    random = np.random.default_rng(0)
    words = ["one", "two", "three", "four"]

    def record(name: str, i: int) -> Record:
        seconds = 0.3 + 0.7 * random.random()
        t = np.arange(int(seconds * rate_hz)) / rate_hz
        wave = 3000 * np.sin(2 * np.pi * (150 + 40 * (i % 4)) * t) + 300 * random.normal(size=t.size)
        return Record(
            id=f"{name}-{i}",
            text=words[i % 4],
            speaker="s",
            language="en",
            instruct=None,
            rate_hz=rate_hz,
            waveform=wave.astype(np.int16),
        )

    splits = {
        "train": [record("train", i) for i in range(num_train)],
        "test": [record("test", i) for i in range(num_test)],
    }
    write_corpus(root, splits, rate_hz=rate_hz, encoding="pcm16", shard_utterances=16)
    return root
