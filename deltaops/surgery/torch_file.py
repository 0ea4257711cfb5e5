"""Read a state dict that ``torch.save`` wrote, without unpickling it.

Such a file is a zip: ``data.pkl`` says which tensors there are, ``data/0``, ``data/1``, … hold
their bytes. Opening a pickle runs whatever it names. Here its opcodes are only looked at: strings,
numbers, tuples and dicts are put together, the few names that a state dict consists of are known
by their spelling, and anything else is refused. Nothing is imported or called.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaops.errors import CheckpointError

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Name(NamedTuple):
    """A name in the pickle, which stands for itself."""

    module: str
    name: str


class _Storage(NamedTuple):
    """Elements of the file, as a tensor ``[numel]``."""

    elements: Tensor


_MARK = object()


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, on the CPU, each with memory of its own.

    Raises: CheckpointError for a file that is damaged, of an older format, or holds anything beside
        tensors by name.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            found = _Reader(archive).read()
    except _Refused as error:
        raise CheckpointError(
            f"{path}: {error}. deltaops reads state dicts of tensors and runs no pickle: in an "
            "environment that you trust it with, load it and save it with safetensors."
        ) from error
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, IndexError, TypeError) as error:
        # the last three: opcodes that end too early, or in an order that no pickler writes
        raise CheckpointError(
            f"{path} is damaged, or not a file of torch.save since torch 1.6: {error!r}. Copy or "
            "save it again."
        ) from error
    return found


class _Refused(Exception):
    """What the file holds and a state dict does not."""


class _Reader:
    """A machine that runs the opcodes of a state dict, and no others."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        heads = [n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl"]
        if len(heads) != 1:
            raise _Refused(f"it has {len(heads)} files called data.pkl, expected one")
        self.prefix = heads[0].removesuffix("data.pkl")
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def read(self) -> dict[str, Tensor]:
        order = self.prefix + "byteorder"
        if order in self.archive.namelist() and self._bytes("byteorder") != b"little":
            raise _Refused("its numbers are big-endian")
        for opcode, argument, _ in pickletools.genops(self._bytes("data.pkl")):
            self._step(opcode.name, argument)
        found = self.stack.pop()
        if not isinstance(found, dict):
            raise _Refused(f"it holds a {type(found).__name__}, expected tensors by name")
        for key, value in found.items():
            if not isinstance(key, str) or not isinstance(value, Tensor):
                raise _Refused(f"{key!r} is a {type(value).__name__}, expected a tensor")
        return found

    def _bytes(self, name: str) -> bytes:
        entry = self.archive.getinfo(self.prefix + name)
        if entry.compress_type != zipfile.ZIP_STORED:  # torch never does, and a bomb would
            raise _Refused(f"{name} is compressed")
        return self.archive.read(entry)

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "GLOBAL":
            stack.append(_Name(*argument.split(" ")))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "TUPLE":
            stack.append(tuple(self._to_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("SETITEM", "SETITEMS"):
            items = self._to_mark() if name == "SETITEMS" else [stack.pop() for _ in "kv"][::-1]
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_rebuilt(stack.pop(), arguments))
        elif name == "BUILD":
            stack.pop()  # a state dict's _metadata: versions of modules
        elif name not in ("PROTO", "STOP"):
            raise _Refused(f"its pickle has the opcode {name}")

    def _to_mark(self) -> list[Any]:
        start = max(i for i, value in enumerate(self.stack) if value is _MARK)
        found = self.stack[start + 1 :]
        del self.stack[start:]
        return found

    def _storage(self, found: Any) -> _Storage:
        kind, name, key, _place, count = found
        dtype = _DTYPES.get(name.name) if isinstance(name, _Name) else None
        if kind != "storage" or dtype is None or not isinstance(key, str):
            raise _Refused(f"its pickle refers to {found!r}")
        if key not in self.storages:
            raw = bytearray(self._bytes(f"data/{key}"))
            if len(raw) != count * dtype.itemsize:
                raise _Refused(f"data/{key} has {len(raw)} bytes, expected {count} of {dtype}")
            empty = torch.empty(0, dtype=dtype)
            self.storages[key] = _Storage(torch.frombuffer(raw, dtype=dtype) if raw else empty)
        return self.storages[key]


def _rebuilt(function: Any, arguments: tuple[Any, ...]) -> Any:
    """What ``function(*arguments)`` would be, for the three functions of a state dict."""
    if function == _Name("collections", "OrderedDict") and not arguments:
        return {}
    if function == _Name("torch._utils", "_rebuild_parameter"):
        return arguments[0]
    if function != _Name("torch._utils", "_rebuild_tensor_v2"):
        raise _Refused(f"its pickle calls {function!r}")
    storage, offset, size, stride = arguments[:4]
    sizes = (offset, *size, *stride)
    if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in sizes):
        raise _Refused(f"a tensor of size {size!r}, stride {stride!r}, offset {offset!r}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.elements.numel():
        raise _Refused(f"a tensor of size {size!r} reaches beyond its bytes")
    return torch.as_strided(storage.elements, size, stride, offset).clone()


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
}
_LITERALS = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "BINFLOAT"})
