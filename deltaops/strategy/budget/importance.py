"""Ranks that follow importance while training: components that matter little go, and others come.

Every few steps all components of all places compete for the parameters of that step's budget, and
new ones come where the old ones matter most: see :mod:`.competition`. At the end new ones fill what
is left of the target, and ranks stay for the rest of the run.
Source: Zhang et al. 2023 (AdaLoRA, arXiv 2303.10512); theirs masks components and never adds any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from deltaops.errors import ConfigError
from deltaops.methods import LoRA
from deltaops.strategy.parts import Action, Run
from deltaops.surgery import resize
from deltaops.surgery.components import Sized, part_of, sized_places, trained

from .competition import Chosen, choose
from .limits import check_budget, check_count, check_share
from .schedule import Schedule
from .scores import Scores


class Importance:
    """A part of a controller that keeps a LoRA within a budget of trainable parameters."""

    announces = True

    def __init__(
        self,
        parameters: int,
        *,
        part: str | None = None,
        start: int | None = None,
        every: int = 10,
        warmup: int = 0,
        settle: int | None = None,
        beta1: float = 0.85,
        beta2: float = 0.85,
        smallest: int = 1,
        largest: int | None = None,
        explore: float = 0.1,
        trial: int = 2,
        name: str = "importance",
    ) -> None:
        """Settings.

        Args:
            parameters: what the part trains at the end, at most.
            part: of a combination; its LoRA.
            start: the budget at the beginning; None: what is attached.
            every: steps between two changes.
            warmup: steps before the first change.
            settle: steps at the end in which ranks stay; None: a fifth of the run.
            beta1: of the smoothed sensitivity, in [0, 1).
            beta2: of its uncertainty, in [0, 1).
            smallest: no rank below it; at 0 places can lose the delta, and do not get it back.
            largest: no rank grows above it; None: twice the largest rank at the beginning.
            explore: share of the budget for new components, in [0, 1); 0 lets ranks only shrink.
            trial: changes that a new component stays through before it competes.
            name: of this part.
        Raises: ConfigError.
        """
        check_count("Importance", "parameters", parameters)
        for field, value, low in (
            ("every", every, 1),
            ("warmup", warmup, 0),
            ("smallest", smallest, 0),
            ("trial", trial, 1),
        ):
            check_count("Importance", field, value, low)
        for field, optional, low in (("start", start, 1), ("settle", settle, 0)):
            if optional is not None:
                check_count("Importance", field, optional, low)
        if largest is not None:
            check_count("Importance", "largest", largest, max(smallest, 1))
        for field, share in (("beta1", beta1), ("beta2", beta2), ("explore", explore)):
            check_share("Importance", field, share)
        self.name = name
        self.parameters, self.part, self.start = parameters, part, start
        self.every, self.warmup, self.settle = every, warmup, settle
        self.smallest, self.largest = smallest, largest
        self.explore, self.trial = explore, trial
        self._scores = Scores(beta1, beta2)
        self._schedule: Schedule | None = None
        self._top = 0
        self._trial: dict[str, int] = {}
        """Path → how many of the last components there are on trial."""
        self._waits = 0
        """Changes until their trial is over."""
        self._done = False
        self._odd = False
        """Whether the last gradients were not finite."""

    def __repr__(self) -> str:
        """Its settings."""
        return (
            f"Importance({self.parameters}, part={self.part!r}, start={self.start}, "
            f"every={self.every}, warmup={self.warmup}, settle={self.settle}, "
            f"beta1={self._scores.beta1}, beta2={self._scores.beta2}, smallest={self.smallest}, "
            f"largest={self.largest}, explore={self.explore}, trial={self.trial})"
        )

    # --------------------------------------------------------------------------- as a Part

    def begin(self, run: Run) -> Iterable[Action]:
        """Check the budget against the deltas. Raises: ConfigError, before anything changes."""
        places = self._places(run)
        if run.steps is None:
            raise ConfigError(
                "Importance: the schedule needs the number of steps of the run, and it is not "
                "known. Pass steps= to the controller."
            )
        settle = run.steps // 5 if self.settle is None else self.settle
        if self.warmup + settle >= run.steps:
            raise ConfigError(
                f"Importance: warmup + settle must be below the {run.steps} steps of the run, got "
                f"{self.warmup} + {settle}. Shorten them."
            )
        check_budget("Importance", places, self.parameters, self.smallest)
        low = [p for p in places.values() if p.rank < min(self.smallest, p.largest)]
        if low:
            raise ConfigError(
                f"Importance: no rank may begin below smallest={self.smallest}, and the one at "
                f"{low[0].path!r} is {low[0].rank}. Lower smallest, or attach a higher rank."
            )
        now = trained(places.values())
        start = now if self.start is None else self.start
        if start < max(now, self.parameters):
            raise ConfigError(
                f"Importance: the budget at the start must hold the {now:,} parameters that are "
                f"attached and be no lower than the {self.parameters:,} at the end, got {start:,}. "
                "Raise start, attach a lower rank, or lower parameters."
            )
        self._schedule = Schedule(start, self.parameters, run.steps, self.warmup, settle)
        self._top = self.largest or 2 * max(place.rank for place in places.values())
        self._scores.restore({})
        self._trial, self._waits, self._done, self._odd = {}, 0, False, False
        return ()

    def after_backward(self, run: Run) -> Iterable[Action]:
        """Take the step's gradients into the scores."""
        if self._done:
            return ()
        before, self._odd = self._odd, not self._scores.update(self._places(run), run.clipped)
        if not self._odd or before:
            return ()
        reason = (
            f"step {run.step + 1}: gradients hold NaN or infinity, and scores stay as they were "
            "until all are finite again"
        )
        return [Action("left alone", self._delta(run), reason)]

    def after_step(self, run: Run) -> Iterable[Action]:
        """At every few steps, and where the schedule ends, move ranks."""
        schedule = self._planned()
        last = run.step >= schedule.last
        due = last or (run.step > self.warmup and run.step % self.every == 0)
        if self._done or not due:
            return ()
        actions = self._act(run, schedule.budget(run.step), last)
        self._done = last
        if last:
            self._scores.restore({})  # a file has no use for them any more
        return actions

    def after_evaluation(self, run: Run) -> Iterable[Action]:
        """Nothing."""
        return ()

    def state(self) -> dict[str, Any]:
        """See :class:`Part`."""
        return {
            "schedule": None if self._schedule is None else list(self._schedule),
            "top": self._top,
            "trial": self._trial,
            "waits": self._waits,
            "done": self._done,
            "odd": self._odd,
        }

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`Part`."""
        return self._scores.tensors()

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """See :class:`Part`."""
        schedule = state["schedule"]
        self._schedule = None if schedule is None else Schedule(*schedule)
        self._top, self._done = state["top"], state["done"]
        self._trial, self._waits = dict(state["trial"]), state["waits"]
        self._odd = state["odd"]
        self._scores.restore(tensors)

    # ---------------------------------------------------------------------------- details

    def _places(self, run: Run) -> dict[str, Sized]:
        places = sized_places(run.handle, self.part, "Importance")
        first = next(iter(places.values()))
        if not isinstance(first.delta, LoRA):
            raise ConfigError(
                f"Importance: {first.delta!r} must be a LoRA: other methods have one size for all "
                "places. Name a part that is one."
            )
        return places

    def _delta(self, run: Run) -> str:
        return part_of(run.handle, self.part, "Importance") or run.handle.name

    def _planned(self) -> Schedule:
        if self._schedule is None:
            raise ConfigError(
                "Importance: begin(run) must come before the first step, or restore(…) of a run "
                "that began. The controller calls them."
            )
        return self._schedule

    def _act(self, run: Run, budget: int, last: bool) -> list[Action]:
        """Choose, and resize what differs."""
        places = self._places(run)
        scores = {path: self._scores.of(path, place).tolist() for path, place in places.items()}
        self._waits = max(self._waits - 1, 0)
        on_trial = self._waits > 0 and not last
        chosen = choose(
            places,
            scores,
            self._trial if on_trial else {},
            budget,
            smallest=self.smallest,
            largest=self._top,
            share=0.0 if last else self.explore,
            grow=not on_trial and self.explore > 0,
        )
        if on_trial:  # those of them that had no room are gone
            self._trial = {
                path: sum(i >= places[path].rank - count for i in chosen.kept[path])
                for path, count in self._trial.items()
            }
        else:
            self._trial = {path: new for path, new in chosen.new.items() if new}
            self._waits = self.trial
        moved = {
            path: len(chosen.kept[path]) + chosen.new[path]
            for path, place in places.items()
            if len(chosen.kept[path]) < place.rank or chosen.new[path]
        }
        before = {path: places[path].rank for path in moved}
        if moved:
            run.secure()
        resize(
            run.handle,
            moved,
            part=self.part,
            optimizer=run.optimizer,
            keep={path: chosen.kept[path] for path in moved},
            generator=run.generator,
        )
        delta = self._delta(run)
        actions = []
        for path, rank in moved.items():
            self._scores.follow(path, places[path], chosen.kept[path], gone=not rank)
            gone = [scores[path][i] for i in range(before[path]) if i not in chosen.kept[path]]
            actions += _told(run.step, budget, chosen, delta, path, before[path], gone)
        return actions


def _told(
    step: int,
    budget: int,
    chosen: Chosen,
    delta: str,
    path: str,
    before: int,
    gone: list[float],
) -> list[Action]:
    """What was done at a place, with the numbers that led to it."""
    found = []
    stay, new = len(chosen.kept[path]), chosen.new[path]
    if gone:
        reason = (
            f"step {step}: {len(gone)} of {before} components score {max(gone):.3g} at most, and "
            f"those that {budget:,} parameters hold {chosen.cut:.3g} at least"
        )
        found.append(Action("prune", delta, reason, path, {"from": before, "to": stay}))
    if new:
        place = sorted(chosen.means.values(), reverse=True).index(chosen.means[path]) + 1
        reason = (
            f"step {step}: the components here score {chosen.means[path]:.3g} on average, place "
            f"{place} of {len(chosen.means)}, and {budget:,} parameters have room for {new} more"
        )
        found.append(Action("grow", delta, reason, path, {"from": stay, "to": stay + new}))
    return found
