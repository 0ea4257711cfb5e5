"""The multiply-add peak of this machine: what no matrix product can pass."""

from __future__ import annotations

import torch

from deltaops.backends.cpu import native

CODES = {"f32": 0, "bf16": 1}  # deltaops_dtype


def peak(dtype: str, seconds: float = 0.3) -> float | str:
    """GF/s of registers-only multiply-adds with torch's thread count, or why there is no figure."""
    core = native()
    if isinstance(core, str):
        return core
    probe = getattr(core, "fma_peak", None)
    if probe is None:
        return "this build of the native core has no fma_peak probe"
    return float(probe(CODES[dtype], torch.get_num_threads(), seconds))
