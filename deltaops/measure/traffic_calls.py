"""The calls whose traffic is counted and committed: what :mod:`.traffic` runs."""

from __future__ import annotations

import torch

from .traffic_floor import Counted
from .traffic_linears import Group, Linear, LoraFusion, Mixed, Quantized
from .traffic_rows import Adapter, DoraNorm, Gated, MergedPrefix, Norm, Prefix, Prompt, Rotary

CALLS: tuple[Counted, ...] = (
    *(Linear(8192, 4096, 4096, r) for r in (16, 64, 128)),
    Linear(8192, 4096, 4096, 16, dropout=0.1),
    Linear(8192, 4096, 4096, 16, dropout=0.1, adapter=torch.float32),
    Linear(8192, 4096, 4096, 64, activation="gelu"),
    Linear(8192, 14336, 4096, 16),
    Linear(8192, 4096, 14336, 16),
    Linear(512, 4096, 4096, 16),
    Linear(1, 4096, 4096, 16),
    Linear(16, 14336, 4096, 64),
    Group(8192, (4096, 1024, 1024), 4096, 16),
    Group(8192, (4096, 1024, 1024), 4096, 16, dropout=0.1),
    Group(8192, (14336, 14336), 4096, 16),
    DoraNorm(4096, 4096, 16),
    Quantized(16, 4096, 4096, 16, "nf4"),
    Quantized(512, 4096, 4096, 16, "int8"),
    Quantized(8192, 4096, 4096, 16, "nf4"),
    Prefix(4, 32, 8, 2048, 128, 20),
    MergedPrefix(4, 32, 8, 2048, 128, 20),
    MergedPrefix(4, 32, 8, 2048, 128, 100),
    Prompt(8, 1024, 4096, 20),
    Adapter(8192, 4096, 64),
    Adapter(8192, 4096, 64, "layer"),
    Adapter(512, 4096, 64),
    Norm(8192, 4096),
    Norm(8192, 14336),
    # its rank takes two programs
    Adapter(8192, 4096, 256, "layer"),
    Mixed(8192, 4096, 4096, 16, 8),
    Gated(8192, 14336),
    Rotary(4, 32, 2048, 128),
    LoraFusion(8192, 4096, 4096, 16, 0.1),
)
"""Whose numbers are committed; a new op is one more entry."""
