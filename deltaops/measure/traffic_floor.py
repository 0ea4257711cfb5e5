"""What is counted of a call, and its floor.

The floor reads and writes each argument and result of a call once, and multiplies what the
mathematics says.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

FORWARD, BACKWARD = "forward", "backward"


class Floor(NamedTuple):
    """The least that a direction of a call takes."""

    bytes: int
    operations: int


class Counted(Protocol):
    """A call of an op, on tensors without memory."""

    def run(self, direction: str) -> None:
        """Call the backend."""

    def floor(self, direction: str) -> Floor:
        """Of that direction."""


def meta(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")
