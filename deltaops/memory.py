"""Memory of large outputs, which goes round from step to step.

A training step makes the same activations and gradients again and again, and the C library gives
each large one back to the system and faults it in anew, which costs more than many an op. So the
CPU backend takes them from blocks that wait for their next tensor, as CUDA's allocator does for all
of torch. Blocks idle for long go back by themselves; :func:`release` gives back all of them now.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from deltaops.errors import ConfigError

LEAST = 1 << 20
"""Bytes from which on an output is recycled; the C library recycles smaller ones itself."""

_SHARE = 0.125
"""Of the memory that was available: the most that may lie idle."""

SWITCH = "DELTAOPS_RECYCLE"
"""Environment variable: 0 leaves all memory to torch, a number of megabytes is the limit."""

_core: ModuleType | None = None
_on = False


def start(core: ModuleType) -> None:
    """Set the limit in the native module; called once, when that is loaded.

    Raises: ConfigError where ``DELTAOPS_RECYCLE`` is no number.
    """
    global _core, _on
    setting = os.environ.get(SWITCH)
    if setting is None:
        limit = int(available() * _SHARE)
    else:
        if not setting.isdecimal():
            raise ConfigError(
                f"{SWITCH} must be a number of megabytes (0: recycle nothing), got {setting!r}."
            )
        limit = int(setting) << 20
    core.recycle_limit(limit)
    _core, _on = core, limit > 0


def large(rows: int, columns: int, dtype: torch.dtype, code: int) -> Tensor:
    """``torch.empty((rows, columns), dtype=dtype)``, from recycled memory where it is large.

    Args:
        rows: M.
        columns: N.
        dtype: float32 or bfloat16.
        code: the same as the native core's number.
    """
    if not _on or rows * columns * dtype.itemsize < LEAST:
        return torch.empty((rows, columns), dtype=dtype)
    assert _core is not None
    return from_dlpack(_core.recycled(code, rows, columns))


def idle() -> int:
    """Bytes that wait for their next tensor now."""
    return 0 if _core is None else int(_core.recycle_idle())


def release() -> None:
    """Give all idle blocks back to the system."""
    if _core is not None:
        _core.recycle_release()


def available() -> int:
    """Bytes of memory that the system could still give; at least a guess."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # no Linux: the whole memory is the next best that every POSIX system tells
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 4 << 30  # Windows has no sysconf; a quarter of this is one packed GPT-2
