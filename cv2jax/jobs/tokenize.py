"""`cv2jax tokenize`: a manifest's texts and the speech tokens of its audio, joined by id into one token corpus.

Texts are read twice where a text tokenizer is trained, else once; memory holds a block of utterances, the index of the
speech tokens and the texts that are trained on. The corpus appears whole or not at all.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import logging
from tqdm import tqdm

from cv2jax.config import UserError
from cv2jax.data.manifest import ManifestScan, Utterance, parse_utterance, scan_manifest
from cv2jax.data.token_corpus import TokenCorpusMetadata, TokenCorpusWriter, TokenRecord
from cv2jax.data.tokens import SpeechTokenFile
from cv2jax.text.normalize import active_normalizer, normalize_text
from cv2jax.text.tags import build_instruct_prefix, build_speaker_prefix, split_prefix
from cv2jax.text.tokenizer import TextTokenizer, check_token_ratio, load_text_tokenizer, train_text_tokenizer

PREFIXES = ("none", "instruct", "speaker")
UNKNOWN_SPEAKERS = ("", "unknown")
# Sizes tried in turn for a vocabulary of our own: the first whose text tokens stand for enough speech each.
VOCABULARY_SIZES = (320, 400, 500, 640, 800, 1000, 1500, 2000, 4000, 8000, 16_000)
WANTED_RATIO = 6.0  # speech tokens a text token, in the middle of the 4 … 12 that is checked
Joined = tuple[Utterance, str, np.ndarray]
_MAX_CONTINUED = 750  # speech tokens of two utterances: 30 s
_BLOCK = 1024  # utterances tokenised together


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeResult:
    """What a run of `tokenize` wrote, and what it left out."""

    num_utterances: int
    num_text_tokens: int
    num_speech_tokens: int
    vocabulary_size: int
    num_without_text: int
    num_without_speech: int
    num_refused: int  # lines of the manifest that are none, and texts that cannot have their prefix
    num_continuations: int = 0  # which the other counts leave out

    @property
    def ratio(self) -> float:
        """Speech tokens a text token."""
        return self.num_speech_tokens / max(self.num_text_tokens, 1)


def tokenize(
    manifest: str | os.PathLike[str],
    speech: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    text_tokenizer: str = "",
    vocabulary_size: int = 0,
    single_chinese: bool | None = None,
    train_split: str = "train",
    prefix: str = "none",
    normalizer: str = "",
    num_codes: int = 6561,
    continuations: bool = False,
) -> TokenizeResult:
    """Writes the token corpus `out` of the manifest's utterances that have a text and tokens in the file `speech`.

    `text_tokenizer` is the directory of a Qwen2 tokenizer; "" trains a byte-level BPE on `train_split`, of
    `vocabulary_size` (0: the smallest of VOCABULARY_SIZES with WANTED_RATIO), and checks that a text token stands for 4
    to 12 speech tokens. `prefix`, one of PREFIXES, puts each utterance's instruction or speaker in front of its text.
    `normalizer` ("none", "wetext", "auto") reads texts as synthesis will; "" leaves them as they are. `continuations` adds to
    `train_split` each utterance behind the one before of its speaker, as zero-shot synthesis puts a text behind a recording:
    a corpus of single sentences teaches nobody to go on from one. Raises UserError for what cannot be joined at all.
    """
    if prefix not in PREFIXES:
        raise UserError(f"prefix={prefix}: choose one of {', '.join(PREFIXES)}")
    if vocabulary_size and text_tokenizer:
        raise UserError("vocabulary_size is for a tokenizer that is trained here; leave it out with text_tokenizer")
    if continuations and prefix != "none":
        raise UserError(
            f"continuations: a text has its prefix once, in front; leave prefix={prefix} out, or continuations"
        )
    read = _reader(prefix, normalizer)
    scan, tokens = scan_manifest(manifest), SpeechTokenFile(speech)
    for refusal in scan.refused:
        _tell(f"{manifest}:{refusal.line}", refusal.reason)
    if text_tokenizer:
        tokenizer = load_text_tokenizer(text_tokenizer, single_chinese=single_chinese)
    else:
        single = True if single_chinese is None else single_chinese
        tokenizer = _train(scan, tokens, read, train_split, vocabulary_size, single)
    metadata = TokenCorpusMetadata(
        speech_tokenizer=tokens.tokenizer,
        num_codes=num_codes,
        text_tokenizer=tokenizer.hash,
        vocabulary_size=tokenizer.vocabulary_size,
        prefix=prefix,
        normalizer=normalizer and active_normalizer(normalizer),
    )
    counts = dict.fromkeys(("num_utterances", "num_text_tokens", "num_speech_tokens", "num_continuations"), 0)
    before: dict[str, TokenRecord] = {}  # by speaker
    left_out = _LeftOut(tell=bool(text_tokenizer))  # else training has told
    with TokenCorpusWriter(out, metadata) as writer:
        tokenizer.save(writer.text_tokenizer)
        for block in _blocks(scan, tokens, read, left_out):
            for split, record in _records(block, tokenizer):
                writer.write(split, record)
                counts["num_text_tokens"] += len(record.text_tokens)
                counts["num_speech_tokens"] += len(record.speech_tokens)
                if continuations and split == train_split and record.speaker not in UNKNOWN_SPEAKERS:
                    joined = _continue(before.get(record.speaker), record)
                    before[record.speaker] = record
                    if joined is not None:
                        writer.write(split, joined)
                        counts["num_continuations"] += 1
            counts["num_utterances"] += len(block)
        if not counts["num_utterances"]:
            raise UserError(
                f"{manifest}: none of its {len(scan.line)} utterances has both a text and tokens in {speech}"
                f" ({left_out})"
            )
        if not text_tokenizer:
            check_token_ratio(counts["num_text_tokens"], counts["num_speech_tokens"], place=manifest)
    return TokenizeResult(
        vocabulary_size=tokenizer.vocabulary_size,
        num_without_text=left_out.num_without_text,
        num_without_speech=left_out.num_without_speech,
        num_refused=left_out.num_refused + len(scan.refused),
        **counts,
    )


@dataclasses.dataclass(kw_only=True)
class _LeftOut:
    """How many utterances a pass leaves out, and whether it tells why one is refused."""

    tell: bool
    num_without_text: int = 0
    num_without_speech: int = 0
    num_refused: int = 0

    def __str__(self) -> str:
        lacking = f"{self.num_without_text} without text, {self.num_without_speech} without speech"
        return f"{lacking}, {self.num_refused} refused"


def _tell(place: str, reason: object) -> None:
    tqdm.write(f"tokenize: refused {place}: {reason}", file=sys.stderr)


def _reader(prefix: str, normalizer: str) -> Callable[[Utterance], str]:
    """utterance → what the model reads of it, which raises UserError for a text that cannot have its prefix."""
    if normalizer:
        active_normalizer(normalizer)  # a mistake here is not one of every utterance

    def read(utterance: Utterance) -> str:
        text = utterance.text or ""
        if normalizer:
            text = normalize_text(text, language=utterance.language, normalizer=normalizer)
        if not text.strip():
            return ""
        if prefix == "instruct" and utterance.instruct:
            return build_instruct_prefix(utterance.instruct) + text
        if prefix == "speaker":
            known = utterance.speaker not in UNKNOWN_SPEAKERS
            return build_speaker_prefix(utterance.speaker if known else None) + text
        return text

    return read


def _records(block: Sequence[Joined], tokenizer: TextTokenizer) -> Iterator[tuple[str, TokenRecord]]:
    """(split, record) of each utterance of a block."""
    encoded = tokenizer.encode_batch([text for _, text, _ in block])
    for (utterance, text, speech_tokens), text_tokens in zip(block, encoded, strict=True):
        record = TokenRecord(
            id=utterance.id,
            text=text,
            text_tokens=np.array(text_tokens, np.int32),
            speech_tokens=speech_tokens,
            speaker=utterance.speaker,
            language=utterance.language,
        )
        yield utterance.split, record


def _continue(before: TokenRecord | None, record: TokenRecord) -> TokenRecord | None:
    """Both utterances as one; None where there is none before, or they are longer than upstream trains on.

    Each text is tokenised for itself, as a recording's transcript and the text behind it are in synthesis.
    """
    if before is None or len(before.speech_tokens) + len(record.speech_tokens) > _MAX_CONTINUED:
        return None
    return dataclasses.replace(
        record,
        id=f"{before.id}+{record.id}",
        text=f"{before.text} {record.text}",
        text_tokens=np.concatenate([before.text_tokens, record.text_tokens]),
        speech_tokens=np.concatenate([before.speech_tokens, record.speech_tokens]),
    )


def _blocks(
    scan: ManifestScan, tokens: SpeechTokenFile, read: Callable[[Utterance], str], left_out: _LeftOut
) -> Iterator[list[Joined]]:
    """Utterances with their text and speech tokens, some at a time, in the manifest's order; the others are counted."""
    block: list[Joined] = []
    with open(scan.path, "rb") as file:
        for offset in tqdm(scan.offset, desc="tokenize", unit="utt", disable=not sys.stderr.isatty()):
            file.seek(int(offset))
            if (joined := _join(parse_utterance(file.readline()), tokens, read, left_out)) is not None:
                block.append(joined)
            if len(block) == _BLOCK:
                yield block
                block = []
    if block:
        yield block


def _join(
    utterance: Utterance, tokens: SpeechTokenFile, read: Callable[[Utterance], str], left_out: _LeftOut
) -> Joined | None:
    """The utterance, its text and its speech tokens; None, and counted, where it lacks one or its text is refused."""
    try:
        text = read(utterance)
        has_words = bool(split_prefix(text)[1].strip())
    except UserError as error:
        left_out.num_refused += 1
        if left_out.tell:
            _tell(utterance.id, error)
        return None
    if not has_words:
        left_out.num_without_text += 1
        return None
    try:
        speech_tokens = tokens.read(utterance.id)
    except KeyError:
        speech_tokens = np.zeros(0, np.int32)
    if not len(speech_tokens):
        left_out.num_without_speech += 1
        return None
    return utterance, text, speech_tokens


def _train(
    scan: ManifestScan,
    tokens: SpeechTokenFile,
    read: Callable[[Utterance], str],
    split: str,
    vocabulary_size: int,
    single_chinese: bool,
) -> TextTokenizer:
    """A byte-level BPE of the split's texts; the sizes are tried in turn where none is given."""
    if split not in scan.splits:
        known = ", ".join(scan.splits)
        raise UserError(f"{scan.path}: has no split {split} to train the text tokenizer on; it has {known}")
    texts: list[str] = []
    num_speech_tokens = 0
    left_out = _LeftOut(tell=True)
    for block in _blocks(scan, tokens, read, left_out):
        for utterance, text, speech_tokens in block:
            if utterance.split == split:
                texts.append(text)
                num_speech_tokens += len(speech_tokens)
    if not texts:
        raise UserError(
            f"{scan.path}: no utterance of split {split} has both a text and tokens in {tokens.path}"
            f" (of all: {left_out})"
        )
    sizes: Sequence[int] = (vocabulary_size,) if vocabulary_size else VOCABULARY_SIZES
    for size in sizes:
        tokenizer = train_text_tokenizer(texts, size, single_chinese=single_chinese)
        ratio = num_speech_tokens / max(sum(map(len, tokenizer.encode_batch(texts))), 1)
        logging.info("text tokenizer of %d tokens: %.2f speech tokens a text token", tokenizer.vocabulary_size, ratio)
        if ratio >= WANTED_RATIO or tokenizer.vocabulary_size < size:  # the texts have no more to merge
            break
    return tokenizer
