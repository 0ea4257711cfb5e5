"""State dicts of ``torch.save`` read without unpickling; whatever else they hold is refused."""

from __future__ import annotations

import os
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
        ({1: torch.ones(1)}, "1 is a Tensor, expected"),
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


def test_no_archive_at_all(path: Path) -> None:
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"since torch 1\.6"):
        read_torch_file(path)
    with pytest.raises(CheckpointError, match="No such file"):
        read_torch_file(path.parent / "nothing.bin")
