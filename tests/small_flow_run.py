"""The small corpus with random speech tokens, and a small flow for it."""

import pathlib

import numpy as np

from cv2jax.data.shards import Corpus
from cv2jax.data.tokens import TokenWriter
from tests.small_corpus import RATE, make_small_corpus

NUM_CODES = 27
SMALL_FLOW = (
    f"model.num_speech_tokens={NUM_CODES}",
    "model.speaker_dim=8",
    "model.encoder.width=16",
    "model.encoder.num_heads=2",
    "model.encoder.mlp_dim=16",
    "model.encoder.num_layers=1",
    "model.encoder.num_upsampled_layers=1",
    "model.encoder.dropout=0.1",
    "model.estimator.width=16",
    "model.estimator.num_blocks=1",
    "model.estimator.num_mid_stages=1",
    "model.estimator.num_heads=2",
    "model.estimator.head_dim=8",
    "model.num_steps=2",
    "data.batch_seconds=8",
    "optimizer.warmup_steps=2",
    "evaluate_utterances=4",
)


def make_small_flow_corpus(root: pathlib.Path, rate_hz: int = RATE) -> pathlib.Path:
    """`root` as a prepared corpus, with `tokens_of(root)` beside it."""
    corpus = Corpus(make_small_corpus(root, rate_hz=rate_hz))
    rng = np.random.default_rng(0)
    with TokenWriter(tokens_of(root), {"tokenizer": "abc", "num_codes": NUM_CODES}) as writer:
        for split in (corpus.split("train"), corpus.split("test")):
            for row in range(len(split)):
                found = split.read(row)
                count = -(-len(found.waveform) // (rate_hz // 25))
                tokens = rng.integers(0, NUM_CODES, count).astype(np.int32)
                writer.write(found.id, "a.wav", tokens, num_frames=count, seconds=count / 25)
    return root


def tokens_of(corpus: pathlib.Path) -> pathlib.Path:
    """Where the speech tokens of a small corpus lie."""
    return corpus.with_name(f"{corpus.name}.tokens.jsonl")
