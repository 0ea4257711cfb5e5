"""Backend ``cpu``: the native core (csrc/cpu), reached by raw pointers. float32 and bfloat16.

One file for each op, as in :mod:`deltaops.reference`; :mod:`.core` loads the compiled module.
"""

from .backend import CpuBackend
from .core import native

__all__ = ["CpuBackend", "native"]
