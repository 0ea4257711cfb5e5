"""What a controller is made of: parts that look at a run and act on its deltas.

A part is asked at four moments of a run and answers with the actions that it took, each with its
reason. All that it decides follows from what the run tells it, its own state and `Run.generator`,
so that a resumed run decides the same; it reads no clock and no global random state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deltaops.surgery.handle import Handle

__all__ = ["Action", "Part", "Run"]


@dataclass(frozen=True)
class Action:
    """One change of the deltas of a run, as the log keeps it.

    `kind` is what was done ("grow", "prune", "freeze", "disable", "enable", "weigh", "switch",
    "roll back"), `delta` the name of the part of the handle, `place` the path of its module or None
    for all of them, `detail` what JSON can hold of the change (`{"from": 8, "to": 4}`), `reason` a
    sentence with the numbers that led to it.
    """

    kind: str
    delta: str
    reason: str
    place: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """What parts see of the training that they steer. The controller keeps it current."""

    model: nn.Module
    handle: Handle
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    """On the CPU, seeded by the controller, saved and restored with the run."""
    step: int = 0
    """Optimizer steps taken."""
    steps: int | None = None
    """Optimizer steps of the whole run, where that is known."""
    loss: float | None = None
    """Of the last step, the mean over its micro-batches."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation."""


class Part(Protocol):
    """One part of a controller: a monitor, a budget, a policy."""

    name: str

    def begin(self, run: Run) -> Iterable[Action]:
        """Before the first step, and not again when a run is resumed."""

    def after_backward(self, run: Run) -> Iterable[Action]:
        """Gradients are whole, not yet clipped or zeroed; the optimizer has not stepped."""

    def after_step(self, run: Run) -> Iterable[Action]:
        """The optimizer has stepped. Parameters are replaced here or after an evaluation only."""

    def after_evaluation(self, run: Run) -> Iterable[Action]:
        """`run.metrics` are new."""

    def state(self) -> dict[str, Any]:
        """What the next decision depends on, as JSON can hold it."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that the next decision depends on, by flat names, saved beside the state."""

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take both back, on a part made with the same arguments."""
