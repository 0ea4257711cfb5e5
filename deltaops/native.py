"""The compiled core, ``deltaops._cpu``, and the numbers of its C ABI; without torch."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, Never

from deltaops.errors import BuildError

# of csrc/include/deltaops.h
ABI_VERSION = 8
F32, BF16 = 0, 1
MAX_GROUP = 16
"""Layers of the same x in one call."""
ACTIVATIONS = {"identity": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
NORMS = {"none": 0, "layer": 1, "rms": 2}
REDUCTIONS = {"sum": 0, "mean": 1}


def load() -> ModuleType | str:
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
    check_abi("deltaops._cpu", module.abi_version())
    found: ModuleType = module
    return found


def check_abi(name: str, version: int) -> None:
    """Raise BuildError unless a module is of the C ABI of this package."""
    if version != ABI_VERSION:
        raise BuildError(
            f"{name} must have the C ABI {ABI_VERSION} for this package, and has {version}: it is "
            f"of another build. {_REBUILD}"
        )


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
