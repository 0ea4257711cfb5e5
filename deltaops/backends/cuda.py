"""The compiled CUDA module ``deltaops._cuda``: what it found here. It holds no delta_linear yet."""

from __future__ import annotations

import importlib
from types import ModuleType


def native() -> ModuleType | str:
    """The compiled module, or why it is not there, in words."""
    try:
        return importlib.import_module("deltaops._cuda")
    except ImportError as error:
        return (
            f"deltaops._cuda could not be imported ({error}); "
            "reinstall deltaops with nvcc on the PATH and DELTAOPS_CUDA=1"
        )
