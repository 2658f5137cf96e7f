"""The text tokenizer: ids as transformers gives them, single Chinese characters, files, hashes, bad input."""

import importlib
import json
import os
import pickle
import random
import re
import subprocess
import sys
import unicodedata

import pytest

from cv2jax.config import UserError
from cv2jax.text.tags import END_OF_TEXT, SPECIAL_TOKENS
from cv2jax.text.tokenizer import (
    TextTokenizer,
    check_same_tokenizer,
    check_token_ratio,
    load_text_tokenizer,
    train_text_tokenizer,
)

TEXTS = (
    "The little boat says hello to the harbour. They've said it's 2024, and we'll sail 12 miles.",
    "今天天气很好，我们今天去海边。天气很好！海边今天很好。",
    "こんにちは、きょうは天気がいいです。てんきがいいです。",
    "안녕하세요 오늘 날씨가 좋아요. 오늘 바다에 가요.",
    "Café naïve Ångström — 【海】 == != \n\n  indented\tline\r\n",
) * 2
PIECES = (
    *("hello", " the", " ", "  ", "\n", "\r\n\t", "'ll", "don't", "20", "２", "e\u0301", "\u0323", "!?", "…"),
    *(
        "今天",
        "天气",
        "很好",
        "海",
        "，",
        "。",
        "豈",
        "\uf900",
        "\U00020000",
        "\U0002f804",
        "㐀",
        "々",
        "〇",
        "こん",
        "が",
    ),
    *("안녕", "ᄒ", "ᅡ", "🏽", "👩\u200d👧", "[laughter]", "<strong>", "<|endofprompt|>", "<|", "[", "]"),
)
IDEOGRAPH = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd]")


def random_texts(seed: int, count: int) -> list[str]:
    r = random.Random(seed)
    return ["".join(r.choices(PIECES, k=r.randint(0, 12))) for _ in range(count)]


@pytest.fixture(scope="module", params=["single", "multi", "split"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """Trained under the rule or not; or not trained under it, so that Chinese words are in the vocabulary, but split."""
    trained = train_text_tokenizer(TEXTS, 420, single_chinese=request.param == "single")
    if request.param != "split":
        return trained
    place = tmp_path_factory.mktemp("split")
    trained.save(place)
    return load_text_tokenizer(place, single_chinese=True)


@pytest.fixture
def qwen2(tmp_path):
    """A directory as upstream ships it: vocab.json, merges.txt and three added tokens, no tokenizer.json."""
    train_text_tokenizer(TEXTS, 400, single_chinese=False).save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    size = len(json.loads((tmp_path / "vocab.json").read_text()))
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    names = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
    added = {str(size + i): {"content": name, "special": True, **flags} for i, name in enumerate(names)}
    write_config(tmp_path, tokenizer_class="Qwen2Tokenizer", pad_token=END_OF_TEXT, added_tokens_decoder=added)
    return tmp_path


def write_config(directory, **values) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(values))


def edit_json(path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def hf_tokenizer(directory, name="AutoTokenizer"):
    return getattr(importlib.import_module("transformers"), name).from_pretrained(directory, local_files_only=True)


def test_a_qwen2_directory_gives_the_official_ids(qwen2):
    ours, theirs = load_text_tokenizer(qwen2), hf_tokenizer(qwen2)
    theirs.add_special_tokens({"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT})
    theirs.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    first = len(json.loads((qwen2 / "vocab.json").read_text()))
    assert ours.special_ids == {token: first + i for i, token in enumerate((END_OF_TEXT, *SPECIAL_TOKENS))}
    assert ours.vocabulary_size == len(theirs) == first + 20
    assert not ours.single_chinese
    for text in random_texts(3, 150):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_at_qwen2_size_the_prompt_mark_is_151646(tmp_path):
    train_text_tokenizer((), 276).save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    edit_json(tmp_path / "vocab.json", lambda words: words.update({f"filler{i}": i for i in range(256, 151643)}))
    ids = load_text_tokenizer(tmp_path).special_ids
    assert (ids[END_OF_TEXT], ids["<|im_start|>"], ids["<|endofprompt|>"], ids["[mn]"]) == (
        151643,
        151644,
        151646,
        151662,
    )


def test_tokens_that_a_directory_defines_keep_their_ids(qwen2):
    size = len(json.loads((qwen2 / "vocab.json").read_text()))
    # Qwen2.5 has tool and vision tokens where a Qwen2 vocabulary gets the sounds; one here is among ours, too.
    more = ("<|vision_pad|>", "[sigh]", "<tool_call>")
    added = {size + 3 + i: {"content": name, "special": name != "<tool_call>"} for i, name in enumerate(more)}
    edit_json(qwen2 / "tokenizer_config.json", lambda c: c["added_tokens_decoder"].update(added))
    loaded = load_text_tokenizer(qwen2)
    assert loaded.special_ids["[sigh]"] == size + 4
    rest = [token for token in SPECIAL_TOKENS[2:] if token != "[sigh]"]
    assert [loaded.special_ids[token] for token in rest] == list(range(size + 6, size + 6 + len(rest)))
    assert loaded.encode("<tool_call>[sigh]") == [size + 5, size + 4]
    assert loaded.decode([size + 5, size + 4]) == "<tool_call>"  # as transformers: added, but not special


def test_encode_and_decode(tokenizer):
    texts = random_texts(5, 200)
    ids = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == ids
    for text, values in zip(texts, ids, strict=True):
        if "<|" not in text and "[" not in text and "<" not in text:
            assert tokenizer.decode(values) == unicodedata.normalize("NFC", text)
    tagged = "Hi<|endofprompt|>[laughter] <strong>well</strong>"
    assert tokenizer.decode(tokenizer.encode(tagged), skip_special=False) == tagged
    assert tokenizer.decode(tokenizer.encode(tagged)) == "Hi well"
    assert tokenizer.encode("[laughter]") == [tokenizer.special_ids["[laughter]"]]
    assert tokenizer.encode("") == []


def test_words_of_a_text_give_its_ids(tokenizer):
    for text in random_texts(6, 100):
        text = re.sub(r"[\[\]<>]", "", text)
        words = tokenizer.pretokenize(tokenizer.normalize(text))
        assert [i for word, _ in words for i in tokenizer.encode_word(word)] == tokenizer.encode(text)


def test_an_id_never_spans_two_chinese_characters():
    single = train_text_tokenizer(TEXTS, 420, single_chinese=True)
    multi = train_text_tokenizer(TEXTS, 420, single_chinese=False)
    assert any(len(IDEOGRAPH.findall(multi.decode([i]))) > 1 for i in range(420))  # the texts do ask for such ids
    assert all(len(IDEOGRAPH.findall(single.decode([i]))) <= 1 for i in range(420))


def test_the_rule_holds_for_a_vocabulary_with_chinese_words(tmp_path):
    multi = train_text_tokenizer(TEXTS, 420, single_chinese=False)
    multi.save(tmp_path)
    single = load_text_tokenizer(tmp_path, single_chinese=True)
    assert len(multi.encode("今天")) == 1
    spans = 0
    for text in random_texts(8, 300):
        spans += any(len(IDEOGRAPH.findall(multi.decode([i]))) > 1 for i in multi.encode(text))
        ids = single.encode(text)
        assert all(len(IDEOGRAPH.findall(single.decode([i]))) <= 1 for i in ids)
        if not IDEOGRAPH.search(text):
            assert ids == multi.encode(text)  # nothing else changes
        # A character's ids do not depend on what stands around it.
        for character in set(IDEOGRAPH.findall(single.normalize(text))):
            assert single.decode(single.encode(character)) == character
            assert single.encode(f"{character}{character}") == 2 * single.encode(character)
    assert spans > 50


def test_which_characters_are_single():
    single, multi = (train_text_tokenizer((), 276, single_chinese=on) for on in (True, False))
    for c in "一龦鿿㐀䶿\ufa0e\ufa29\U00020000\U0002ceb0\U00030000\U000323af":
        assert [end for _, end in single.pretokenize(f"a{c}{c}b")] == [1, 2, 3, 4]
        assert [end for _, end in multi.pretokenize(f"a{c}{c}b")] == [4]
    for c in "ab々かカ한é":
        assert [end for _, end in single.pretokenize(f"a{c}{c}b")] == [4]
    # What lies between two characters is a text of its own: these blanks stay together.
    assert [end for _, end in single.pretokenize("海  海, 海")] == [1, 3, 4, 5, 6, 7]


def test_save_and_load_keep_everything(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    tokenizer.save(tmp_path)  # over itself
    loaded, theirs = load_text_tokenizer(tmp_path), hf_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')  # beside a backbone, as upstream
    beside = hf_tokenizer(tmp_path, "PreTrainedTokenizerFast")
    assert sorted(os.listdir(tmp_path)) == [
        *("config.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
    ]
    assert (loaded.hash, loaded.single_chinese) == (tokenizer.hash, tokenizer.single_chinese)
    assert (loaded.special_ids, loaded.vocabulary_size) == (tokenizer.special_ids, tokenizer.vocabulary_size)
    assert theirs.eos_token_id == theirs.pad_token_id == tokenizer.special_ids[END_OF_TEXT]
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.hash == tokenizer.hash
    for text in random_texts(9, 150):
        ids = tokenizer.encode(text)
        assert ids == loaded.encode(text) == copy.encode(text) == theirs.encode(text) == beside.encode(text)
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


def test_a_path_that_is_no_utf8_is_one_line(tokenizer, tmp_path):
    with pytest.raises(UserError, match="tokenizers takes no path with bytes that are not UTF-8; rename it"):
        tokenizer.save(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    assert not os.listdir(tmp_path)


def test_a_failed_save_leaves_the_old_tokenizer(tmp_path, monkeypatch):
    old = train_text_tokenizer(TEXTS, 300)
    old.save(tmp_path)
    replaced = []

    def fail_at_the_last(source, target):
        if len(replaced) == 3:
            raise OSError("disk full")
        replaced.append(target)
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_last)
    with pytest.raises(OSError, match="disk full"):
        train_text_tokenizer(TEXTS, 350).save(tmp_path)
    assert load_text_tokenizer(tmp_path).hash == old.hash
    assert len(os.listdir(tmp_path)) == 4


def test_training_is_deterministic_and_bounded():
    tokenizer = train_text_tokenizer(TEXTS, 350)
    assert tokenizer.single_chinese
    assert tokenizer.vocabulary_size == 350
    assert tokenizer.hash == train_text_tokenizer(reversed(TEXTS), 350).hash
    assert list(tokenizer.special_ids.values()) == list(range(330, 350))
    assert list(tokenizer.special_ids) == [END_OF_TEXT, *SPECIAL_TOKENS]
    assert train_text_tokenizer(["abc def"], 350).vocabulary_size == 276  # no merge is worth learning
    # Tags are no text to learn from.
    assert train_text_tokenizer(["[laughter]<|endofprompt|>"] * 9, 350).vocabulary_size == 276
    with pytest.raises(UserError, match=r"vocabulary_size=275: give at least 276"):
        train_text_tokenizer(TEXTS, 275)


def test_the_hash_tells_every_difference_that_decides_ids(tmp_path):
    base = train_text_tokenizer(TEXTS, 320, single_chinese=False)
    base.save(tmp_path)
    hashes = {base.hash, load_text_tokenizer(tmp_path, single_chinese=True).hash, train_text_tokenizer(TEXTS, 321).hash}

    def swap_merges(content):
        merges = content["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]

    def swap_ids(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    def add_token(content):
        content["added_tokens"].append({"id": 320, "content": "[hum]", "special": True})

    for edit in (swap_merges, swap_ids, add_token):
        base.save(tmp_path)
        edit_json(tmp_path / "tokenizer.json", edit)
        hashes.add(load_text_tokenizer(tmp_path).hash)
    assert len(hashes) == 6
    check_same_tokenizer(base, base.hash, "runs/lm")
    with pytest.raises(
        UserError, match=f"its hash {base.hash[:12]} differs from 0123.* of the checkpoint runs/lm; use"
    ):
        check_same_tokenizer(base, "0123", "runs/lm")
    with pytest.raises(UserError, match=r"^--flag x: its hash \w{12} differs from 0123 .*runs/lm; give another$"):
        check_same_tokenizer(base, "0123", "runs/lm", name="--flag x", mend="give another")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["model"].update(type="Unigram"), "no plain byte-level BPE"),
        (lambda c: c["model"].update(ignore_merges=True), "no plain byte-level BPE"),
        (lambda c: c.update(pre_tokenizer={"type": "ByteLevel"}), "no plain byte-level BPE"),
        (lambda c: c.update(normalizer=None), "otherwise than Qwen2"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "otherwise than Qwen2"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\w+"}), "otherwise than Qwen2"),
        (lambda c: c["model"]["vocab"].pop("a"), "bytes are missing"),
        (lambda c: c["model"]["vocab"].update(zzz=900), "without gaps"),
        (lambda c: c["model"]["merges"].append(["a", "nowhere"]), "merges are damaged"),
        (lambda c: c["model"]["merges"].append("three words here"), "files are damaged"),
        (lambda c: c.pop("model"), "files are damaged"),
        (lambda c: c["added_tokens"][0].update(id=7), "leaves a gap or is taken"),
        (lambda c: c["added_tokens"][4].update(lstrip=True), "matches loosely"),
    ],
)
def test_another_kind_of_tokenizer_is_refused(tmp_path, edit, message):
    train_text_tokenizer(TEXTS, 300).save(tmp_path)
    edit_json(tmp_path / "tokenizer.json", edit)
    with pytest.raises(UserError, match=message) as error:
        load_text_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.json"])
@pytest.mark.parametrize("content", ['{"model": ', "[1, 2]", "\udcff"])
def test_a_damaged_file_is_named(qwen2, name, content):
    (qwen2 / name).write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=re.escape(str(qwen2 / name)) + ": (it is not JSON|expected a JSON object)"):
        load_text_tokenizer(qwen2)


def test_a_directory_without_a_tokenizer(qwen2):
    (qwen2 / "merges.txt").unlink()
    for place in (qwen2, qwen2 / "missing", qwen2 / "vocab.json"):
        with pytest.raises(
            UserError, match=r"no tokenizer there: expected tokenizer\.json, or vocab\.json and merges\.txt"
        ):
            load_text_tokenizer(place)


def test_wrong_ids_and_texts_are_named(tokenizer):
    for i in (-1, tokenizer.vocabulary_size):
        with pytest.raises(
            UserError, match=f"text token {i}: the tokenizer's ids are 0 … {tokenizer.vocabulary_size - 1}"
        ):
            tokenizer.decode([5, i])
    for call in (tokenizer.encode, tokenizer.normalize, lambda text: tokenizer.encode_batch(["", text])):
        with pytest.raises(UserError, match="character 1 is half of a surrogate pair"):
            call("a\ud800")


def test_the_ratio_of_speech_to_text_tokens():
    assert check_token_ratio(10, 40, place="corpus") == 4
    assert check_token_ratio(10, 120, place="corpus") == 12
    with pytest.raises(
        UserError, match=r"corpus: 3\.90 speech tokens a text token, outside 4 … 12; .*larger --vocabulary"
    ):
        check_token_ratio(10, 39, place="corpus")
    with pytest.raises(UserError, match=r"12\.10 .* with a smaller --vocabulary_size"):
        check_token_ratio(10, 121, place="corpus")
    with pytest.raises(UserError, match=r"5\.00 .* outside 6 … 9"):
        check_token_ratio(10, 50, low=6.0, high=9.0, place="corpus")
    with pytest.raises(UserError, match="corpus: it has no text tokens"):
        check_token_ratio(0, 121, place="corpus")


def test_the_module_imports_no_library():
    code = "import sys, cv2jax.text.incremental; assert not {'tokenizers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
