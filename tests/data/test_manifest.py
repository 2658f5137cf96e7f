import json

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.data.manifest import Utterance, read_manifest, scan_manifest, write_manifest
from tests.data.speech_files import write_lines

GOOD = {"id": "a", "audio": "a.wav", "text": "A", "speaker": "s", "language": "en", "split": "train"}


def test_round_trip_keeps_every_field(tmp_path):
    utterances = [
        Utterance(
            id="é", audio="x.tar::é.mp3", text="你好", speaker="1", language="zh", split="train", instruct="softly"
        ),
        Utterance(id="b", audio="/b.wav", text=None, speaker="2", language="en", split="test"),
    ]
    assert write_manifest(tmp_path / "new/m.jsonl", utterances) == 2
    assert list(read_manifest(tmp_path / "new/m.jsonl")) == utterances
    assert "instruct" not in json.loads((tmp_path / "new/m.jsonl").read_text().splitlines()[1])


def test_a_failing_source_leaves_no_manifest(tmp_path):
    def broken():
        yield Utterance(**GOOD)
        raise UserError("broken")

    with pytest.raises(UserError, match="broken"):
        write_manifest(tmp_path / "m.jsonl", broken())
    assert not list(tmp_path.iterdir())


def test_text_that_no_file_can_hold_is_not_written(tmp_path):
    with pytest.raises(UserError, match=r"utterance 'a': text holds half of a surrogate pair"):
        write_manifest(tmp_path / "m.jsonl", [Utterance(**GOOD | {"text": "\ud83d"})])
    assert not list(tmp_path.iterdir())


def test_scan_finds_lines_across_blanks_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = [json.dumps({**GOOD, "id": name, "split": split, "extra": [1]}) for name, split in ("ax", "by", "cx")]
    path.write_bytes(b"\xef\xbb\xbf" + f"{lines[0]}\n\n{lines[1]}\r\n  \n{lines[2]}".encode())
    scan = scan_manifest(path)
    assert scan.splits == ("x", "y")
    assert scan.line.tolist() == [1, 3, 5]
    assert scan.rows("x").tolist() == [0, 2]
    assert not scan.refused
    assert [utterance.id for utterance in read_manifest(path)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{oops", "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ({key: GOOD[key] for key in GOOD if key != "speaker"}, 'field "speaker" is missing'),
        ({key: GOOD[key] for key in GOOD if key != "text"}, 'field "text" is missing'),
        ({**GOOD, "id": 7}, 'field "id" must be a string, is 7'),
        ({**GOOD, "audio": None}, 'field "audio" must be a string, is null'),
        ({**GOOD, "text": ["A"]}, 'field "text" must be a string or null'),
        ({**GOOD, "instruct": 1}, 'field "instruct" must be a string or null'),
        ({**GOOD, "split": ""}, 'field "split" is empty'),
        ({**GOOD, "split": "../up"}, "names files"),
        *(
            (json.dumps({**GOOD, "id": "c", field: "x\ud83d"}), f'field "{field}" holds half of a surrogate pair')
            for field in (*GOOD, "instruct")
        ),
        ('{"id": ' + 100_000 * "[", "nested too deep"),
        (GOOD, r'duplicate id "a" \(first on line 1\)'),
    ],
)
def test_bad_lines_are_named_and_refused(tmp_path, line, reason):
    path = write_lines(tmp_path / "m.jsonl", [GOOD, {**GOOD, "id": "b"}, line])
    with pytest.raises(UserError, match=rf"m.jsonl:3: .*{reason}"):
        scan_manifest(path, strict=True)
    with pytest.raises(UserError, match=r"m.jsonl:3: "):
        list(read_manifest(path))
    scan = scan_manifest(path)
    assert scan.line.tolist() == [1, 2]
    assert [refusal.line for refusal in scan.refused] == [3]


def test_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"id": "\xff"}\n')
    assert scan_manifest(path).refused[0].reason == "not UTF-8 text"


def test_duplicates_keep_the_first_even_where_digests_collide(tmp_path, monkeypatch):
    class Weak:
        def __init__(self, data, digest_size):
            self.data, self.size = data, digest_size

        def digest(self):
            return bytes([self.data[0] % 2]) + bytes(self.size - 1)

    monkeypatch.setattr("cv2jax.data.manifest.hashlib.blake2b", Weak)
    path = write_lines(tmp_path / "m.jsonl", [{**GOOD, "id": name} for name in "abcabd"])
    scan = scan_manifest(path)
    assert scan.line.tolist() == [1, 2, 3, 6]
    assert [(refusal.line, refusal.id) for refusal in scan.refused] == [(4, "a"), (5, "b")]


def test_files_without_utterances_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such manifest"):
        scan_manifest(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no utterance"):
        scan_manifest(write_lines(tmp_path / "m.jsonl", [""]))
    with pytest.raises(UserError, match="first bad line: 1: not JSON"):
        scan_manifest(write_lines(tmp_path / "m.jsonl", ["x"] * 4))
    monkeypatch.setattr("cv2jax.data.manifest._MAX_BAD_LINES", 2)
    with pytest.raises(UserError, match="over 2 bad lines"):
        scan_manifest(write_lines(tmp_path / "m.jsonl", ["x"] * 4))


def test_columns_are_arrays_not_lists(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", [{**GOOD, "id": str(i)} for i in range(300)])
    scan = scan_manifest(path)
    assert sum(column.nbytes for column in (scan.offset, scan.line, scan.split)) == 300 * 14
    assert np.all(np.diff(scan.offset.astype(np.int64)) > 0)
