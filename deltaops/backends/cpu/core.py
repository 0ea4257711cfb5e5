"""The compiled core, and how tensors and settings are handed to it: as addresses and numbers.

``delta_linear`` alone takes tensors.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import Parameter

from deltaops.memory import LEAST, large, start
from deltaops.native import ABI_VERSION, ACTIVATIONS, BF16, F32, NORMS, load

__all__ = [
    "ABI_VERSION",
    "ACTIVATIONS",
    "DTYPES",
    "NORMS",
    "as_rows",
    "core",
    "empty",
    "native",
    "parameter",
    "pointer",
    "whole",
]

DTYPES = {torch.float32: F32, torch.bfloat16: BF16}


@cache
def native() -> ModuleType | str:
    """The compiled module ``deltaops._cpu``, or why it is not there, in words.

    Raises: BuildError for one that was built from other sources; so does what it lacks, later.
    """
    module = load()
    if not isinstance(module, str):
        start(module)
        module.set_tensor_types(Tensor, Parameter)
    return module


def core() -> ModuleType:
    """The compiled module.

    Raises: ImportError where it is not there; BuildError as :func:`native`.
    """
    module = native()
    if isinstance(module, str):
        raise ImportError(module)
    return module


def as_rows(x: Tensor) -> Tensor:
    """x with adjacent elements in a row, as the core wants it; a copy only where it must be."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def whole(t: Tensor | None) -> Tensor | None:
    """A parameter whose elements lie side by side."""
    return None if t is None else t.contiguous()


def empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """``torch.empty``, recycled where it is large."""
    if rows * columns < LEAST // 4:  # strides given: torch.empty takes a microsecond more
        return torch.empty_strided((rows, columns), (columns, 1), dtype=dtype)
    return large(rows, columns, dtype, DTYPES[dtype])


def pointer(t: Tensor | None) -> int:
    """Address; 0 where there is none."""
    return 0 if t is None else t.data_ptr()


def parameter(t: Tensor | None) -> tuple[int, int]:
    """Address and dtype, as the core takes contiguous parameters and their gradients."""
    return (0, 0) if t is None else (t.data_ptr(), DTYPES[t.dtype])
