"""A controller in a run of ``deltaops tune``: made of a spec, its files in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deltaops.strategy import Controller, Monitor, parse_parts
from deltaops.surgery import Handle

from .loop import evaluate
from .state import FILE, read_controller
from .tokens import TokenSet

LOG, TABLE = "controller.jsonl", "monitor.csv"
NO_ACTIONS = ("left alone", "not finite", "error")
"""Kinds of lines in the log of a controller that tell of no change."""
EVALUATIONS = 10
"""Of a run that does not say how many."""


class Steered:
    """A controller whose first part is a monitor, and what it writes."""

    controller: Controller
    """Once the run has begun."""

    def __init__(self, spec: str, out: Path) -> None:
        """Parts as :func:`deltaops.strategy.parse_parts` reads them. Raises: ConfigError."""
        self.out = out
        parts = parse_parts(spec)
        monitors = [part for part in parts if isinstance(part, Monitor)]
        self.monitor = monitors[0] if monitors else Monitor()
        self.monitor.path = self.monitor.path or out / TABLE
        self.parts = [self.monitor, *(part for part in parts if part is not self.monitor)]

    def begin(
        self,
        settings: Any,
        handle: Handle,
        optimizer: torch.optim.Optimizer,
        held: TokenSet | None,
        resumed: Mapping[str, Any] | None,
    ) -> None:
        """Bind to the run, or go on with it.

        Args:
            settings: of the run.
            handle: of its delta.
            optimizer: of its parameters.
            held: what is held out, to be evaluated on.
            resumed: the facts of the run that goes on.
        Raises: ConfigError, CheckpointError.
        """
        every = settings.evaluate_every or max(1, settings.steps // EVALUATIONS)

        def score(model: torch.nn.Module) -> dict[str, float]:
            assert held is not None
            found = evaluate(model, held, settings.batch_size)
            assert found is not None  # nobody stops it
            return found

        self.controller = Controller(
            self.parts,
            seed=settings.seed,
            log=self.out / LOG,
            evaluate=None if held is None else score,
            evaluate_every=0 if held is None else every,
        )
        resume = None
        if resumed is not None:
            resume = {"facts": resumed["controller"], "tensors": read_controller(self.out / FILE)}
        self.controller.begin(handle, optimizer, steps=settings.steps, resume=resume)

    def end(self) -> None:
        """Draw what was seen, as far as the run came."""
        self.controller.close()
        if self.monitor.table():
            self.monitor.draw(self.out)
