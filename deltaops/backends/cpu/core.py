"""The compiled core, and how tensors and settings are handed to it: as addresses and numbers.

``delta_linear`` alone takes tensors.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any, Never

import torch
from torch import Tensor
from torch.nn import Parameter

from deltaops.errors import BuildError
from deltaops.memory import LEAST, large, start

# deltaops_dtype, deltaops_activation and deltaops_norm of csrc/include/deltaops.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATIONS = {"identity": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
NORMS = {"none": 0, "layer": 1, "rms": 2}
ABI_VERSION = 8


@cache
def native() -> ModuleType | str:
    """The compiled module ``deltaops._cpu``, or why it is not there, in words.

    Raises: BuildError for one that was built from other sources; so does what it lacks, later.
    """
    try:
        module: Any = importlib.import_module("deltaops._cpu")
    except ImportError as error:
        return (
            f"deltaops._cpu could not be imported ({error}); "
            "reinstall deltaops with a C++ compiler at hand"
        )
    module.__getattr__ = _lacking  # Python asks it for what a module has not (PEP 562)
    if module.abi_version() != ABI_VERSION:
        raise BuildError(
            f"deltaops._cpu must have the C ABI {ABI_VERSION} for this package, and has "
            f"{module.abi_version()}: it is of another build. {_REBUILD}"
        )
    start(module)
    module.set_tensor_types(Tensor, Parameter)
    found: ModuleType = module
    return found


_REBUILD = (
    "Rebuild it: `python setup.py build_ext --inplace` in a checkout, elsewhere `pip install "
    "--force-reinstall --no-cache-dir deltaops`."
)


class _LackingError(BuildError, AttributeError):
    """An AttributeError too: pickle asks every module for names that it may lack."""


def _lacking(name: str) -> Never:
    raise _LackingError(
        f"deltaops._cpu must have {name!r} for this package, and has not: it is of another build. "
        f"{_REBUILD}"
    )


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
