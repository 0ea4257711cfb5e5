"""What a controller is made of: parts that look at a run and act on its deltas.

A part is asked at four moments of a run and answers with the actions that it took, each with its
reason. All that it decides follows from what the run tells it, its own state and `Run.generator`,
so that a resumed run decides the same; it reads no clock and no global random state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deltaops.surgery.handle import Handle

from .table import Table

__all__ = ["Action", "Part", "Run"]


@dataclass(frozen=True)
class Action:
    """One change of the deltas of a run, as the log keeps it.

    `kind` is what was done ("grow", "prune", "freeze", "thaw", "disable", "enable", "weigh",
    "switch", "roll back", or "left alone" with the reason why not), `delta` the name of the part of
    the handle, `place` the path of its module or None for all of them, `detail` what JSON can hold
    of the change (`{"from": 8, "to": 4}`), `reason` a sentence with the numbers that led to it.
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
    """Of the last evaluation, all finite and none of them a time; "loss", not "eval_loss"."""
    lost: tuple[str, ...] = ()
    """Metrics of the last evaluation that were not finite."""
    clipped: float = 1.0
    """How many times as long as the loss made them the gradients are: 1 in a plain loop; a
    Trainer's callbacks come after its clipping."""
    table: Table = field(default_factory=Table)
    """What a monitor has seen."""
    parts: tuple[Part, ...] = ()
    """Of the controller, but for those that failed."""
    on_secure: Callable[[], object] = lambda: None
    """The controller's."""

    def secure(self) -> None:
        """Before a change: from here on the controller can undo what the part asked now does.

        For a part that `announces` its changes by this, so that the steps in which it changes
        nothing cost no copy.
        """
        self.on_secure()


class Part(Protocol):
    """One part of a controller: a monitor, a budget, a policy.

    A part may also have

    - ``announces = True``: it calls `Run.secure` before it changes anything that its `leave` does
      not give back. What others change is copied before they are asked, always.
    - ``watches = True``: it never changes anything, and is not rolled back.
    - ``resume(run)``: after `restore`, a run goes on that was begun by another process.
    - ``leave(run)``: it raised and is asked no more, so that what it had changed for a time alone
      ends; what it changed in the call that raised is undone before.
    - ``close(run)``: the run is over.
    """

    name: str

    def begin(self, run: Run) -> Iterable[Action]:
        """Before the first step, and not again when a run is resumed."""

    def after_backward(self, run: Run) -> Iterable[Action]:
        """Gradients are whole and not zeroed, a Trainer's clipped: see `Run.clipped`; the
        optimizer has not stepped."""

    def after_step(self, run: Run) -> Iterable[Action]:
        """The optimizer has stepped. Parameters are replaced here or after an evaluation only."""

    def after_evaluation(self, run: Run) -> Iterable[Action]:
        """`run.metrics` and `run.lost` are new, one of them not empty."""

    def state(self) -> dict[str, Any]:
        """What the next decision depends on, as JSON can hold it."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that the next decision depends on, by flat names, saved beside the state."""

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take both back, on a part made with the same arguments; on a live one where another part
        rolls the run back."""
