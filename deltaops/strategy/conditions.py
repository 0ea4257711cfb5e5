"""When a rule acts: conditions on the table of a monitor and on the step.

A condition is a function of a run: it answers with the reason, a sentence with its numbers, or with
None. It keeps no state of its own, so that a resumed run finds it as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from deltaops.errors import ConfigError

from .actions import check_names
from .monitor import WHOLE
from .parts import Run


class Condition(Protocol):
    """What `When` takes first. It may have a ``check(run)``, asked before the first step."""

    def __call__(self, run: Run) -> str | None:
        """The reason to act now, or None."""


@dataclass(frozen=True)
class at:
    """From ``step`` on."""

    step: int

    def __call__(self, run: Run) -> str | None:
        """See :class:`Condition`."""
        return f"step {run.step} ≥ {self.step}" if run.step >= self.step else None


@dataclass(frozen=True)
class plateau:
    """The mean of the last ``rows`` rows is not below that of the ``rows`` before them by more
    than ``gain`` of its size.

    Args:
        rows: of the monitor, 1 or more; of ``every`` steps each, or of an evaluation each.
        quantity: of the run that should fall, such as "loss" or "eval_loss".
        gain: the least part of the mean by which it should, in [0, 1).
    Raises: ConfigError.
    """

    rows: int
    quantity: str = "loss"
    gain: float = 0.01

    def __post_init__(self) -> None:
        """Check."""
        if isinstance(self.rows, bool) or not isinstance(self.rows, int) or self.rows < 1:
            raise ConfigError(f"plateau: rows must be 1 or more rows, got {self.rows!r}.")
        if not 0 <= self.gain < 1:
            raise ConfigError(f"plateau: gain must be in [0, 1), got {self.gain!r}.")

    def check(self, run: Run) -> None:
        """Raises: ConfigError without a monitor."""
        _check_table(run, self)

    def __call__(self, run: Run) -> str | None:
        """See :class:`Condition`."""
        values = run.table.values(self.quantity)
        if len(values) < 2 * self.rows:
            return None
        before = _mean(values[-2 * self.rows : -self.rows])
        now = _mean(values[-self.rows :])
        if before - now > self.gain * abs(before):
            return None
        return (
            f"{self.quantity} is on a plateau: {now:.6g} over {self.rows} rows after {before:.6g}, "
            f"a fall of no more than {self.gain:.3g} of it"
        )


@dataclass(frozen=True)
class below:
    """The last ``rows`` rows of a quantity are all below ``value``.

    Args:
        quantity: of the monitor.
        value: the limit.
        delta: name of a part; "" for the run.
        place: path of a module; "" for the whole part.
        rows: of the monitor, 1 or more.
    Raises: ConfigError.
    """

    quantity: str
    value: float
    delta: str = ""
    place: str = ""
    rows: int = 1

    def __post_init__(self) -> None:
        """Check."""
        if self.rows < 1:
            raise ConfigError(f"{type(self).__name__}: rows must be 1 or more, got {self.rows!r}.")

    def check(self, run: Run) -> None:
        """Raises: ConfigError without a monitor, or for a part that is not there."""
        _check_table(run, self)
        check_names(run, {self.delta} - {"", WHOLE})

    def __call__(self, run: Run) -> str | None:
        """See :class:`Condition`."""
        values = run.table.values(self.quantity, delta=self.delta, place=self.place)[-self.rows :]
        if len(values) < self.rows or not all(self._holds(v) for v in values):
            return None
        of = " ".join(filter(None, (self.delta, self.place)))
        return (
            f"{self.quantity}{f' of {of}' if of else ''} was {_shown(values)} in the last "
            f"{self.rows} rows, {type(self).__name__} {self.value:.6g}"
        )

    def _holds(self, value: float) -> bool:
        return value < self.value


class above(below):
    """The last ``rows`` rows of a quantity are all above ``value``. See :class:`below`."""

    def _holds(self, value: float) -> bool:
        return value > self.value


@dataclass(frozen=True)
class dead:
    """The part's gradient was below ``share`` of the run's in each of the last ``rows`` rows.

    Args:
        delta: name of the part.
        share: of the run's gradient norm.
        rows: of the monitor, 1 or more.
    Raises: ConfigError.
    """

    delta: str
    share: float = 0.01
    rows: int = 5

    def __post_init__(self) -> None:
        """Check."""
        if not 0 < self.share < 1 or self.rows < 1:
            raise ConfigError(
                f"dead: share must be in (0, 1) and rows 1 or more, got {self.share!r}, "
                f"{self.rows!r}."
            )

    def check(self, run: Run) -> None:
        """Raises: ConfigError without a monitor, or for a part that is not there."""
        _check_table(run, self)
        check_names(run, [self.delta])

    def __call__(self, run: Run) -> str | None:
        """See :class:`Condition`."""
        whole = dict(run.table.series("gradient_norm"))
        own = run.table.series("gradient_norm", delta=self.delta)[-self.rows :]
        shares = [v / whole[s] for s, v in own if whole.get(s, 0.0) > 0]
        if len(shares) < self.rows or not all(share < self.share for share in shares):
            return None
        return (
            f"the gradient of {self.delta} was at most {max(shares):.3g} of the run's in the last "
            f"{self.rows} rows, below {self.share:.3g}"
        )


def all_of(*conditions: Callable[[Run], str | None]) -> Callable[[Run], str | None]:
    """All of them hold. Raises: ConfigError for none."""
    if not conditions:
        raise ConfigError("all_of: expected conditions such as at(100), got none.")
    return _All(conditions)


@dataclass(frozen=True)
class _All:
    conditions: tuple[Callable[[Run], str | None], ...]

    def check(self, run: Run) -> None:
        for condition in self.conditions:
            if hasattr(condition, "check"):
                condition.check(run)

    def __call__(self, run: Run) -> str | None:
        found = [condition(run) for condition in self.conditions]
        return None if None in found else "; ".join(reason for reason in found if reason)


def _check_table(run: Run, condition: object) -> None:
    """Raises: ConfigError where nobody fills the table."""
    if not any(getattr(part, "watches", False) for part in run.parts):
        raise ConfigError(
            f"{type(condition).__name__}: it goes by the table of a monitor, and the controller "
            "has none. Put Monitor() before the policy."
        )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _shown(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
