"""Rules that act on a run, and take back what harmed it.

    Policy(
        When(plateau(20), freeze("lora")),
        When(dead("bitfit"), disable("bitfit"), watch=2),      # taken back if validation is worse
    )

A rule acts once. With ``watch=N`` it waits for a validation metric, acts, and looks at the next
evaluations: at the first that is no worse than before the action, by more than ``tolerance``, it is
done; where all N are worse, or not finite, the run's deltas and its optimizer are as they were
before, to the bit. While one rule is watched, no other acts. One that would leave nothing to train
does nothing, and the log says so, as it does of one whose metric no evaluation had. Rules are
looked at in their order, when the optimizer has stepped and after evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from deltaops.errors import ConfigError

from .actions import Deed, Refused, check_names
from .parts import Action, Run
from .snapshot import Snapshot

WAITING, WATCHED, DONE = "waiting", "watched", "done"


@dataclass(frozen=True, repr=False)
class When:
    """One rule.

    Args:
        condition: of :mod:`.conditions`, or a function of a run that answers with a reason or None.
        action: of :mod:`.actions`, one or several.
        watch: evaluations after which the action is taken back where all were worse; 0 for never.
        metric: which is watched, with or without "eval_" before it.
        greater: whether more of it is better.
        tolerance: by how much it may be worse, in its own unit.
    Raises: ConfigError.
    """

    condition: Callable[[Run], str | None]
    action: Deed | Sequence[Deed]
    watch: int = 0
    metric: str = "loss"
    greater: bool = False
    tolerance: float = 0.0
    deeds: tuple[Deed, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Check."""
        several = isinstance(self.action, (list, tuple))
        deeds: tuple[Any, ...] = tuple(self.action) if several else (self.action,)  # type: ignore[arg-type]  # a sequence
        odd = [deed for deed in deeds if not callable(deed) or not hasattr(deed, "names")]
        if odd or not deeds or not callable(self.condition):
            raise ConfigError(
                "When: expected a condition such as plateau(20) and an action such as "
                f"freeze('lora'), got {self.condition!r} and {self.action!r}."
            )
        if isinstance(self.watch, bool) or not isinstance(self.watch, int) or self.watch < 0:
            raise ConfigError(f"When: watch must be a number of evaluations, got {self.watch!r}.")
        if not 0 <= self.tolerance < float("inf"):
            raise ConfigError(f"When: tolerance must be 0 or more, got {self.tolerance!r}.")
        # the dataclass is frozen; this is its start
        object.__setattr__(self, "deeds", deeds)
        object.__setattr__(self, "metric", self.metric.removeprefix("eval_"))

    def __repr__(self) -> str:
        """What decides; a function by its name."""
        name = getattr(self.condition, "__qualname__", None) or repr(self.condition)
        watched = ""
        if self.watch:
            sign = "-" if self.greater else "+"
            watched = f", watch={self.watch} of {self.metric} {sign}{self.tolerance}"
        return f"When({name}, {list(self.deeds)}{watched})"

    def worse(self, value: float, before: float) -> bool:
        """Whether ``value`` is, by more than the tolerance."""
        return (before - value if self.greater else value - before) > self.tolerance


class Policy:
    """Rules, and what became of each."""

    announces = True

    def __init__(self, *rules: When, name: str = "policy") -> None:
        """Rules in their order. Raises: ConfigError for none, or what is no rule."""
        odd = [rule for rule in rules if not isinstance(rule, When)]
        if odd or not rules:
            found = type(odd[0]).__name__ if odd else "none"
            raise ConfigError(f"Policy: expected rules such as When(plateau(20), …), got {found}.")
        self.rules, self.name = rules, name
        self._states = [WAITING] * len(rules)
        self._snapshot: Snapshot | None = None
        self._watch: dict[str, Any] = {}
        """Of the rule that is watched: step, metric before, metrics since, None of one that was not
        finite."""
        self._seen: set[str] = set()
        """Metrics that evaluations had."""

    def __repr__(self) -> str:
        """Its rules."""
        return f"Policy({', '.join(map(repr, self.rules))})"

    # --------------------------------------------------------------------------- as a part

    def begin(self, run: Run) -> Iterable[Action]:
        """Raises: ConfigError for a rule that never could act on this handle."""
        self._states, self._watch, self._snapshot = [WAITING] * len(self.rules), {}, None
        self._seen = set()
        for rule in self.rules:
            for deed in rule.deeds:
                check_names(run, deed.names())
            for one in (rule.condition, *rule.deeds):
                if hasattr(one, "check"):
                    one.check(run)
        return ()

    def after_backward(self, run: Run) -> Iterable[Action]:
        """Nothing."""
        return ()

    def after_step(self, run: Run) -> Iterable[Action]:
        """See :meth:`Part.after_step`."""
        return self._act(run)

    def after_evaluation(self, run: Run) -> Iterable[Action]:
        """See :meth:`Part.after_evaluation`."""
        self._seen |= {*run.metrics, *run.lost}
        found = self._judge(run) if WATCHED in self._states else []
        return [*found, *self._act(run)]

    def close(self, run: Run) -> Iterable[Action]:
        """Tell of rules that waited in vain for a metric."""
        found = []
        for rule, state in zip(self.rules, self._states, strict=True):
            if state == WAITING and rule.watch and rule.metric not in self._seen:
                reason = f"no evaluation had the metric {rule.metric!r}, by which it is watched"
                names = dict.fromkeys(name for deed in rule.deeds for name in deed.names())
                found += [Action("left alone", name, reason) for name in names]
        return found

    def state(self) -> dict[str, Any]:
        """See :meth:`Part.state`."""
        snapshot = None if self._snapshot is None else self._snapshot.state()
        return {
            "rules": list(self._states),
            "watch": dict(self._watch),
            "seen": sorted(self._seen),
            "snapshot": snapshot,
        }

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`Part.tensors`."""
        return {} if self._snapshot is None else self._snapshot.tensors()

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """See :meth:`Part.restore`."""
        self._states, self._watch = list(state["rules"]), dict(state["watch"])
        self._seen = set(state["seen"])
        snapshot = state["snapshot"]
        self._snapshot = None if snapshot is None else Snapshot.read(snapshot, tensors)

    # ------------------------------------------------------------------------------ details

    def _act(self, run: Run) -> list[Action]:
        """What the rules do whose conditions hold now."""
        done: list[Action] = []
        for index, rule in enumerate(self.rules):
            if WATCHED in self._states:
                break
            if self._states[index] != WAITING or (rule.watch and rule.metric not in run.metrics):
                continue
            reason = rule.condition(run)
            if reason is None:
                continue
            run.secure()
            snapshot = Snapshot.take(run, but=[self.name])
            self._states[index] = DONE
            try:
                found = [action for deed in rule.deeds for action in deed(run, reason)]
            except Refused as error:
                snapshot.restore(run, failed=True)
                names = dict.fromkeys(name for deed in rule.deeds for name in deed.names())
                done += [Action("left alone", name, f"{reason}; but {error}") for name in names]
                continue
            if rule.watch and found:
                self._states[index], self._snapshot = WATCHED, snapshot
                self._watch = {"step": run.step, "before": run.metrics[rule.metric], "since": []}
            done += found
        return done

    def _judge(self, run: Run) -> list[Action]:
        """Keep what the watched rule did, wait, or take it back."""
        index = self._states.index(WATCHED)
        rule, watch = self.rules[index], self._watch
        if rule.metric not in (*run.metrics, *run.lost):
            return []
        value, before = run.metrics.get(rule.metric), watch["before"]
        since = [*watch["since"], value]
        worse = value is None or rule.worse(value, before)
        if worse and len(since) < rule.watch:
            self._watch = {**watch, "since": since}
            return []
        self._states[index], self._watch = DONE, {}
        snapshot, self._snapshot = self._snapshot, None
        if not worse:
            return []
        assert snapshot is not None
        run.secure()
        snapshot.restore(run)
        told = ", ".join("not finite" if v is None else f"{v:.6g}" for v in since)
        reason = (
            f"{rule.metric} was {before:.6g} before the action of step {watch['step']}, and {told} "
            f"in the {len(since)} evaluations after it, worse by more than {rule.tolerance:.6g}"
        )
        names = dict.fromkeys(name for deed in rule.deeds for name in deed.names())
        detail = {"to_step": watch["step"], "before": before, "since": since}
        return [Action("roll back", name, reason, detail=detail) for name in names]
