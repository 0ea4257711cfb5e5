"""What may act on a contender's deltas as they train: calls at a step's moments, in plain lists.

A contender with a ``steer`` is one more line of the table. It trains on what is left of the
training texts when a part is held out, and what it is told of an evaluation is on that part; the
test texts are nobody's until the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

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
    at_end: list[Callable[[], object]] = field(default_factory=list)
    """After the last step."""


class Training(NamedTuple):
    """What there is to steer, before its first step."""

    model: nn.Module
    handle: Handle
    optimizer: torch.optim.Optimizer
    """Of groups with a "pace", their factor of the rate; a group that is added needs one."""
    steps: int
    seed: int


Steer = Callable[[Training], Moments]


class Controlling(Protocol):
    """What :class:`deltaops.strategy.Controller` has of these moments."""

    def begin(
        self, handle: Handle, optimizer: torch.optim.Optimizer, *, steps: int | None = None
    ) -> object:
        """Before the first step."""

    def after_backward(self, loss: float) -> object:
        """As :attr:`Moments.before_step`."""

    def after_step(self) -> object:
        """As :attr:`Moments.after_step`."""

    def after_evaluation(self, metrics: Mapping[str, float]) -> object:
        """As :attr:`Moments.after_evaluation`."""

    def close(self) -> object:
        """As :attr:`Moments.at_end`."""


def steered_by(make: Callable[[int], Controlling]) -> Steer:
    """A steer that asks a controller, which ``make`` makes anew for each run by its seed."""

    def steer(training: Training) -> Moments:
        controller = make(training.seed)
        controller.begin(training.handle, training.optimizer, steps=training.steps)
        return Moments(
            [lambda step, loss: controller.after_backward(loss)],
            [lambda step, loss: controller.after_step()],
            [controller.after_evaluation],
            [controller.close],
        )

    return steer
