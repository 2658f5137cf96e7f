"""Parts of a job: which blocks, whole files, kills, two machines at once, and parts that do not belong together."""

import pathlib
import re

import pytest

from cv2jax.config import UserError
from cv2jax.data.parts import Block, Part, PartSet, PartWriter, choose_block_rows, hash_file, parse_part
from tests.run_record import Killed

FACTS = {"job": "test", "manifest": "m" * 64, "split": None, "batch_seconds": 120.0}
NUM_BLOCKS = 7


def block(number: int, device: str = "cpu × 1") -> Block:
    return Block(payload=f"block {number}\n".encode() * number, counts={"rows": 10, "seconds": 0.5}, device=device)


def make_part(out: pathlib.Path, text: str, facts: dict | None = None, num_blocks: int = NUM_BLOCKS, **options: str):
    writer = PartWriter(out, parse_part(text), facts or FACTS, num_blocks)
    for number in writer.missing():
        writer.add(number, block(number, **options))
    return writer.close()


@pytest.mark.parametrize(
    "text", ["0/3", "4/3", "a/b", "3", "1/0", "-1/3", "1/3/3", "1 / 3", "", "1.5/3", "٣/٣", "1/9999999999"]
)
def test_what_is_no_part_is_one_line(text):
    with pytest.raises(UserError, match=re.escape(f"--part {text}: give i/n with 1 <= i <= n")):
        parse_part(text)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 9])
def test_parts_are_all_blocks_once_and_put_together_they_are_in_order(tmp_path, count):
    parts = [Part(number=number, count=count) for number in range(1, count + 1)]
    assert sorted(b for part in parts for b in part.blocks(NUM_BLOCKS)) == list(range(NUM_BLOCKS))
    for part in reversed(parts):
        counts = make_part(tmp_path / "t.jsonl", str(part))
        assert counts.get("rows", 0) == 10 * len(part.blocks(NUM_BLOCKS))
    found = PartSet(tmp_path / "t.jsonl", {"manifest": FACTS["manifest"]})
    assert list(found) == [block(number).payload for number in range(NUM_BLOCKS)]
    assert found.counts == {"rows": 70, "seconds": 3.5}
    assert found.facts["batch_seconds"] == 120.0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.path("t.jsonl").name for p in parts)


def test_a_kill_costs_the_block_in_the_making(tmp_path, monkeypatch):
    out = tmp_path / "t.jsonl"
    writer = PartWriter(out, parse_part("2/3"), FACTS, NUM_BLOCKS)
    assert writer.missing() == [1, 4]
    writer.add(1, block(1))
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            writer.add(4, block(4))
    assert not out.with_name("t.jsonl.part-2-of-3").exists()
    again = PartWriter(out, parse_part("2/3"), FACTS, NUM_BLOCKS)
    assert again.missing() == [4]
    again.add(4, block(4))
    again.close()
    assert PartWriter(out, parse_part("2/3"), FACTS, NUM_BLOCKS).missing() == []
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl.part-2-of-3"]


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]\n", b'{"facts": {}, "blocks": 3}\n', b"\xff\n"])
def test_damaged_blocks_and_parts_are_made_again(tmp_path, damage, caplog):
    out = tmp_path / "t.jsonl"
    make_part(out, "1/1")
    whole, path = list(PartSet(out, {})), parse_part("1/1").path(out)
    good = path.read_bytes()
    for bytes_ in (damage, good[:-1], good + b"x", good[: len(good) // 2]):
        path.write_bytes(bytes_)
        with pytest.raises(UserError, match=r"part-1-of-1: is damaged; remove it and run that part again"):
            PartSet(out, {})
        make_part(out, "1/1")
        assert list(PartSet(out, {})) == whole
    assert "is damaged or of another manifest, model or options, and is made again" in caplog.text
    path.unlink()
    writer = PartWriter(out, parse_part("1/1"), FACTS, NUM_BLOCKS)
    for number in range(NUM_BLOCKS):
        writer.add(number, block(number))
    (path.with_name(f"{path.name}.blocks") / "000003").write_bytes(damage)
    assert writer.missing() == [3]
    with pytest.raises(UserError, match="lost blocks that were finished; give the same command again"):
        writer.close()


def test_a_flipped_byte_is_named(tmp_path):
    out = tmp_path / "t.jsonl"
    make_part(out, "1/1")
    path = parse_part("1/1").path(out)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"part-1-of-1: is damaged"):
        list(PartSet(out, {}))


@pytest.mark.parametrize(("name", "value"), [("manifest", "n" * 64), ("split", "test"), ("batch_seconds", 60.0)])
def test_other_facts_make_it_again_and_do_not_mix(tmp_path, name, value):
    out = tmp_path / "t.jsonl"
    for text in ("1/2", "2/2"):
        make_part(out, text)
    make_part(out, "2/2", FACTS | {name: value})
    line = f"part-2-of-2: is of {name}={str(value)[:12]}, .*part-1-of-2 of {str(FACTS[name])[:12]}; give every part"
    with pytest.raises(UserError, match=line):
        PartSet(out, {})
    with pytest.raises(UserError, match=f"part-1-of-2: is of {name}=.*, this command of {str(value)[:12]}"):
        PartSet(out, {name: value})
    assert PartWriter(out, parse_part("2/2"), FACTS, NUM_BLOCKS).missing() == [1, 3, 5]


def test_missing_parts_and_several_divisions_are_named(tmp_path):
    out = tmp_path / "t.jsonl"
    with pytest.raises(UserError, match=r"t.jsonl: no part lies beside it; run the same command with --part"):
        PartSet(out, {})
    with pytest.raises(UserError, match="no part lies beside it"):
        PartSet(tmp_path / "none" / "t.jsonl", {})
    make_part(out, "2/12")
    with pytest.raises(UserError, match=r"11 of 12 parts are missing or not finished: 1/12, 3/12, .*9/12, …; run them"):
        PartSet(out, {})
    make_part(out, "1/3")
    with pytest.raises(UserError, match="parts of 3 and 12 lie beside it; remove those that are not meant"):
        PartSet(out, {})


def test_a_part_under_another_name_is_refused(tmp_path):
    out = tmp_path / "t.jsonl"
    make_part(out, "1/2", num_blocks=2)
    parse_part("1/2").path(out).rename(parse_part("2/2").path(out))
    make_part(out, "1/2", num_blocks=2)
    with pytest.raises(UserError, match="part-2-of-2: is of part=1"):
        PartSet(out, {})


def test_parts_of_different_devices_are_a_warning(tmp_path, caplog):
    out = tmp_path / "t.jsonl"
    make_part(out, "1/2", device="TPU v5e × 4")
    make_part(out, "2/2")
    PartSet(out, {})
    assert "made on TPU v5e × 4, cpu × 1, which round differently" in caplog.text


def test_two_machines_on_one_part_do_no_harm(tmp_path):
    out = tmp_path / "t.jsonl"
    fast, slow = (PartWriter(out, parse_part("1/1"), FACTS, NUM_BLOCKS) for _ in range(2))
    for number in slow.missing():
        slow.add(number, block(number))
        fast.add(number, block(number))
    expected = fast.close()
    assert slow.complete()
    assert slow.close() == expected  # its blocks are gone, the part is there
    slow.add(6, block(6))  # it was at work when the other finished
    assert slow.close() == expected
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl.part-1-of-1"]
    assert len(list(PartSet(out, {}))) == NUM_BLOCKS


def test_a_full_disk_is_one_line_and_keeps_finished_blocks(tmp_path, monkeypatch):
    import errno
    import os

    out = tmp_path / "t.jsonl"
    writer = PartWriter(out, parse_part("1/1"), FACTS, 2)
    writer.add(0, block(0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(
            UserError, match=r"part-1-of-1: cannot write \(No space left on device\); make room and give"
        ):
            writer.add(1, block(1))
    assert not list(tmp_path.rglob("*.tmp"))
    assert writer.missing() == [1]


def test_a_manifest_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"m.jsonl: cannot read \(No such file"):
        hash_file(tmp_path / "m.jsonl")


@pytest.mark.parametrize(
    ("given", "batch_seconds", "rows"),
    [
        (0, 120.0, 1024),
        (0, 1.0, 1024),
        (0, 960.0, 8192),
        (7, 960.0, 7),
        (0, float("nan"), 1024),
        (0, float("inf"), 1024),
    ],
)
def test_blocks_grow_with_the_batches(given, batch_seconds, rows):
    assert choose_block_rows(given, batch_seconds) == rows
