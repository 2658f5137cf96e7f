"""A token corpus whose speech follows from its text, and a small language model for it."""

import pathlib

import numpy as np

from cv2jax.data.token_corpus import TokenCorpusMetadata, TokenCorpusWriter, TokenRecord
from cv2jax.text.tokenizer import train_text_tokenizer

NUM_CODES = 27  # three digits of three levels
WORDS = ("one", "two", "three", "four", "five", "six")
SMALL_LM = (
    "model.num_speech_tokens=27",
    "model.mix_ratio=(1, 3)",  # so that short texts are interleaved too
    "model.backbone.width=32",
    "model.backbone.mlp_dim=48",
    "model.backbone.num_layers=2",
    "model.backbone.num_heads=4",
    "model.backbone.num_kv_heads=2",
    "optimizer.ema_decay=0.0",  # an average of five steps is still their start
    "data.row_length=128",
    "data.batch_rows=8",
    "data.max_segments=8",
    "optimizer.warmup_steps=2",
)


def make_small_token_corpus(
    root: pathlib.Path,
    num_train: int = 40,
    num_test: int = 6,
    *,
    seed: int = 0,
    prefix: str = "none",
    speech_tokenizer: str = "0" * 64,
) -> pathlib.Path:
    """`root` as a token corpus with the splits train and test; a word is said in seven tokens."""
    random = np.random.default_rng(seed)
    texts = [" ".join(random.choice(WORDS, size=1 + i % 4)) for i in range(num_train + num_test)]
    tokenizer = train_text_tokenizer(texts, 330)
    metadata = TokenCorpusMetadata(
        speech_tokenizer=speech_tokenizer,
        num_codes=NUM_CODES,
        text_tokenizer=tokenizer.hash,
        vocabulary_size=tokenizer.vocabulary_size,
        prefix=prefix,
    )
    with TokenCorpusWriter(root, metadata) as writer:
        tokenizer.save(writer.text_tokenizer)
        for i, text in enumerate(texts):
            spoken = [4 * WORDS.index(word) + place % 3 for word in text.split() for place in range(7)]
            record = TokenRecord(
                id=f"u{i}",
                text=text,
                text_tokens=np.array(tokenizer.encode(text), np.int32),
                speech_tokens=np.array(spoken, np.int32),
                speaker="s",
                language="en",
            )
            writer.write("train" if i < num_train else "test", record)
    return root
