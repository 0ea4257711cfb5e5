"""What acts on a contender's delta as it trains: a controller, made anew for each run.

A contender with a ``steer`` is one more line of the table. It trains on what is left of the
training texts when a part is held out, and what it is told of an evaluation is on that part; the
test texts are nobody's until the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from deltaops.strategy import Controller, parse_parts
from deltaops.surgery import Handle
from deltaops.tuning.loop import Steering

EVALUATIONS = 5
"""Of a steered run, evenly over its steps."""


class Controlling(Steering, Protocol):
    """What a run asks of a :class:`deltaops.strategy.Controller`, its steps aside."""

    failed: dict[str, str]
    """Part that raised → what."""

    def begin(
        self, handle: Handle, optimizer: torch.optim.Optimizer, *, steps: int | None = None
    ) -> object:
        """Before the first step; the optimizer's groups have a "pace", their factor of the rate."""

    def after_evaluation(self, metrics: Mapping[str, float]) -> object:
        """With "loss" and "accuracy" on held-out training texts."""

    def close(self) -> object:
        """After the last step."""


Steer = Callable[[int], Controlling]
"""By the seed of the run."""


def steered_by(parts: str) -> Steer:
    """By parts as ``deltaops tune --controller`` takes them. Raises: ConfigError."""
    parse_parts(parts)

    def make(seed: int) -> Controller:
        return Controller(parse_parts(parts), seed=seed)

    return make
