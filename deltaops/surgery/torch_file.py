"""Read a state dict that ``torch.save`` wrote, without unpickling it.

Such a file is a zip: ``data.pkl`` says which tensors there are, ``data/0``, ``data/1``, … hold
their bytes. Opening a pickle runs whatever it names. Here its opcodes are only looked at: strings,
numbers, tuples and dicts are put together, the few names that a state dict consists of are known
by their spelling, and anything else is refused. Nothing is imported or called.

A file may have been made to harm its reader. So only strings are hashed and only names are spelled
out in messages, tuples nest as far as a tensor's arguments do, and what is made of a file is
bounded by its size.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
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


_OPCODES = 2_000_000
"""At most; a tensor takes about 30."""
_ITEMS = 64
"""Of a tuple, at most: torch's limit of dimensions."""
_COPIES = 4
"""Bytes of all tensors over those of the file, at most: T5's embeddings have four names."""
_LARGEST = 2**48
"""Number in a shape; torch's own arithmetic of 64 bits stays far from its end."""
_DAMAGE = (
    OSError, zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, struct.error, MemoryError,
    # an archive of a kind that zipfile does not read, or says so of damage
    RuntimeError, NotImplementedError,
    # opcodes that end too early, or in an order that no pickler writes
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
)  # fmt: skip


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, on the CPU, each with memory of its own.

    Raises: CheckpointError for a file that is damaged, of an older format, or holds anything beside
        tensors by name.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            return _Reader(archive, path.stat().st_size).read()
    except _Refused as error:
        raise CheckpointError(
            f"{path}: {error}. deltaops reads state dicts of tensors and runs no pickle: in an "
            "environment that you trust it with, load it and save it with safetensors."
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path} is damaged, or not a file of torch.save since torch 1.6: "
            f"{type(error).__name__} {_spelled(str(error), 200)}. Copy or save it again."
        ) from error


class _Refused(Exception):
    """What the file holds and a state dict does not."""


class _Reader:
    """A machine that runs the opcodes of a state dict, and no others."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        """Read ``archive``, a file of ``size`` bytes."""
        self.archive = archive
        self.unread = size
        """Bytes that the files in it can still have; two may name the same ones."""
        self.uncopied = _COPIES * size
        heads = [n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl"]
        if len(heads) != 1:
            raise _Refused(f"it has {len(heads)} files called data.pkl, expected one")
        self.prefix = heads[0].removesuffix("data.pkl")
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def read(self) -> dict[str, Tensor]:
        order = self.prefix + "byteorder"
        if order in self.archive.namelist() and self._bytes("byteorder") != b"little":
            raise _Refused("its numbers are big-endian")
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self._bytes("data.pkl"))):
            if count == _OPCODES:
                raise _Refused(f"its pickle has more than {_OPCODES} opcodes")
            self._step(opcode.name, argument)
        found = self.stack.pop()
        if not isinstance(found, dict):
            raise _Refused(f"it holds a {type(found).__name__}, expected tensors by name")
        for key, value in found.items():
            if not isinstance(value, Tensor):
                raise _Refused(f"{_spelled(key)} is a {type(value).__name__}, expected a tensor")
            if any("\ud800" <= letter <= "\udfff" for letter in key):
                raise _Refused(f"{_spelled(key)} is no text: it has half a character")
        return {key: self._copied(value) for key, value in found.items()}

    def _copied(self, tensor: Tensor) -> Tensor:
        """With memory of its own, also where two names mean the same tensor."""
        self.uncopied -= tensor.numel() * tensor.element_size()
        if self.uncopied < 0:
            raise _Refused(f"its tensors are more than {_COPIES} times as large as the file")
        return tensor.clone()

    def _bytes(self, name: str) -> bytes:
        entry = self.archive.getinfo(self.prefix + name)
        if entry.compress_type != zipfile.ZIP_STORED:  # torch never does, and a bomb would
            raise _Refused(f"{_spelled(name)} is compressed")
        self.unread -= max(entry.file_size, entry.compress_size)
        if self.unread < 0:
            raise _Refused(f"{_spelled(name)} and those before it are larger than the file")
        return self.archive.read(entry)

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name == "MARK":
            self.marks.append(len(stack))
        elif name in _CONSTANTS:
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
            stack.append(_tuple(self._to_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [_tuple(stack[-count:])]
        elif name in ("SETITEM", "SETITEMS"):
            items = self._to_mark() if name == "SETITEMS" else [stack.pop() for _ in "kv"][::-1]
            _fill(stack[-1], items)
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(self._rebuilt(stack.pop(), arguments))
        elif name == "BUILD":
            stack.pop()  # a state dict's _metadata: versions of modules
        elif name not in ("PROTO", "STOP"):
            raise _Refused(f"its pickle has the opcode {name}")

    def _to_mark(self) -> list[Any]:
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def _storage(self, found: Any) -> _Storage:
        if type(found) is not tuple or len(found) != 5:
            raise _Refused(f"its pickle refers to a {type(found).__name__}")
        kind, name, key, _place, count = found
        dtype = _DTYPES.get(name.name) if isinstance(name, _Name) else None
        if type(kind) is not str or kind != "storage" or dtype is None:
            raise _Refused(f"its pickle refers to {_spelled(name)}, expected a storage")
        if type(key) is not str or type(count) is not int or not 0 <= count < _LARGEST:
            raise _Refused("its pickle refers to a storage without a name or a size")
        if key not in self.storages:
            raw = bytearray(self._bytes(f"data/{key}"))
            if len(raw) != count * dtype.itemsize:
                raise _Refused(
                    f"{_spelled(f'data/{key}')} has {len(raw)} bytes, expected {count} of {dtype}"
                )
            empty = torch.empty(0, dtype=dtype)
            self.storages[key] = _Storage(torch.frombuffer(raw, dtype=dtype) if raw else empty)
        return self.storages[key]

    def _rebuilt(self, function: Any, arguments: Any) -> Any:
        """What ``function(*arguments)`` would be, for the three functions of a state dict."""
        if type(arguments) is not tuple or not isinstance(function, _Name):
            raise _Refused(f"its pickle calls a {type(function).__name__}")
        if function == _Name("collections", "OrderedDict") and not arguments:
            return {}
        if function == _Name("torch._utils", "_rebuild_parameter"):
            return arguments[0]
        if function != _Name("torch._utils", "_rebuild_tensor_v2"):
            raise _Refused(f"its pickle calls {_spelled(function)}")
        storage, offset, size, stride = arguments[:4]
        if not isinstance(storage, _Storage) or type(size) is not tuple or len(size) != len(stride):
            raise _Refused("a tensor has no storage, or no size and stride")
        if any(type(n) is not int or not 0 <= n < _LARGEST for n in (offset, *size, *stride)):
            raise _Refused("a tensor's offset, size or stride is no integer, negative or too large")
        elements = storage.elements
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        count = math.prod(size)
        if count > 0 and (last >= elements.numel() or count > elements.numel()):
            raise _Refused(f"a tensor of size {list(size)} reaches beyond its bytes")
        if any(n > 1 and step == 0 for n, step in zip(size, stride, strict=True)):
            raise _Refused(f"a tensor of size {list(size)} has the same element many times")
        return torch.as_strided(elements, size, stride, offset)


def _tuple(items: list[Any]) -> tuple[Any, ...]:
    """Of ``items``, among them tuples of what is no tuple: a tensor's arguments nest that far."""
    if len(items) > _ITEMS:
        raise _Refused(f"its pickle has a tuple of {len(items)}")
    if any(type(x) is tuple and any(type(y) is tuple for y in x) for x in items):
        raise _Refused("its pickle nests tuples more deeply than those of a tensor")
    return tuple(items)


def _fill(target: Any, items: list[Any]) -> None:
    """Put keys and values into a dict; to hash another key than a string can take for ever."""
    if type(target) is not dict:
        raise _Refused(f"its pickle puts items into a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:
            raise _Refused(f"a key is a {type(key).__name__}, expected names of tensors")
        target[key] = value


def _spelled(value: Any, limit: int = 80) -> str:
    """A name, cut short; of anything else only the type."""
    if isinstance(value, _Name):
        value = f"{value.module}.{value.name}"
    if not isinstance(value, str):
        return f"a {type(value).__name__}"
    return repr(value if len(value) <= limit else value[:limit] + "…")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
}
_LITERALS = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "BINFLOAT"})
