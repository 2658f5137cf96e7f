"""Tasks without a corpus: an index of made-up lengths in place of speech, enough to know every shape that a step has."""

import dataclasses
import importlib
import json
import pathlib
import shutil
from typing import Any, cast

import numpy as np

from cv2jax.audio.mel import MEL_HOP, MEL_RATE_HZ
from cv2jax.config import TrainConfig
from cv2jax.data.corpus_batches import CorpusBatches
from cv2jax.data.corpus_index import ShardColumns, write_index
from cv2jax.data.f0_shard import F0_DIRECTORY, F0_VERSION, INDEX
from cv2jax.data.shards import Corpus, ShardSummary
from cv2jax.data.speaker_vectors import Of, SpeakerVectors
from cv2jax.data.token_corpus import TokenCorpusMetadata, TokenCorpusWriter, TokenRecord
from cv2jax.data.tokens import SpeechTokenFile
from cv2jax.tasks import make_task
from cv2jax.text.tokenizer import train_text_tokenizer

NUM_UTTERANCES = 60_000  # of the stand-in's training split
NUM_SPEAKERS = 5_000  # that a speaker encoder tells apart
NUM_CHARACTERS = 5_000  # beside Latin, of a speech tokenizer's transcripts: Chinese
CHARACTERS_PER_SECOND = 8
TEXT_VOCABULARY = 60_000  # of a language model that leaves its own open
_NEEDS: dict[str, dict[str, bool]] = {
    "speech_tokenizer": {"require_text": True},
    "flow_matching": {"require_text": False, "speech_tokens": True, "embeddings": True},
    "hift_vocoder": {"require_text": False, "f0": True},
    "speaker_encoder": {"require_text": False, "speaker": True},
}


def make_stand_in_task(config: TrainConfig, place: pathlib.Path) -> Any:
    """The task of a config on a stand-in written to the empty directory `place`; its batches have shapes and no values.

    Utterances are spread over `data.min_seconds` … `data.max_seconds`, short ones more often; see the numbers above.
    """
    if config.task == "text_speech_lm":
        return make_task(_with_token_corpus(config, place / "tokens"))
    if config.task not in _NEEDS:
        return make_task(config)
    changes: dict[str, Any] = {"corpus": str(place / "corpus"), "train_split": "train", "eval_split": "test"}
    if config.task == "flow_matching":
        changes |= {"speech_tokens": "stand-in", "speaker_embeddings": "stand-in"}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))
    _write_corpus(place / "corpus", config)
    module = importlib.import_module(f"cv2jax.tasks.{config.task}")
    tasks = {name: made for name, made in vars(module).items() if name.endswith("Task") and name != "AudioTask"}
    (made,) = tasks.values()
    return made(config, StandInBatches(config, **cast(Any, _NEEDS[config.task])))


class StandInBatches(CorpusBatches):
    """Plans and shapes of a stand-in's batches; speech tokens and embeddings are told by their sizes alone."""

    def _open_tokens(self) -> SpeechTokenFile:
        return _NoTokens(self._config.model.num_speech_tokens)

    def _open_embeddings(self) -> SpeakerVectors:
        return _NoVectors(self._config.model.speaker_dim)


class _NoTokens(SpeechTokenFile):
    def __init__(self, num_codes: int) -> None:
        self.tokenizer, self.hash, self.num_codes = "", "", num_codes


class _NoVectors(SpeakerVectors):
    of: Of = "utterance"

    def __init__(self, dim: int) -> None:
        self.encoder, self.hash, self.dim = "", "", dim


def _write_corpus(root: pathlib.Path, config: TrainConfig) -> None:
    """An index with empty shards: whoever read a record would be told that it is damaged."""
    rate_hz = MEL_RATE_HZ
    shards = []
    (root / "shards").mkdir(parents=True)
    for split, count in (("train", NUM_UTTERANCES), ("test", 64)):
        file = f"{split}-00000.arrayrecord"
        (root / "shards" / file).touch()
        spread = (np.arange(count) / max(count - 1, 1)) ** 2
        low, high = config.data.min_seconds, config.data.max_seconds
        seconds = low + (high - low) * spread
        samples = np.floor(seconds * rate_hz).astype(int)
        names = [f"speaker {row % NUM_SPEAKERS}" for row in range(count)]
        summary = ShardSummary(
            file=file, split=split, num_records=count, num_samples=int(samples.sum()), bytes=0, sha256=""
        )
        shards.append(
            ShardColumns(
                summary=summary,
                num_samples=samples.tolist(),
                num_characters=np.ceil(seconds * CHARACTERS_PER_SECOND).astype(int).tolist(),
                speaker=names,
                language=["zh"] * count,
                characters={chr(0x4E00 + i): 1 for i in range(NUM_CHARACTERS)},
            )
        )
    write_index(root, rate_hz=rate_hz, encoding="flac", read_shards=lambda: iter(shards))
    (root / F0_DIRECTORY).mkdir()
    facts = {"version": F0_VERSION, "corpus": Corpus(root).hash, "hop_length": MEL_HOP, "method": "", "hash": ""}
    (root / F0_DIRECTORY / INDEX).write_text(json.dumps(facts | {"shards": []}))


def _with_token_corpus(config: TrainConfig, root: pathlib.Path) -> TrainConfig:
    """The config with a token corpus of one utterance; packed rows have one shape, whatever is in them."""
    model = config.model
    if not model.backbone.vocabulary_size:
        backbone = dataclasses.replace(model.backbone, vocabulary_size=TEXT_VOCABULARY)
        model = dataclasses.replace(model, backbone=backbone)
    shutil.rmtree(root, ignore_errors=True)
    tokenizer = train_text_tokenizer(["a"], 330)
    metadata = TokenCorpusMetadata(
        speech_tokenizer="0" * 64,
        num_codes=model.num_speech_tokens,
        text_tokenizer=tokenizer.hash,
        vocabulary_size=tokenizer.vocabulary_size,
        prefix=config.data.prefix or "none",
    )
    with TokenCorpusWriter(root, metadata) as writer:
        tokenizer.save(writer.text_tokenizer)
        for split in ("train", "test"):
            text, speech = np.array(tokenizer.encode("a"), np.int32), np.arange(25, dtype=np.int32)
            record = TokenRecord(id=split, text="a", text_tokens=text, speech_tokens=speech, speaker="s", language="en")
            writer.write(split, record)
    data = dataclasses.replace(
        config.data, corpus=str(root), speech_tokenizer="", train_split="train", eval_split="test"
    )
    return dataclasses.replace(config, model=model, data=data, init_from="")
