"""`.pt` files: what torch writes we read, what we write torch reads, and code in one is refused, never run."""

import collections
import io
import os
import pickle
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.convert import torch_file
from cv2jax.convert.rules import ForeignTensor
from cv2jax.convert.torch_file import TorchReader, load_values, write_state_dict

pytestmark = pytest.mark.official
torch = pytest.importorskip("torch")


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"table": (6, 5), "scalar": (), "conv.weight": (3, 1, 4), "empty": (0, 3), "alpha": (7,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(path, values, tied=types.MappingProxyType({})):
    tensors = {name: ForeignTensor(shape=a.shape, read=lambda a=a: a) for name, a in values.items()}
    write_state_dict(path, tensors, tied)


@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_written_torch_reads(tmp_path, mapped):
    values = arrays()
    write(tmp_path / "model.pt", values, {"head": "table"})
    loaded = torch.load(tmp_path / "model.pt", weights_only=True, mmap=mapped)
    assert type(loaded) is collections.OrderedDict
    assert list(loaded) == ["table", "head", "scalar", "conv.weight", "empty", "alpha"]
    for name, array in values.items():
        assert loaded[name].dtype == torch.float32
        assert loaded[name].is_contiguous()
        np.testing.assert_array_equal(loaded[name].numpy(), array)
    assert loaded["head"].untyped_storage().data_ptr() == loaded["table"].untyped_storage().data_ptr()
    assert not loaded["table"].requires_grad


def test_the_zip_is_sound_and_its_tensors_are_aligned(tmp_path):
    write(tmp_path / "model.pt", arrays())
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        assert archive.testzip() is None  # all checksums
        for entry in archive.infolist():
            assert entry.compress_type == zipfile.ZIP_STORED
            archive.fp.seek(entry.header_offset + 26)
            lengths = np.frombuffer(archive.fp.read(4), "<u2")
            assert (entry.header_offset + 30 + int(lengths.sum())) % 64 == 0
    write(tmp_path / "again.pt", arrays())
    names = zipfile.ZipFile(tmp_path / "again.pt").namelist()
    assert [n.partition("/")[0] for n in names] == ["again"] * len(names)
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "model.pt", arrays())
    assert (tmp_path / "other" / "model.pt").read_bytes() == (tmp_path / "model.pt").read_bytes()


def test_what_torch_writes_is_read_in_blocks(tmp_path):
    values = arrays()
    theirs = {name: torch.from_numpy(a) for name, a in values.items()} | {"half": torch.ones(2, 3, dtype=torch.float16)}
    theirs["brain"] = torch.arange(4.0).bfloat16()
    theirs["turned"] = torch.from_numpy(values["table"]).T
    theirs["trained"] = torch.nn.Parameter(torch.ones(2))
    torch.save(theirs, tmp_path / "model.pt")
    reader = TorchReader(tmp_path / "model.pt")
    assert reader.place == str(tmp_path / "model.pt")
    assert reader.names()["table"] == ((6, 5), np.float32)
    assert reader.names()["half"] == ((2, 3), np.float16)
    assert reader.names()["brain"] == ((4,), ml_dtypes.bfloat16)
    np.testing.assert_array_equal(reader.read("table", (slice(1, 3), slice(0, 5))), values["table"][1:3])
    np.testing.assert_array_equal(reader.read("turned", (slice(0, 5), slice(2, 4))), values["table"].T[:, 2:4])
    np.testing.assert_array_equal(reader.read("brain", (slice(1, 4),)).astype(np.float32), [1, 2, 3])
    assert reader.read("scalar", ()) == values["scalar"]
    assert reader.names()["trained"] == ((2,), np.float32)


def test_counters_of_a_training_are_left_out_with_a_line(tmp_path, caplog):
    torch.save({"w": torch.ones(2), "epoch": 3, "step": torch.tensor(4000)}, tmp_path / "model.pt")
    with caplog.at_level("INFO"):
        assert list(TorchReader(tmp_path / "model.pt").names()) == ["w"]
    assert "epoch 3, step 4000" in caplog.text


def test_the_file_is_mapped_anew_before_all_of_it_is_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "_MAPPED_BYTES", 100)
    loads = []
    load = torch_file.load_values
    monkeypatch.setattr(torch_file, "load_values", lambda path: loads.append(path) or load(path))
    torch.save({f"w{i}": torch.full((5, 4), float(i)) for i in range(6)}, tmp_path / "model.pt")
    reader = TorchReader(tmp_path / "model.pt")
    values = [reader.read(f"w{i}", (slice(0, 5), slice(0, 4))) for i in range(6)]
    assert len(loads) == 1 + 2  # 80 bytes each: before the third and the fifth
    for i, array in enumerate(values):  # of maps that the reader has let go
        np.testing.assert_array_equal(array, np.full((5, 4), float(i)))


def test_tied_tensors_are_known_by_place_or_by_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "_MAPPED_BYTES", 32)  # two rows at a time
    table = torch.arange(12.0).reshape(3, 4)
    off = table.clone()
    off[2, 3] += 1
    torch.save(
        {"table": table, "tied": table, "copy": table.clone(), "off": off, "flat": table.flatten()}, tmp_path / "a.pt"
    )
    reader = TorchReader(tmp_path / "a.pt")
    same = {name: reader.same_bytes("table", name) for name in reader.names()}
    assert same == {"table": True, "tied": True, "copy": True, "off": False, "flat": False}


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def evil_zip(path, marker):
    torch.save({"w": torch.ones(2), "evil": Evil(f"touch {marker}")}, path)


def evil_zip_by_hand(path, marker):
    """As `evil_zip`, and what the pickle names is no function but a builtin with a method."""
    data = io.BytesIO()
    pickle.Pickler(data, 2).dump({"w": Evil(f"touch {marker}")})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", data.getvalue())
        archive.writestr("a/version", "3\n")


def evil_legacy(path, marker):
    torch.save({"evil": Evil(f"touch {marker}")}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (evil_zip, r"names code \((posix|os)\.system\), and was refused; nothing of it was run"),
        (evil_zip_by_hand, r"names code \((posix|os)\.system\), and was refused"),
        (evil_legacy, r"is no file of torch\.save \(1\.6 or newer\)"),
    ],
)
def test_code_in_a_file_is_refused_and_never_run(tmp_path, make, message):
    path, marker = tmp_path / "model.pt", tmp_path / "ran"
    make(path, marker)
    with pytest.raises(UserError, match=message) as caught:
        TorchReader(path)
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    with pytest.raises(UserError, match=message):
        load_values(path)
    assert not marker.exists()
    if make is not evil_legacy:  # the trap does work
        torch.load(path, weights_only=False) if make is evil_zip else pickle.loads(
            zipfile.ZipFile(path).read("a/data.pkl")
        )
        assert marker.exists()


def test_files_that_are_none_are_one_line(tmp_path):
    whole = tmp_path / "whole.pt"
    torch.save({"w": torch.arange(500.0)}, whole)
    data = whole.read_bytes()
    for name, content, message in (
        ("cut", data[: len(data) // 2], "is cut short; copy it again"),
        ("start", data[:3], "is no file of torch.save"),
        ("empty", b"", "is no file of torch.save"),
        ("text", b"hello", "is no file of torch.save"),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\n", "is only git's pointer .*`git lfs pull`"),
        ("hole", data[:200] + bytes(40) + data[240:], "cannot be read|no plain tensor|refused|is cut short"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{tmp_path / name}: .*({message})") as caught:
            TorchReader(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"gone\.pt: there is no such file"):
        TorchReader(tmp_path / "gone.pt")


def test_a_path_that_is_no_utf8_is_no_damage(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.pt")
    try:
        path.write_bytes(b"")
    except OSError:
        pytest.skip("a file system of UTF-8 names alone")
    with pytest.raises(UserError, match="torch takes no path with bytes that are not UTF-8; rename it"):
        load_values(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([torch.ones(2)], "holds a list; give a state dict"),
        ({3: torch.ones(2)}, "give a state dict"),
        ({}, "holds no tensors"),
        ({"epoch": 1}, "holds no tensors"),
        ({"w": torch.ones(2), "note": "text"}, "note is a str and no plain tensor"),
        ({"w": torch.ones(2, dtype=torch.float64)}, "w is float64; give weights in fp32, bf16 or fp16"),
        ({"w": torch.ones(2, dtype=torch.int64)}, "w is int64; give weights"),
        ({"w": torch.eye(2).to_sparse()}, "w is a Tensor and no plain tensor"),
        ({"net": {"w": 2}}, "net is a dict and no plain tensor"),
        (
            {"state_dict": {"w": torch.ones(2)}, "epoch": 3},
            "its tensors lie under the key 'state_dict'; save what is there",
        ),
    ],
)
def test_other_contents_are_one_line(tmp_path, values, message):
    torch.save(values, tmp_path / "model.pt")
    with pytest.raises(UserError, match=message) as caught:
        TorchReader(tmp_path / "model.pt")
    assert str(tmp_path / "model.pt") in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_goes_neither_in_nor_out(tmp_path, bad):
    values = np.ones((4, 3), np.float32)
    values[2, 1] = bad
    torch.save({"w": torch.from_numpy(values)}, tmp_path / "model.pt")
    reader = TorchReader(tmp_path / "model.pt")
    np.testing.assert_array_equal(reader.read("w", (slice(0, 2), slice(0, 3))), values[:2])
    with pytest.raises(UserError, match=r"model\.pt: w has values that are not finite"):
        reader.read("w", (slice(0, 4), slice(0, 3)))
    with pytest.raises(UserError, match=r"out\.pt: w has values that are not finite; nothing was written"):
        write(tmp_path / "out.pt", {"w": values})
