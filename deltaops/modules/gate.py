"""A gate on what one delta adds at one module.      g = mean over tokens of σ(x · w + c)

One number for each sample, from what the delta reads there. w and c start at zero: every gate is
half open. Padding is among the tokens, as in the authors' code.
Source: Mao et al. 2022 (arXiv 2110.07577), §3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltaops.ops.paths import no_autocast

GATES = "delta_gate"
"""Name of the container of gates on a module, and its part of keys."""


class Gate(nn.Module):
    """w ``[K]`` and c ``[1]``."""

    def __init__(self, width: int, like: Tensor) -> None:
        """For inputs of ``width`` features, where and in the dtype of which ``like`` is."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, device=like.device, dtype=like.dtype))
        self.bias = nn.Parameter(torch.zeros(1, device=like.device, dtype=like.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, ..., K]`` → ``[B, 1, ...]``, as many dimensions as x."""
        with no_autocast(x.device):
            opened = torch.sigmoid(x.to(self.weight.dtype) @ self.weight + self.bias)
        if opened.dim() > 1:
            opened = opened.flatten(1).mean(1)
        return opened.view(-1, *[1] * (x.dim() - 1))


def add_gate(module: nn.Module, name: str, gate: Gate) -> None:
    """Give the adapter ``name`` of ``module`` a gate."""
    if GATES not in module._modules:
        module.add_module(GATES, nn.ModuleDict())
    gates: Any = module._modules[GATES]
    gates[name] = gate


def gate_of(module: nn.Module, name: str) -> Gate | None:
    """The gate of the adapter ``name``, if it has one."""
    gates: Any = module._modules.get(GATES)
    return gates[name] if gates is not None and name in gates else None
