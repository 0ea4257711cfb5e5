"""Policies with their rules made: what does nothing is frozen, what is of no use is switched off.

FreezeDead        freezes parts whose gradients have become a small share of the run's
DisableUseless    tries each part off, and leaves off those without which validation is no worse
SwitchOnPlateau   one part until the loss stands still, then another; taken back where that harms
WarmIn            lets a part in step by step
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltaops.errors import ConfigError

from .actions import check_names, check_weighed, disable, enable, freeze, switch, weigh
from .conditions import dead, plateau
from .parts import Action, Run
from .policy import Policy, When


class _Made(Policy):
    """A policy whose rules follow from the parts of the handle."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.rules, self.name = (), name
        self._states, self._watch, self._snapshot, self._seen = [], {}, None, set()
        self._settings = settings

    def __repr__(self) -> str:
        """Its settings."""
        shown = ", ".join(f"{key}={value!r}" for key, value in self._settings.items())
        return f"{type(self).__name__}({shown})"

    def make(self, run: Run) -> tuple[When, ...]:
        """The rules."""
        raise NotImplementedError  # each preset has its own

    def begin(self, run: Run) -> Iterable[Action]:
        """Make the rules."""
        self.rules = self.make(run)
        return super().begin(run)

    def resume(self, run: Run) -> None:
        """Make them again."""
        self.rules = self.make(run)


class FreezeDead(_Made):
    """Freeze each part whose gradient is small, but never the last that trains."""

    def __init__(self, share: float = 0.01, rows: int = 5, *, name: str = "freeze-dead") -> None:
        """See :class:`~.conditions.dead`. Raises: ConfigError."""
        if not 0 < share < 1 or rows < 1:
            raise ConfigError(
                f"FreezeDead: share must be in (0, 1) and rows 1 or more, got {share}, {rows}."
            )
        super().__init__(name, {"share": share, "rows": rows})
        self._share, self._rows = share, rows

    def make(self, run: Run) -> tuple[When, ...]:
        """One for each part."""
        # one part alone has the run's whole gradient, so that never all of them are dead
        return tuple(
            When(dead(part, self._share, self._rows), freeze(part)) for part in run.handle.parts
        )


class DisableUseless(_Made):
    """Switch parts off, one after another, and on again where validation got worse.

    A part that is left off is one without which a model that trained on was no worse. The last one
    that is on stays on.
    """

    def __init__(
        self,
        start: int = 1,
        watch: int = 1,
        tolerance: float = 0.0,
        *,
        metric: str = "loss",
        greater: bool = False,
        name: str = "disable-useless",
    ) -> None:
        """From step ``start`` on; else see :class:`When`. Raises: ConfigError."""
        if watch < 1:
            raise ConfigError(f"DisableUseless: watch must be 1 or more evaluations, got {watch}.")
        super().__init__(name, {"start": start, "watch": watch, "tolerance": tolerance,
                                "metric": metric, "greater": greater})  # fmt: skip
        self._start = start
        self._watched: dict[str, Any] = {
            "watch": watch, "tolerance": tolerance, "metric": metric, "greater": greater,
        }  # fmt: skip

    def make(self, run: Run) -> tuple[When, ...]:
        """One for each part."""
        return tuple(
            When(_among_others(part, self._start), disable(part), **self._watched)
            for part in run.handle.parts
        )


@dataclass(frozen=True)
class _among_others:
    """From a step on, while the part is on and not the only one."""

    part: str
    start: int

    def __call__(self, run: Run) -> str | None:
        on = run.handle.enabled
        if run.step < self.start or self.part not in on or len(on) < 2:
            return None
        return f"step {run.step} ≥ {self.start}: tried without {self.part}"


class SwitchOnPlateau(_Made):
    """Train ``first`` until a loss stands still, then ``then`` in its place."""

    def __init__(
        self,
        first: str,
        then: str,
        rows: int = 10,
        *,
        quantity: str = "loss",
        gain: float = 0.01,
        watch: int = 0,
        tolerance: float = 0.0,
        name: str = "switch-on-plateau",
    ) -> None:
        """Parts of the handle; else see :class:`plateau` and :class:`When`. Raises: ConfigError."""
        super().__init__(name, {"first": first, "then": then, "rows": rows, "quantity": quantity,
                                "gain": gain, "watch": watch, "tolerance": tolerance})  # fmt: skip
        condition, deed = plateau(rows, quantity, gain), switch(first, then)
        self._rule = When(condition, deed, watch=watch, tolerance=tolerance)

    def make(self, run: Run) -> tuple[When, ...]:
        """The one."""
        return (self._rule,)

    def begin(self, run: Run) -> Iterable[Action]:
        """Switch the second off."""
        super().begin(run)
        (deed,) = self._rule.deeds
        assert isinstance(deed, switch)
        return disable(deed.on)(run, f"waits for the plateau of {deed.off}")


class WarmIn:
    """Let a part in: off before ``start``, then by equal levels up to its own weight.

    Its weight (``handle.weigh``) is 1/levels at ``start`` and 1 after ``steps`` more; that is for
    what just adds, as LoRA.
    """

    announces = True

    def __init__(
        self, part: str, steps: int = 100, *, start: int = 0, levels: int = 10, name: str = ""
    ) -> None:
        """Of the handle, so many steps. Raises: ConfigError."""
        if steps < 1 or start < 0 or levels < 1:
            raise ConfigError(
                "WarmIn: expected start ≥ 0, steps ≥ 1 and levels ≥ 1, got "
                f"start={start}, steps={steps}, levels={levels}."
            )
        self.part, self.steps, self.start, self.levels = part, steps, start, levels
        self.name = name or f"warm-in-{part}"
        self._level = 0

    def __repr__(self) -> str:
        """Its settings."""
        return f"WarmIn({self.part!r}, {self.steps}, start={self.start}, levels={self.levels})"

    def begin(self, run: Run) -> Iterable[Action]:
        """Raises: ConfigError for a part that is not there, or cannot be weighed."""
        check_names(run, [self.part])
        check_weighed(run, self.part)
        self._level = 0
        if self.start:
            return disable(self.part)(run, f"waits for step {self.start}")
        return self._raise(run)

    def after_backward(self, run: Run) -> Iterable[Action]:
        """Nothing."""
        return ()

    def after_step(self, run: Run) -> Iterable[Action]:
        """See :meth:`Part.after_step`."""
        return self._raise(run)

    def after_evaluation(self, run: Run) -> Iterable[Action]:
        """Nothing."""
        return ()

    def state(self) -> dict[str, Any]:
        """See :meth:`Part.state`."""
        return {"level": self._level}

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """See :meth:`Part.restore`."""
        self._level = state["level"]

    def _raise(self, run: Run) -> list[Action]:
        """To the level of this step."""
        done = run.step - self.start
        level = 0 if done < 0 else min(self.levels, 1 + done * (self.levels - 1) // self.steps)
        if level <= self._level:
            return []
        run.secure()
        before, self._level = self._level, level
        reason = f"level {level} of {self.levels} at step {run.step}"
        on = enable(self.part)(run, reason) if not before else []
        return [*on, *weigh(self.part, level / self.levels)(run, reason)]
