"""What may act on a contender's deltas as they train: calls at a step's moments, in plain lists.

A contender with a ``steer`` is one more line of the table. It trains on what is left of the
training texts when a part is held out, and what it is told of an evaluation is on that part; the
test texts are nobody's until the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from deltaops.surgery import Handle

EVALUATIONS = 5
"""Of a steered run, evenly over its steps."""


@dataclass(frozen=True)
class Moments:
    """When what is called; each list in its order."""

    before_step: list[Callable[[int, float], object]] = field(default_factory=list)
    """With the step (from 1) and its loss: gradients are whole, neither clipped nor used."""
    after_step: list[Callable[[int, float], object]] = field(default_factory=list)
    """With the same: the optimizer has stepped. Parameters may be replaced."""
    after_evaluation: list[Callable[[dict[str, float]], object]] = field(default_factory=list)
    """With "loss" and "accuracy" on held-out training texts. Parameters may be replaced."""


class Training(NamedTuple):
    """What there is to steer, before its first step."""

    model: nn.Module
    handle: Handle
    optimizer: torch.optim.Optimizer
    """Of groups with a "pace", their factor of the rate; a group that is added needs one."""
    steps: int
    seed: int


Steer = Callable[[Training], Moments]
