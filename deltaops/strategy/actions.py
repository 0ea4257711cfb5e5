"""What a rule does: changes of the deltas of a run, each a small object that is called with it.

Each names parts of the handle, by the names in ``handle.parts``. What is switched off or frozen
gets no gradients, so that AdamW leaves it and its moments as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from deltaops.errors import ConfigError
from deltaops.methods import parts_of
from deltaops.surgery import resize
from deltaops.surgery.components import Sized, sized_places

from .parts import Action, Run


class Refused(ConfigError):
    """What was asked for would leave nothing to train."""


class Deed(Protocol):
    """What `When` takes second. It may have a ``check(run)``, asked before the first step."""

    def names(self) -> tuple[str, ...]:
        """Of the parts that it changes, to be checked before the run."""

    def __call__(self, run: Run, reason: str) -> list[Action]:
        """Do it, and tell it; nothing where there is nothing to do."""


@dataclass(frozen=True, init=False)
class _OnParts:
    """A change of named parts."""

    parts: tuple[str, ...]

    def __init__(self, *parts: str) -> None:
        """Raises: ConfigError without a name."""
        if not parts or not all(isinstance(part, str) and part for part in parts):
            raise ConfigError(
                f"{type(self).__name__}: expected names of parts of the handle, such as 'lora', "
                f"got {parts!r}."
            )
        object.__setattr__(self, "parts", parts)  # the dataclass is frozen; this is its start

    def names(self) -> tuple[str, ...]:
        """See :class:`Deed`."""
        return self.parts


class freeze(_OnParts):
    """Go on without training these parts; they compute what they learnt."""

    def __call__(self, run: Run, reason: str) -> list[Action]:
        """See :class:`Deed`. Raises: Refused."""
        found = [part for part in self.parts if _set_trained(run, part, False)]
        _check_trained(run, "freeze")
        return [Action("freeze", part, reason) for part in found]


class thaw(_OnParts):
    """Train these parts again."""

    def __call__(self, run: Run, reason: str) -> list[Action]:
        """See :class:`Deed`."""
        return [
            Action("thaw", part, reason) for part in self.parts if _set_trained(run, part, True)
        ]


class disable(_OnParts):
    """Switch these parts off: the model computes as if they were not there."""

    def __call__(self, run: Run, reason: str) -> list[Action]:
        """See :class:`Deed`. Raises: Refused."""
        found = [part for part in self.parts if part in run.handle.enabled]
        if found:
            _turn_off(run, found)
            _check_trained(run, "disable")
        return [Action("disable", part, reason) for part in found]


class enable(_OnParts):
    """Switch these parts on."""

    def __call__(self, run: Run, reason: str) -> list[Action]:
        """See :class:`Deed`."""
        found = [part for part in self.parts if part not in run.handle.enabled]
        if found:
            run.handle.enable(*found)
        return [Action("enable", part, reason) for part in found]


@dataclass(frozen=True)
class weigh:
    """Have ``part`` add ``factor`` times what it adds by itself; for what just adds, as LoRA."""

    part: str
    factor: float

    def names(self) -> tuple[str, ...]:
        """See :class:`Deed`."""
        return (self.part,)

    def check(self, run: Run) -> None:
        """Raises: ConfigError for a method that does not just add, or a factor that is none."""
        check_weighed(run, self.part, self.factor)

    def __call__(self, run: Run, reason: str) -> list[Action]:
        """See :class:`Deed`."""
        before = run.handle.weights[self.part]
        if before == self.factor:
            return []
        run.handle.weigh(self.part, self.factor)
        return [Action("weigh", self.part, reason, detail={"from": before, "to": self.factor})]


@dataclass(frozen=True)
class switch:
    """Another method: ``off`` is switched off and ``on`` on; both are parts of the handle.

    Raises: ConfigError where they are one.
    """

    off: str
    on: str

    def __post_init__(self) -> None:
        """Check."""
        if self.off == self.on:
            raise ConfigError(f"switch: expected two parts, got {self.on!r} twice.")

    def names(self) -> tuple[str, ...]:
        """See :class:`Deed`."""
        return (self.off, self.on)

    def __call__(self, run: Run, reason: str) -> list[Action]:
        """See :class:`Deed`."""
        if self.off not in run.handle.enabled and self.on in run.handle.enabled:
            return []
        run.handle.enable(self.on)
        _turn_off(run, [self.off])
        _check_trained(run, "switch")
        return [Action("switch", self.on, reason, detail={"from": self.off, "to": self.on})]


@dataclass(frozen=True)
class grow:
    """Ranks of a part ``by`` more, as far as that adds something; the function stays as it is.

    Args:
        part: of the handle, one that has ranks.
        by: components of each place, 1 or more.
        places: paths of modules; None for all of the part.
    Raises: ConfigError.
    """

    part: str
    by: int = 1
    places: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check."""
        if self.places is not None:
            object.__setattr__(self, "places", tuple(self.places))  # frozen; this is its start
        if isinstance(self.by, bool) or not isinstance(self.by, int) or self.by < 1:
            raise ConfigError(f"{self._kind}: by must be 1 or more components, got {self.by!r}.")
        if self.places == ():
            raise ConfigError(f"{self._kind}: places must be paths of modules, or None for all.")

    @property
    def _kind(self) -> str:
        return type(self).__name__

    def names(self) -> tuple[str, ...]:
        """See :class:`Deed`."""
        return (self.part,)

    def check(self, run: Run) -> None:
        """Raises: ConfigError for a part without ranks, or a place that is not there."""
        known = sized_places(run.handle, self.part, self._kind)
        odd = sorted(set(self.places or ()) - set(known))
        if odd:
            raise ConfigError(
                f"{self._kind}: {self.part} is not at {odd[0]!r}; it is at {', '.join(known)}."
            )

    def __call__(self, run: Run, reason: str) -> list[Action]:
        """See :class:`Deed`."""
        places = sized_places(run.handle, self.part, self._kind)
        chosen = {p: self._rank(places[p]) for p in self.places or places if p in places}
        done = resize(
            run.handle, chosen, part=self.part, optimizer=run.optimizer, generator=run.generator
        )
        return [
            Action(
                self._kind, self.part, reason, place=one.path,
                detail={"from": one.before, "to": one.after},
            )
            for one in done
        ]  # fmt: skip

    def _rank(self, place: Sized) -> int:
        return max(place.rank, min(place.rank + self.by, place.largest))


class prune(grow):
    """Ranks of a part ``by`` less, down to 1: the components go that weigh least."""

    def _rank(self, place: Sized) -> int:
        return max(1, place.rank - self.by)


def check_names(run: Run, names: Iterable[str]) -> None:
    """Raises: ConfigError for a name that is no part of the handle."""
    for name in names:
        if name not in run.handle.parts:
            raise ConfigError(
                f"Policy: no part of the handle is called {name!r}; there are "
                f"{', '.join(run.handle.parts)}. Name one of them in the rule."
            )


def check_weighed(run: Run, part: str, factor: float = 1.0) -> None:
    """Raises: ConfigError where the method of ``part`` has no weight."""
    handle = run.handle
    parts = parts_of(handle.delta)
    parts["" if part not in parts else part].weighed(factor)


def tensors_of(run: Run, part: str) -> list[nn.Parameter]:
    """Those of one part of the handle."""
    found = run.handle.by_place().items()
    return [p for s, held in found if (s.part or run.handle.name) == part for p in held.values()]


def _turn_off(run: Run, parts: Iterable[str]) -> None:
    """Also for a loop that zeroes only the gradients of what is in the model."""
    for part in parts:
        run.handle.disable(part)
        for parameter in tensors_of(run, part):
            parameter.grad = None


def _set_trained(run: Run, part: str, trained: bool) -> bool:
    """Whether anything changed."""
    changed = [p for p in tensors_of(run, part) if p.requires_grad != trained]
    for parameter in changed:
        parameter.requires_grad_(trained)
        if not trained:
            parameter.grad = None
    return bool(changed)


def _check_trained(run: Run, action: str) -> None:
    """Raises: Refused where no part is both on and trained."""
    left = [p for on in run.handle.enabled for p in tensors_of(run, on) if p.requires_grad]
    whole = [p for m in run.handle.saved().values() for p in m.parameters() if p.requires_grad]
    if not left and not whole:
        raise Refused(f"{action} would leave nothing to train")
