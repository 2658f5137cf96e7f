"""The sentences of the embedded corpus: grammar, free text, and a split that leaks nothing."""

from __future__ import annotations

import itertools
import re

import pytest

from cv2jax.text.characters import normalize_transcript
from cv2jax.text.sentences import (
    GRAMMAR_SLOTS,
    KINDS,
    LANGUAGES,
    SPLITS,
    count_grammar_sentences,
    format_jsgf,
    is_grammar_sentence,
    list_kinds,
    list_sentences,
    list_split,
    order_sentences,
)


def expand_jsgf(source: str) -> set[str]:
    """Every sentence of a JSGF file made of rules, references, alternatives and words: all that ours uses."""
    header, *statements = [part.strip() for part in source.split(";") if part.strip()]
    assert header == "#JSGF V1.0"
    rules = {}
    for statement in statements[1:]:
        name, body = re.fullmatch(r"(?:public )?<(\w+)> = (.*)", statement, re.DOTALL).groups()
        rules[name] = body

    def expand(body: str) -> list[str]:
        sentences = []
        for alternative in body.split("|"):
            parts = [expand(rules[token[1:-1]]) if token[0] == "<" else [token] for token in alternative.split()]
            sentences += [" ".join(words) for words in itertools.product(*parts)]
        return sentences

    return set(expand(rules["sentence"]))


def test_grammar_has_four_slots_of_at_least_six_choices() -> None:
    assert len(GRAMMAR_SLOTS) == 4
    assert all(len(set(choices)) == len(choices) >= 6 for choices in GRAMMAR_SLOTS.values())


def test_jsgf_says_exactly_the_grammar_sentences() -> None:
    sentences = list_sentences("en", "grammar")
    assert len(sentences) == len(set(sentences)) == count_grammar_sentences()
    assert expand_jsgf(format_jsgf()) == set(sentences)
    assert all(map(is_grammar_sentence, sentences))


def test_free_text_is_never_a_grammar_sentence() -> None:
    accepted = expand_jsgf(format_jsgf())
    free = list_sentences("en", "free")
    assert not accepted & set(free)
    assert not any(map(is_grammar_sentence, free))
    assert not is_grammar_sentence("take the red ball")
    assert is_grammar_sentence("Take the red ball  under the table")


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_distinct_normalised_and_many(language: str) -> None:
    sentences = [text for kind in list_kinds(language) for text in list_sentences(language, kind)]
    assert len(sentences) > 2000
    assert len(set(sentences)) == len(sentences)
    assert all(normalize_transcript(text) == text for text in sentences)


def test_english_uses_a_small_vocabulary_of_short_sentences() -> None:
    sentences = [text for kind in KINDS for text in list_sentences("en", kind)]
    assert 100 <= len({word for text in sentences for word in text.split()}) <= 160
    assert max(len(text.split()) for text in sentences) <= 12


@pytest.mark.parametrize(
    ("language", "letters"),
    [("en", r"[a-z ]+"), ("cmn", r"[一-鿿]+"), ("ja", r"[ぁ-ゖァ-ヺー ]+"), ("ko", r"[가-힣 ]+")],
)
def test_each_language_keeps_to_its_script(language: str, letters: str) -> None:
    sentences = [text for kind in list_kinds(language) for text in list_sentences(language, kind)]
    assert [text for text in sentences if not re.fullmatch(letters, text)] == []


def squeeze(text: str) -> str:
    return normalize_transcript(text).replace(" ", "")


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
def test_held_out_sentences_never_occur_in_training(share: float) -> None:
    split = {
        name: [
            squeeze(t)
            for language in LANGUAGES
            for k in list_kinds(language)
            for t in list_split(language, k, name, share)
        ]
        for name in SPLITS
    }
    assert not set(split["train"]) & set(split["test"])
    everything = sum(len(list_sentences(language, kind)) for language in LANGUAGES for kind in list_kinds(language))
    assert len(split["train"]) + len(split["test"]) == everything
    assert len(split["test"]) == pytest.approx(share * everything, rel=0.15)


def test_training_shows_every_word_and_a_larger_share_only_adds() -> None:
    train = {word for kind in KINDS for text in list_split("en", kind, "train", 0.05) for word in text.split()}
    assert train == {word for kind in KINDS for text in list_sentences("en", kind) for word in text.split()}
    assert set(list_split("en", "free", "test", 0.02)) < set(list_split("en", "free", "test", 0.05))


def test_order_is_a_fixed_shuffle() -> None:
    sentences = list_sentences("ko", "free")[:50]
    first = order_sentences(sentences, 0, 0)
    assert sorted(first) == sorted(sentences)
    assert first == order_sentences(tuple(reversed(sentences)), 0, 0)
    assert len({tuple(order_sentences(sentences, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_only_english_has_a_grammar() -> None:
    with pytest.raises(ValueError, match="no 'grammar' sentences for language 'ja'"):
        list_sentences("ja", "grammar")
