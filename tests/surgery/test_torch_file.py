"""State dicts of ``torch.save`` read without unpickling; whatever else they hold is refused."""

from __future__ import annotations

import os
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deltaops.errors import CheckpointError
from deltaops.surgery.torch_file import read_torch_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.bin"


def test_a_state_dict_comes_back_by_its_bits(path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))  # an int64 counter among it
    torch.save(model.state_dict(), path)
    found = read_torch_file(path)
    assert list(found) == list(model.state_dict())
    assert all(torch.equal(found[k], v) for k, v in model.state_dict().items())


def test_strides_views_parameters_and_dtypes(path: Path) -> None:
    base = torch.randn(6, 5)
    saved = {
        "turned": base.t()[1:3],
        "same storage": base,
        "parameter": nn.Parameter(torch.randn(2)),
        "empty": torch.empty(0, 3),
        "number": torch.tensor(1.5, dtype=torch.float64),
        "half": base.half(),
        "bf16": base.bfloat16(),
        "flags": base > 0,
        "bytes": torch.arange(7, dtype=torch.uint8),
    }
    torch.save(saved, path)
    found = read_torch_file(path)
    assert found.keys() == saved.keys()
    for key, tensor in saved.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)
    found["turned"].zero_()
    assert torch.equal(found["same storage"], base)


class Harmful:
    """What unpickling it would do is leave a file."""

    def __init__(self, left: Path) -> None:
        self.left = left

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.left),)


def test_code_is_refused_and_never_run(path: Path) -> None:
    left = path.parent / "left"
    torch.save({"a": torch.ones(2), "b": Harmful(left)}, path)
    with pytest.raises(CheckpointError, match=r"calls.*mkdir"):
        read_torch_file(path)
    assert not left.exists()
    torch.load(path, weights_only=False)  # it is what it seems
    assert left.exists()


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (nn.Linear(2, 2), "opcode|calls"),
        ({"a": 1}, "is a int, expected a tensor"),
        ({1: torch.ones(1)}, "a key is a int, expected names"),
        (torch.ones(2), "it holds a Tensor"),
    ],
    ids=["module", "number", "key", "tensor"],
)
def test_what_is_no_state_dict_is_refused(value: object, why: str, path: Path) -> None:
    torch.save(value, path)
    with pytest.raises(CheckpointError, match=why):
        read_torch_file(path)


def rewritten(path: Path, change: Any) -> None:
    """The same archive with its files changed by name."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, change(name.rpartition("/")[2], data))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda n, d: d[:-4] if n == "0" else d, "has 12 bytes, expected 4"),
        (lambda n, d: b"big" if n == "byteorder" else d, "big-endian"),
        (lambda n, d: d[:40] if n == "data.pkl" else d, "damaged"),
        (lambda n, d: d.replace(b"K\x02\x85", b"K\x09\x85") if n == "data.pkl" else d, ""),
    ],
    ids=["short", "big-endian", "cut", "changed"],
)
def test_damage_is_told(change: Any, why: str, path: Path) -> None:
    torch.save({"a": torch.ones(2, 2)}, path)
    if why:
        rewritten(path, change)
        with pytest.raises(CheckpointError, match=why):
            read_torch_file(path)
        return
    torch.save({"a": torch.ones(2)}, path)
    rewritten(path, change)
    with pytest.raises(CheckpointError, match="reaches beyond its bytes"):
        read_torch_file(path)


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def tensor(size: tuple[int, ...], stride: tuple[int, ...], elements: int = 1) -> bytes:
    """As a pickle spells it."""
    kind = b"ctorch\nFloatStorage\n"
    storage = tuple_of(text("storage"), kind, text("0"), text("cpu"), number(elements)) + b"Q"
    shape = [tuple_of(*map(number, numbers)) for numbers in (size, stride)]
    arguments = tuple_of(storage, number(0), *shape, b"\x89", b"N")
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def archive(path: Path, pickle: bytes, elements: int = 1) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}" + pickle + b".")
        file.writestr("archive/data/0", bytes(4 * elements))
    return path


DOUBLED = b")q\0" + b"h\0h\0\x86q\0" * 60
"""A tuple of two tuples of two tuples …: 2⁶⁰ of them to hash or to write."""


@pytest.mark.parametrize(
    ("pickle", "why"),
    [
        (b")" + b"\x85" * 100_000 + number(1) + b"s", "nests tuples"),
        (DOUBLED + number(1) + b"s", "nests tuples"),
        (text("a") + tuple_of(text("no"), DOUBLED) + b"Qs", "nests tuples"),
        (tuple_of(*[number(1)] * 65) + number(1) + b"s", "a tuple of 65"),
        (tensor((1,), (1,)) + tensor((1,), (1,)) + b"s", "a key is a Tensor"),
        (number(1) + text("a") + text("b") + b"s", "items into a int"),
        (text("a") + b"cos\n" + b"x" * 100_000 + b"\n)Rs", "calls 'os.x{77}…'"),
        (text("\ud800") + tensor((1,), (1,)) + b"s", "half a character"),
        (b"N0" * 3, "opcode POP"),
    ],
    ids=["deep", "doubled", "told", "long", "key", "target", "name", "surrogate", "pop"],
)
def test_what_would_hang_or_kill_a_reader_is_refused(pickle: bytes, why: str, path: Path) -> None:
    with pytest.raises(CheckpointError, match=why) as found:
        read_torch_file(archive(path, pickle))
    assert len(str(found.value)) < 600


@pytest.mark.parametrize(
    ("size", "stride", "why"),
    [
        ((3_000_000, 400), (0, 0), "reaches beyond"),
        ((2,), (0,), "same element"),
        ((50, 50), (1, 1), "reaches beyond"),
        ((0, -1), (1, 1), "negative"),
    ],
)
def test_a_tensor_is_not_larger_than_its_bytes(
    size: tuple[int, ...], stride: tuple[int, ...], why: str, path: Path
) -> None:
    pickle = text("a") + tensor(size, stride, 100) + b"s"
    with pytest.raises(CheckpointError, match=why):
        read_torch_file(archive(path, pickle, 100))


def test_a_pickle_without_end_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaops.surgery.torch_file._OPCODES", 1000)
    with pytest.raises(CheckpointError, match="more than 1000 opcodes"):
        read_torch_file(archive(path, b"N" * 1001))


def test_copies_are_bounded_by_the_file_and_tied_weights_are_read(path: Path) -> None:
    weight = torch.randn(50, 40)
    torch.save({name: weight for name in "abcd"}, path)
    assert all(torch.equal(tensor, weight) for tensor in read_torch_file(path).values())
    torch.save({f"{i}": weight for i in range(100)}, path)
    with pytest.raises(CheckpointError, match="more than 4 times as large"):
        read_torch_file(path)


def test_changed_bytes_end_in_our_error_or_in_tensors(path: Path) -> None:
    torch.save({"a": torch.ones(2, 3)}, path)
    whole, draw = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(2000):
        raw = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        path.write_bytes(raw)
        try:
            found = read_torch_file(path)
        except CheckpointError:
            refused += 1
        else:
            assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())
    assert refused > 200


def test_no_archive_at_all(path: Path) -> None:
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"since torch 1\.6"):
        read_torch_file(path)
    with pytest.raises(CheckpointError, match="No such file"):
        read_torch_file(path.parent / "nothing.bin")
