"""The CUDA library as g++ builds it for the emulated grid, and buffers whose borders are known."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
ASCENDING, DESCENDING, SHUFFLED = range(3)
MARGIN = 64
"""Elements before and after each buffer, NaN; and between its rows where ``pad`` asks for some."""


@functools.cache
def library() -> ctypes.CDLL:
    """The library, built once (objects are kept in build/emulated)."""
    sys.path.insert(0, str(ROOT))
    try:
        from buildtools import objects, recipe, toolchain
    finally:
        sys.path.remove(str(ROOT))
    compiler = toolchain.find_compiler()
    units = recipe.emulated_cuda_units(compiler, sorted((ROOT / "tests" / "cuda").glob("*.cu")))
    folder = (
        ROOT / "build" / "emulated"
    )  # not beside the objects of nvcc, which have the same names

    def say(text: str) -> None:
        if "warning:" in text:
            raise AssertionError(text)

    built = objects.compile_all(units, folder, recipe.jobs(), say)
    target = folder / recipe.CUDA_LIBRARY
    command = (*compiler.command, "-shared", *map(str, built), "-Wl,--no-undefined")
    objects.link(command, target, lambda text: None)
    found = ctypes.CDLL(str(target))
    found.deltaops_cuda_last_error.restype = ctypes.c_char_p
    return found


def error() -> str:
    return str(library().deltaops_cuda_last_error().decode())


@contextmanager
def grid(
    order: int = ASCENDING, seed: int = 1, capability: int = 80, multiprocessors: int = 3
) -> Iterator[ctypes.CDLL]:
    """The library, with the GPU that it plays set so; its ranges are forgotten at the end."""
    lib = library()
    lib.deltaops_emulation_configure(capability, multiprocessors, order, ctypes.c_uint64(seed))
    try:
        yield lib
    finally:
        lib.deltaops_emulation_forget()


def allow(t: Tensor) -> None:
    """Primitives may touch the contiguous ``t``."""
    first, size = ctypes.c_void_p(t.data_ptr()), ctypes.c_uint64(t.numel() * t.element_size())
    library().deltaops_emulation_allow(first, size)


class Matrix(ctypes.Structure):
    """deltaops_matrix."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("col_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def view(t: Tensor | None) -> Matrix:
    """``t [rows, cols]`` or ``[cols]`` as the library takes it; absent for None."""
    if t is None:
        return Matrix()
    wide = t if t.dim() == 2 else t.unsqueeze(0)
    return Matrix(wide.data_ptr(), *wide.shape, *wide.stride(), DTYPES[t.dtype], 0)


class Bordered:
    """A matrix amid NaN: what reads outside it gets NaN, what writes there is found."""

    def __init__(self, value: Tensor, pad: int = 0) -> None:
        """``value [rows, cols]``; ``pad`` NaN follow each row."""
        rows, cols = value.shape
        # whatever the dtype, 16 bytes are 8 elements or fewer: the matrix begins on 64
        size = rows * (cols + pad) + 2 * MARGIN + 64
        self._room = torch.full((size,), float("nan"), dtype=value.dtype, device=value.device)
        start = MARGIN
        while (self._room.data_ptr() + start * value.element_size()) % 64:
            start += 1
        self.t = self._room[start : start + rows * (cols + pad)].view(rows, cols + pad)[:, :cols]
        self.t.copy_(value)

    @classmethod
    def empty(cls, rows: int, cols: int, dtype: torch.dtype, pad: int = 0) -> Bordered:
        """An output: NaN all over."""
        return cls(torch.full((rows, cols), float("nan"), dtype=dtype), pad)

    def allow(self) -> None:
        """Primitives may touch it, from its first element to its last; and no other place."""
        if self.t.numel():
            last = (self.t.shape[0] - 1) * self.t.stride(0) + self.t.shape[1]
            library().deltaops_emulation_allow(
                ctypes.c_void_p(self.t.data_ptr()), ctypes.c_uint64(last * self.t.element_size())
            )

    def intact(self) -> bool:
        """Whether everything around the matrix is NaN still."""
        kept = self.t.clone()
        self.t.fill_(float("nan"))
        whole = bool(self._room.isnan().all())
        self.t.copy_(kept)
        return whole
