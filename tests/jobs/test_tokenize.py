"""`cv2jax tokenize`: texts and speech tokens joined by id, the text tokenizer in the corpus, bad input in one line."""

import dataclasses
import pathlib

import numpy as np
import pytest
import transformers

from cv2jax.cli.main import run
from cv2jax.config import UserError
from cv2jax.data.manifest import Utterance, write_manifest
from cv2jax.data.token_corpus import TokenCorpus, TokenRecord
from cv2jax.data.tokens import TokenWriter
from cv2jax.jobs.tokenize import VOCABULARY_SIZES, WANTED_RATIO, tokenize
from cv2jax.text.tokenizer import load_text_tokenizer, train_text_tokenizer

WORDS = ("harbour", "little", "boat", "says", "hello", "to", "the", "wind", "and", "rain")
TOKENIZER = "3f" * 32


def make_utterances(count: int = 60, seed: int = 0) -> list[Utterance]:
    random = np.random.default_rng(seed)
    return [
        Utterance(
            id=f"é{i}",
            audio=f"{i}.wav",
            text=" ".join(random.choice(WORDS, 2 + i % 5)).capitalize() + ".",
            speaker=("anna", "ben", "unknown")[i % 3],
            language="en",
            split="test" if i % 7 == 3 else "train",
        )
        for i in range(count)
    ]


def make_speech(utterances: list[Utterance], seed: int = 0, *, per_word: int = 9) -> dict[str, np.ndarray]:
    """Tokens by id: `per_word` a word, one way or the other."""
    random = np.random.default_rng(seed)
    sizes = [per_word * len((utterance.text or "x").split()) + random.integers(-2, 3) for utterance in utterances]
    return {u.id: random.integers(0, 6561, size).astype(np.int32) for u, size in zip(utterances, sizes, strict=True)}


def write_inputs(
    root: pathlib.Path, utterances: list[Utterance], speech: dict[str, np.ndarray], suffix: str = ".jsonl"
) -> tuple[pathlib.Path, pathlib.Path]:
    write_manifest(root / "m.jsonl", utterances)
    with TokenWriter(root / f"t{suffix}", {"tokenizer": TOKENIZER}) as writer:
        for identity, tokens in speech.items():
            writer.write(identity, "", tokens, num_frames=4 * len(tokens), seconds=len(tokens) / 25)
    return root / "m.jsonl", root / f"t{suffix}"


@pytest.fixture
def inputs(tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    utterances = make_utterances()
    return write_inputs(tmp_path, utterances, make_speech(utterances))


def read_all(corpus: TokenCorpus, split: str) -> list[TokenRecord]:
    rows = corpus.split(split)
    return [rows.read(row) for row in range(len(rows))]


def texts_of(path: pathlib.Path) -> list[str]:
    return [record.text for record in read_all(TokenCorpus(path), "train")]


@pytest.mark.parametrize("suffix", [".jsonl", ".npz"])
def test_texts_and_tokens_meet_by_id_in_the_order_of_the_manifest(tmp_path: pathlib.Path, suffix: str) -> None:
    utterances = make_utterances(50, seed=1)
    speech = make_speech([*utterances, dataclasses.replace(utterances[0], id="of nobody")])
    shuffled = {identity: speech[identity] for identity in np.random.default_rng(2).permutation(list(speech)).tolist()}
    result = tokenize(*write_inputs(tmp_path, utterances, shuffled, suffix), tmp_path / "out", num_codes=7000)
    corpus = TokenCorpus(tmp_path / "out")
    corpus.verify()
    assert set(corpus.splits) == {"train", "test"}
    tokenizer = load_text_tokenizer(corpus.text_tokenizer)
    for split in corpus.splits:
        wanted = [u for u in utterances if u.split == split]
        for utterance, record in zip(wanted, read_all(corpus, split), strict=True):
            for name in ("id", "text", "speaker", "language"):
                assert getattr(record, name) == getattr(utterance, name)
            np.testing.assert_array_equal(record.speech_tokens, speech[utterance.id])
            assert record.text_tokens.tolist() == tokenizer.encode(record.text)
    assert vars(corpus.metadata) == {
        "speech_tokenizer": TOKENIZER,
        "num_codes": 7000,
        "text_tokenizer": tokenizer.hash,
        "vocabulary_size": tokenizer.vocabulary_size,
        "prefix": "none",
        "normalizer": "",
    }
    assert vars(result) == {
        "num_utterances": 50,
        "num_text_tokens": sum(len(tokenizer.encode(u.text or "")) for u in utterances),
        "num_speech_tokens": sum(len(speech[u.id]) for u in utterances),
        "vocabulary_size": tokenizer.vocabulary_size,
        **dict.fromkeys(("num_without_text", "num_without_speech", "num_refused", "num_continuations"), 0),
    }
    assert 4 <= result.ratio == result.num_speech_tokens / result.num_text_tokens <= 12


def test_equal_inputs_give_equal_bytes_however_they_are_cut(
    inputs: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = set()
    for block in (1024, 7, 1, 60):
        monkeypatch.setattr("cv2jax.jobs.tokenize._BLOCK", block)
        tokenize(*inputs, tmp_path / f"out{block}")
        hashes.add(TokenCorpus(tmp_path / f"out{block}").hash)
    assert len(hashes) == 1


def test_the_tokenizer_of_a_corpus_loads_in_transformers(
    inputs: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    tokenize(*inputs, tmp_path / "out", prefix="speaker")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "text_tokenizer", local_files_only=True)
    records = read_all(TokenCorpus(tmp_path / "out"), "train")
    assert len(theirs) == TokenCorpus(tmp_path / "out").metadata.vocabulary_size
    for record in records:
        assert record.text_tokens.tolist() == theirs(record.text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("per_word", [8, 11, 14])
def test_the_smallest_vocabulary_of_the_wanted_ratio_is_chosen(tmp_path: pathlib.Path, per_word: int) -> None:
    utterances = make_utterances(80, seed=per_word)
    speech = make_speech(utterances, per_word=per_word)
    result = tokenize(*write_inputs(tmp_path, utterances, speech), tmp_path / "out")
    train = [u for u in utterances if u.split == "train"]
    num_speech = sum(len(speech[u.id]) for u in train)
    for size in VOCABULARY_SIZES:
        tokenizer = train_text_tokenizer([u.text or "" for u in train], size)
        ratio = num_speech / sum(len(tokenizer.encode(u.text or "")) for u in train)
        if ratio >= WANTED_RATIO or tokenizer.vocabulary_size < size:
            break
    assert TokenCorpus(tmp_path / "out").metadata.text_tokenizer == tokenizer.hash
    assert result.vocabulary_size == tokenizer.vocabulary_size
    assert 4 <= result.ratio <= 12


def test_the_tokenizer_learns_from_its_split_alone(tmp_path: pathlib.Path) -> None:
    utterances = make_utterances()
    inputs = write_inputs(tmp_path, utterances, make_speech(utterances))
    for split in ("train", "test"):
        tokenize(*inputs, tmp_path / split, vocabulary_size=340, train_split=split)
        learnt = train_text_tokenizer([u.text or "" for u in utterances if u.split == split], 340)
        assert TokenCorpus(tmp_path / split).metadata.text_tokenizer == learnt.hash


@pytest.mark.parametrize(("per_word", "size", "mend"), [(9, 276, "larger"), (60, 500, "smaller"), (2, 0, "larger")])
def test_a_ratio_outside_its_bounds_is_refused(tmp_path: pathlib.Path, per_word: int, size: int, mend: str) -> None:
    utterances = make_utterances()
    inputs = write_inputs(tmp_path, utterances, make_speech(utterances, per_word=per_word))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=rf"m\.jsonl: .*outside 4 … 12; .* with a {mend} --vocabulary_size"):
        tokenize(*inputs, tmp_path / "out", vocabulary_size=size)
    assert sorted(tmp_path.iterdir()) == before


def test_a_foreign_tokenizer_is_taken_as_it_is(
    inputs: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    foreign = train_text_tokenizer(["something else"] * 3, 290, single_chinese=False)
    foreign.save(tmp_path / "foreign")
    result = tokenize(*inputs, tmp_path / "out", text_tokenizer=str(tmp_path / "foreign"), train_split="none")
    assert result.ratio < 4  # nobody asked it to be otherwise
    corpus = TokenCorpus(tmp_path / "out")
    copied = load_text_tokenizer(corpus.text_tokenizer)
    assert corpus.metadata.text_tokenizer == copied.hash == foreign.hash
    assert not copied.single_chinese


@pytest.mark.parametrize("single", [None, True, False])
def test_single_chinese_characters_are_recorded(tmp_path: pathlib.Path, single: bool | None) -> None:
    utterances = [
        dataclasses.replace(u, text="今天天气很好，我们去海边。今天很好。", language="zh") for u in make_utterances(9)
    ]
    num_tokens = 40 if single is False else 90
    inputs = write_inputs(tmp_path, utterances, {u.id: np.arange(num_tokens, dtype=np.int32) for u in utterances})
    tokenize(*inputs, tmp_path / "out", vocabulary_size=340, single_chinese=single)
    trained = load_text_tokenizer(tmp_path / "out" / "text_tokenizer")
    assert trained.single_chinese is (single is not False)
    ids = TokenCorpus(tmp_path / "out").split("train").read(0).text_tokens.tolist()
    spans = any(len(trained.decode([i])) > 1 for i in ids)
    assert spans is not trained.single_chinese
    # Of a tokenizer that was there before, what it says itself counts unless told otherwise.
    for again in (None, True, False):
        tokenize(
            *inputs, tmp_path / str(again), text_tokenizer=str(tmp_path / "out/text_tokenizer"), single_chinese=again
        )
        found = load_text_tokenizer(tmp_path / str(again) / "text_tokenizer").single_chinese
        assert found is (trained.single_chinese if again is None else again)


def test_continuations_are_pairs_of_a_speaker_beside_the_utterances_themselves(
    tmp_path: pathlib.Path, inputs: tuple[pathlib.Path, pathlib.Path]
) -> None:
    tokenize(*inputs, tmp_path / "plain", vocabulary_size=320)
    result = tokenize(*inputs, tmp_path / "corpus", vocabulary_size=320, continuations=True)
    alone, records = (read_all(TokenCorpus(tmp_path / name), "train") for name in ("plain", "corpus"))
    pairs = [record for record in records if "+" in record.id]
    assert [record.id for record in records if "+" not in record.id] == [record.id for record in alone]
    by_id, known = {record.id: record for record in alone}, [r for r in alone if r.speaker != "unknown"]
    assert len(pairs) == result.num_continuations == len(known) - 2  # the first of each of two speakers has none before
    assert result.num_utterances == len(records) - len(pairs) + len(read_all(TokenCorpus(tmp_path / "corpus"), "test"))
    for pair in pairs:
        first, second = (by_id[identity] for identity in pair.id.split("+"))
        of_speaker = [record.id for record in known if record.speaker == pair.speaker]
        assert of_speaker.index(second.id) == of_speaker.index(first.id) + 1
        assert (first.speaker, pair.text) == (second.speaker, f"{first.text} {second.text}")
        for column in ("text_tokens", "speech_tokens"):
            both = [getattr(record, column) for record in (first, second)]
            np.testing.assert_array_equal(getattr(pair, column), np.concatenate(both))
    assert not any("+" in record.id for record in read_all(TokenCorpus(tmp_path / "corpus"), "test"))


def test_no_continuation_is_longer_than_half_a_minute_or_has_two_prefixes(tmp_path: pathlib.Path) -> None:
    utterances = make_utterances(9)
    speech = make_speech(utterances)
    speech["é0"] = np.zeros(740, np.int32)
    inputs = write_inputs(tmp_path, utterances, speech)
    train_text_tokenizer(["something else"] * 3, 290).save(tmp_path / "foreign")
    tokenize(*inputs, tmp_path / "corpus", text_tokenizer=str(tmp_path / "foreign"), continuations=True)
    ids = {record.id for record in read_all(TokenCorpus(tmp_path / "corpus"), "train")}
    assert "é1+é4" in ids
    assert not any(identity.startswith("é0+") for identity in ids)
    with pytest.raises(UserError, match="prefix=speaker out"):
        tokenize(*inputs, tmp_path / "other", prefix="speaker", continuations=True)


def test_prefixes_stand_in_front_of_the_text(tmp_path: pathlib.Path) -> None:
    utterances = [dataclasses.replace(u, split="train") for u in make_utterances(30)]
    utterances[1] = dataclasses.replace(utterances[1], instruct="Speak softly.")
    inputs = write_inputs(tmp_path, utterances, make_speech(utterances))
    prefixes = {"none": "", "instruct": "Speak softly.<|endofprompt|>", "speaker": "Speaker ben<|endofprompt|>"}
    for prefix, front in prefixes.items():
        tokenize(*inputs, tmp_path / prefix, prefix=prefix)
        corpus, texts = TokenCorpus(tmp_path / prefix), texts_of(tmp_path / prefix)
        assert corpus.metadata.prefix == prefix
        assert texts[1] == front + (utterances[1].text or "")
        fronts = {"speaker": ("Speaker anna<|endofprompt|>", "unknown<|endofprompt|>")}.get(prefix, ("", ""))
        assert (texts[0], texts[2]) == (fronts[0] + (utterances[0].text or ""), fronts[1] + (utterances[2].text or ""))
        mark = load_text_tokenizer(corpus.text_tokenizer).special_ids["<|endofprompt|>"]
        assert corpus.split("train").read(1).text_tokens.tolist().count(mark) == (prefix != "none")


def test_texts_are_read_as_synthesis_will_if_asked(tmp_path: pathlib.Path) -> None:
    utterances = [dataclasses.replace(u, text=f"At {20 + u.id.count('1')} miles.") for u in make_utterances(40)]
    inputs = write_inputs(tmp_path, utterances, make_speech(utterances, per_word=10))
    tokenize(*inputs, tmp_path / "plain")
    tokenize(*inputs, tmp_path / "read", normalizer="none")
    assert set(texts_of(tmp_path / "plain")) == {"At 20 miles.", "At 21 miles.", "At 22 miles."}
    assert set(texts_of(tmp_path / "read")) == {"At twenty miles.", "At twenty-one miles.", "At twenty-two miles."}


@pytest.mark.parametrize("foreign", [False, True])
def test_what_is_left_out_is_counted_and_told_once(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], foreign: bool
) -> None:
    utterances = make_utterances(40)
    changes = {
        0: {"text": None},
        1: {"text": " \n"},
        2: {"text": "\t", "speaker": "two words"},
        3: {"text": "Be kind.<|endofprompt|> "},
        4: {"speaker": "ann smith"},
        5: {"text": "Be kind.<|endofprompt|>Hello."},  # behind the speaker, a second prefix
    }
    utterances = [dataclasses.replace(u, **changes.get(i, {})) for i, u in enumerate(utterances)]
    speech = make_speech(utterances, per_word=20)
    del speech["é6"], speech["é7"], speech["é8"]
    speech["é9"] = np.zeros(0, np.int32)
    inputs = write_inputs(tmp_path, utterances, speech)
    with inputs[0].open("a") as file:
        file.write("no json\n" + inputs[0].read_text().splitlines()[9] + "\n")
    options = [f"--text_tokenizer={tmp_path / 'foreign'}"] if foreign else []
    train_text_tokenizer([], 276).save(tmp_path / "foreign")
    words = ["tokenize", inputs[0], f"--speech={inputs[1]}", f"--out={tmp_path / 'out'}", "--prefix=speaker", *options]
    assert run(list(map(str, words))) == 0
    printed = capsys.readouterr()
    assert "left out: 3 without text, 4 without speech, 5 refused" in printed.out
    assert f"{tmp_path / 'out'}: 30 utterances" in printed.out
    told = [line for line in printed.err.splitlines() if line.startswith("tokenize: refused ")]
    assert [line.split()[2] for line in told] == [f"{inputs[0]}:41:", f"{inputs[0]}:42:", "é3:", "é4:", "é5:"]
    kept = {r.id for split in ("train", "test") for r in read_all(TokenCorpus(tmp_path / "out"), split)}
    assert kept == {f"é{i}" for i in range(10, 40)}


def test_what_cannot_be_joined_is_one_line_and_leaves_nothing(
    inputs: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, speech = inputs
    out = tmp_path / "out"
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.jsonl").write_text("\n")
    (tmp_path / "cut.jsonl").write_text(speech.read_text()[:-40])
    (tmp_path / "cut.npz").write_bytes(b"PK")
    lines = speech.read_text().splitlines()
    (tmp_path / "two.jsonl").write_text("\n".join([lines[0], lines[1].replace(TOKENIZER, "ab" * 32)]))
    (tmp_path / "twice.jsonl").write_text("\n".join([*lines, lines[3]]))
    (tmp_path / "others.jsonl").write_text("\n".join(line.replace('"é', '"other') for line in lines))
    (tmp_path / "test.jsonl").write_text("\n".join(line for line in lines if '"é3"' in line))
    cases: list[tuple[list[object], str]] = [
        ([], "expected one MANIFEST, got 0"),
        ([manifest, manifest], "expected one MANIFEST, got 2"),
        ([manifest, "--speech="], "suffix"),
        ([tmp_path / "none.jsonl"], "none.jsonl: no such manifest"),
        ([tmp_path / "blank.jsonl"], "blank.jsonl: holds no utterance"),
        ([speech], "t.jsonl: holds no utterance"),  # the files in each other's place
        ([manifest, f"--speech={manifest}"], "m.jsonl: no whole token file"),
        ([manifest, f"--speech={tmp_path / 'none.jsonl'}"], "none.jsonl: cannot read (No such file"),
        ([manifest, f"--speech={tmp_path / 't.txt'}"], "t.txt: the suffix names the format"),
        ([manifest, f"--speech={tmp_path / 'cut.jsonl'}"], "cut.jsonl: no whole token file (line 60"),
        ([manifest, f"--speech={tmp_path / 'cut.npz'}"], "cut.npz: no whole token file"),
        ([manifest, f"--speech={tmp_path / 'two.jsonl'}"], "two.jsonl: no whole token file (line 2: made by tokenizer"),
        ([manifest, f"--speech={tmp_path / 'twice.jsonl'}"], 'twice.jsonl: no whole token file (id "é3" occurs twice)'),
        ([manifest, f"--speech={tmp_path / 'others.jsonl'}"], "no utterance of split train has both"),
        ([manifest, f"--speech={tmp_path / 'test.jsonl'}"], "59 without speech"),
        ([manifest, f"--speech={tmp_path / 'others.jsonl'}", f"--text_tokenizer={tmp_path / 'q'}"], "none of its 60"),
        ([manifest, "--num_codes=100"], "outside the vocabulary of 100"),
        ([manifest, "--train_split=dev"], "has no split dev to train the text tokenizer on; it has train, test"),
        ([manifest, "--prefix=singer"], "prefix=singer: choose one of none, instruct, speaker"),
        ([manifest, "--normalizer=espeak"], "normalizer 'espeak': expected one of"),
        ([manifest, "--vocabulary_size=275"], "vocabulary_size=275: give at least 276"),
        ([manifest, "--vocabulary_size=276"], "with a larger --vocabulary_size"),
        ([manifest, "--vocabulary_size=many"], "--help"),
        ([manifest, "--vocabulary_size=500", f"--text_tokenizer={tmp_path / 'q'}"], "leave it out with text_tokenizer"),
        ([manifest, f"--text_tokenizer={tmp_path / 'empty'}"], "no tokenizer there"),
        ([manifest, f"--text_tokenizer={tmp_path / 'nowhere'}"], "no tokenizer there"),
        ([manifest, f"--out={tmp_path / 'taken'}"], "taken: exists and is not empty"),
        ([manifest, f"--out={tmp_path / 'file'}"], "file: exists and is not empty"),
        ([manifest, f"--out={tmp_path / 'file' / 'x'}"], "x: cannot write (Not a directory)"),
    ]
    train_text_tokenizer([], 276).save(tmp_path / "q")
    before = sorted(tmp_path.rglob("*"))
    for words, message in cases:
        code = run(["tokenize", f"--speech={speech}", f"--out={out}", *map(str, words)])
        error = capsys.readouterr().err
        assert code == 2, (words, error)
        (line,) = [line for line in error.splitlines() if not line.startswith("tokenize: refused ")]
        assert line.startswith("cv2jax tokenize: "), words
        assert message in line, words
        assert sorted(tmp_path.rglob("*")) == before, words


@pytest.mark.parametrize("missing", ["speech", "out"])
def test_missing_flags(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tokenize", "m.jsonl", "--out=o" if missing == "speech" else "--speech=t.npz"]) == 2
    assert capsys.readouterr().err.startswith(f"cv2jax tokenize: --{missing} is missing: give ")
