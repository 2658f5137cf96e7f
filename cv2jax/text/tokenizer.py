"""The text tokenizer: a Qwen2 byte-level BPE with CosyVoice 2's special tokens, loaded, trained, saved and compared.

It stands on `tokenizers` alone, so nothing here can reach for a network. A directory is read for its vocabulary, merges and
added tokens; normaliser (NFC) and pre-tokenizer are Qwen2's, and a directory that asks for others is refused: hash and
incremental tokenizer rely on them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cv2jax.config import UserError
from cv2jax.files import utf8_path
from cv2jax.text.tags import END_OF_TEXT, SPECIAL_TOKENS

# Qwen2's (transformers/models/qwen2/tokenization_qwen2.py). No look-behind: matching may start afresh at any match's end.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Chinese characters: the unified block, extension A, compatibility, and the two planes kept for ideographs.
IDEOGRAPH_PATTERN = "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd]"
_ALL_SPECIAL = (END_OF_TEXT, *SPECIAL_TOKENS)
# As they are written: the last decides.
_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json")


class TextTokenizer:
    """Text to ids and back; made by `load_text_tokenizer` or `train_text_tokenizer`, and picklable.

    With `single_chinese` no id spans two Chinese characters (spec paper 1.1): they are cut apart before the BPE.
    """

    def __init__(self, backend: Any, *, single_chinese: bool) -> None:
        self._backend = backend  # a `tokenizers.Tokenizer`
        self.single_chinese = single_chinese

    def encode(self, text: str) -> list[int]:
        """Ids [T] of one text, with special tokens recognised and nothing put before or behind (spec official 2.3).

        Raises UserError for half of a surrogate pair.
        """
        return self._backend.encode(_check_unicode(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of several texts, on all cores."""
        encodings = self._backend.encode_batch(list(map(_check_unicode, texts)), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids [T], without its special tokens unless asked for; broken UTF-8 shows as U+FFFD.

        Raises UserError for an id that the vocabulary lacks.
        """
        values = [int(i) for i in ids]
        wrong = next((i for i in values if not 0 <= i < self.vocabulary_size), None)
        if wrong is not None:
            raise UserError(f"text token {wrong}: the tokenizer's ids are 0 … {self.vocabulary_size - 1}")
        return self._backend.decode(values, skip_special_tokens=skip_special)

    @functools.cached_property
    def vocabulary_size(self) -> int:
        """V, the rows that an embedding needs: the largest id plus one (ids leave no gap)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @functools.cached_property
    def special_ids(self) -> dict[str, int]:
        """Ids of `<|endoftext|>` and of the official special tokens in this vocabulary."""
        return {token: self._backend.token_to_id(token) for token in _ALL_SPECIAL}

    @functools.cached_property
    def added_ids(self) -> dict[str, int]:
        """Ids of all tokens that are found before the BPE: the special ones, and others that a directory has added."""
        return {token.content: i for i, token in sorted(self._backend.get_added_tokens_decoder().items())}

    @functools.cached_property
    def hash(self) -> str:
        """A sha256 of all that decides ids: vocabulary, merges, added tokens, patterns, `single_chinese`."""
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        content = {
            "vocabulary": sorted(vocabulary, key=vocabulary.__getitem__),
            "merges": json.loads(self._backend.to_str())["model"]["merges"],
            "added": self.added_ids,
            "normalizer": "NFC",
            "patterns": _patterns(self.single_chinese),
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def normalize(self, text: str) -> str:
        """The text as the BPE sees it (NFC)."""
        return self._backend.normalizer.normalize_str(_check_unicode(text))

    def pretokenize(self, text: str) -> list[tuple[str, int]]:
        """The words of a normalised text without special tokens, for `encode_word`, and where each ends in it."""
        return [(word, end) for word, (_, end) in self._backend.pre_tokenizer.pre_tokenize_str(text)]

    def encode_word(self, word: str) -> list[int]:
        """Ids of one word of `pretokenize`; a text's ids are its words' ids."""
        return [token.id for token in self._backend.model.tokenize(word)]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write a directory in Qwen2's format, as `transformers.AutoTokenizer` reads it; other files in it stay.

        Each file appears whole, and the one that `load_text_tokenizer` goes by last. Beside a config.json of a "qwen2"
        model, AutoTokenizer of transformers 5 forgets `single_chinese`: use its `PreTrainedTokenizerFast` there.
        Version 4 (upstream's) does not. Raises UserError for a path that is no UTF-8.
        """
        target = Path(utf8_path(directory, "tokenizers"))
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=target) as temporary:
            self._backend.model.save(temporary)  # vocab.json and merges.txt
            self._backend.save(f"{temporary}/tokenizer.json")
            config = json.dumps(self._config(), ensure_ascii=False, indent=2)
            Path(temporary, "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
            for name in _FILES:
                os.replace(f"{temporary}/{name}", target / name)

    def _config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json, roles of the special tokens as upstream (spec official 2.3)."""
        flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        added = self._backend.get_added_tokens_decoder()
        return {
            "add_prefix_space": False,
            "added_tokens_decoder": {str(i): {flag: getattr(added[i], flag) for flag in flags} for i in sorted(added)},
            "additional_special_tokens": list(SPECIAL_TOKENS),
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": END_OF_TEXT,
            "errors": "replace",
            "model_max_length": 32768,
            "pad_token": END_OF_TEXT,
            "split_special_tokens": False,
            # Not Qwen2Tokenizer: from transformers 5 on that class has a pre-tokenizer of its own.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        }


def load_text_tokenizer(directory: str | os.PathLike[str], *, single_chinese: bool | None = None) -> TextTokenizer:
    """Read a Qwen2 or Qwen2.5 tokenizer directory, with tokenizer.json or with vocab.json and merges.txt only.

    Official special tokens that it lacks are added behind its ids, in the official order. `single_chinese` None is as
    recorded there, in the pre-tokenizer of tokenizer.json. Raises UserError for a directory without a tokenizer, of
    another kind, or damaged.
    """
    place = Path(directory)
    try:
        if (place / "tokenizer.json").exists():
            content = _read_json(place / "tokenizer.json")
            recorded = _check_kind(content, place)
            vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
            added = {int(token["id"]): token for token in content.get("added_tokens") or ()}
        else:
            vocabulary, merges, added = _read_parts(place)
            recorded = False
        pairs = [(left, right) for left, right in (m.split(" ") if isinstance(m, str) else m for m in merges)]
        return _build(vocabulary, pairs, added, recorded if single_chinese is None else single_chinese, place)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"tokenizer {place}: its files are damaged ({_one_line(error)}); copy them anew") from error


def train_text_tokenizer(texts: Iterable[str], vocabulary_size: int, *, single_chinese: bool = True) -> TextTokenizer:
    """Learn a byte-level BPE from texts: the 256 bytes, merges seen twice at least, then the special tokens.

    `vocabulary_size` counts everything and is a limit: few texts yield fewer merges. The same texts give the same
    tokenizer. Raises UserError for a size without room for bytes and special tokens.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(_ALL_SPECIAL)
    if vocabulary_size < smallest:
        raise UserError(
            f"vocabulary_size={vocabulary_size}: give at least {smallest}, for 256 bytes and special tokens"
        )
    learner: Any = Tokenizer(models.BPE())
    learner.normalizer = normalizers.NFC()
    learner.pre_tokenizer = _make_pre_tokenizer(single_chinese)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(_ALL_SPECIAL), min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    special = re.compile("|".join(map(re.escape, _ALL_SPECIAL)))
    learner.train_from_iterator((part for text in texts for part in special.split(_check_unicode(text))), trainer)
    merges = [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]
    return _build(learner.get_vocab(), merges, {}, single_chinese, Path("(trained)"))


def check_same_tokenizer(
    tokenizer: TextTokenizer,
    expected_hash: str,
    place: str | os.PathLike[str],
    *,
    name: str = "tokenizer",
    mend: str = "use the tokenizer that was saved with the checkpoint",
) -> None:
    """Raise UserError unless the tokenizer, which the user knows as `name`, has the hash of the checkpoint at `place`."""
    if tokenizer.hash != expected_hash:
        differ = f"its hash {tokenizer.hash[:12]} differs from {expected_hash[:12]}"
        raise UserError(f"{name}: {differ} of the checkpoint {place}; {mend}")


def check_token_ratio(
    num_text_tokens: int,
    num_speech_tokens: int,
    *,
    low: float = 4.0,
    high: float = 12.0,
    place: str | os.PathLike[str],
) -> float:
    """Speech tokens (25 Hz) a text token over a corpus; UserError naming `place` unless within [low, high]."""
    if num_text_tokens <= 0:
        raise UserError(f"{place}: it has no text tokens to compare its {num_speech_tokens} speech tokens with")
    ratio = num_speech_tokens / num_text_tokens
    if not low <= ratio <= high:
        size = "larger" if ratio < low else "smaller"
        raise UserError(
            f"{place}: {ratio:.2f} speech tokens a text token, outside {low:g} … {high:g}; train the text tokenizer "
            f"with a {size} --vocabulary_size"
        )
    return ratio


def _check_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"text: character {error.start} is half of a surrogate pair") from error
    return text


def _patterns(single_chinese: bool) -> list[str]:
    """Where a text is cut, one pattern after the other.

    The characters come first, so that what lies between two of them is tokenised as a text of its own.
    """
    return [IDEOGRAPH_PATTERN, WORD_PATTERN] if single_chinese else [WORD_PATTERN]


def _make_pre_tokenizer(single_chinese: bool) -> Any:
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _patterns(single_chinese)]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _build(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    added: dict[int, dict[str, Any]],
    single_chinese: bool,
    place: Path,
) -> TextTokenizer:
    """A tokenizer from its parts, the official special tokens appended; `added` maps ids to tokens in HF's form."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if not set(pre_tokenizers.ByteLevel.alphabet()) <= vocabulary.keys():
        raise UserError(f"tokenizer {place}: it is no byte-level BPE (bytes are missing); give a Qwen2 or Qwen2.5 one")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise UserError(f"tokenizer {place}: the ids of its vocabulary do not run from 0 without gaps; copy it anew")
    try:
        model = models.BPE(vocab=vocabulary, merges=merges)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"tokenizer {place}: its merges are damaged ({_one_line(error)}); copy them anew") from error
    backend: Any = Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _make_pre_tokenizer(single_chinese)
    backend.decoder = decoders.ByteLevel()
    for i, token in sorted(added.items()):
        if any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word", "normalized")):
            raise UserError(f"tokenizer {place}: {token['content']!a} matches loosely; Qwen2's tokens match exactly")
        backend.add_tokens([AddedToken(token["content"], normalized=False, special=bool(token.get("special")))])
        if backend.token_to_id(token["content"]) != i:
            raise UserError(f"tokenizer {place}: id {i} of {token['content']!a} leaves a gap or is taken; copy it anew")
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _ALL_SPECIAL])
    return TextTokenizer(backend, single_chinese=single_chinese)


def _check_kind(content: dict[str, Any], place: Path) -> bool:
    """Refuse a tokenizer.json that is not Qwen2's kind; tell whether it keeps Chinese characters single."""
    model, steps = content["model"], (content.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    is_byte_level = model.get("type") == "BPE" and steps[-1].get("type") == "ByteLevel"
    if not is_byte_level or any(model.get(option) for option in options):
        raise UserError(f"tokenizer {place}: it is no plain byte-level BPE; give a Qwen2 or Qwen2.5 tokenizer")
    patterns = [(step.get("pattern") or {}).get("Regex") for step in steps[:-1]]
    is_isolating = all(step.get("behavior") == "Isolated" and not step.get("invert") for step in steps[:-1])
    is_bare = not (steps[-1].get("use_regex", True) or steps[-1].get("add_prefix_space", True))
    is_nfc = content.get("normalizer") == {"type": "NFC"}
    if patterns not in (_patterns(False), _patterns(True)) or not (is_isolating and is_bare and is_nfc):
        raise UserError(f"tokenizer {place}: it cuts or normalises text otherwise than Qwen2; give a Qwen2 tokenizer")
    return patterns == _patterns(True)


def _read_parts(place: Path) -> tuple[dict[str, Any], list[str], dict[int, dict[str, Any]]]:
    """Vocabulary, merges and added tokens by id from vocab.json, merges.txt and, where it is, tokenizer_config.json."""
    if not (place / "vocab.json").exists() or not (place / "merges.txt").exists():
        raise UserError(f"tokenizer {place}: no tokenizer there: expected tokenizer.json, or vocab.json and merges.txt")
    lines = (place / "merges.txt").read_text(encoding="utf-8").removeprefix("#version: 0.2\n").split("\n")
    config = _read_json(place / "tokenizer_config.json") if (place / "tokenizer_config.json").exists() else {}
    added = {int(i): token for i, token in (config.get("added_tokens_decoder") or {}).items()}
    return _read_json(place / "vocab.json"), [line for line in lines if line], added


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"tokenizer {path}: it is not JSON ({_one_line(error)}); copy it anew") from error
    if not isinstance(content, dict):
        raise UserError(f"tokenizer {path}: expected a JSON object; copy it anew")
    return content


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())[:120]
