"""What one parameter of a space may be: a fixed value, one of several, a number, or a subset.

8                                   fixed
[4, 8, 16]                          one of these; an item may be a list itself
{low: 1e-4, high: 1e-2, log: true}  a number; an integer where low and high are, by ``step``
{choices: [1, 2], of: r}            times the value of the option r
{subset: layers}                    some of the model's layers, at least one; or of a list
{…, when: {r: [8, 16]}}             only where the option r, written before, has such a value
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deltaops.errors import ConfigError

LAYERS = "layers"
"""What a subset is taken of: the indices of the model's layers, where a space says no list."""
KEYS = ("choices", "low", "high", "log", "step", "of", "subset", "when")

Pick = Callable[[str, "Range"], Any]
"""Given the name of a parameter and its range: a label of :attr:`Range.labels`, or a number."""


@dataclass(frozen=True)
class Range:
    """One parameter. ``choices`` is None for a number, and for a subset until it is resolved."""

    choices: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    of: str | None = None
    subset: tuple[Any, ...] | str | None = None
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    @property
    def labels(self) -> tuple[Any, ...]:
        """The choices as Optuna keeps them: numbers and texts, a list as ``a+b``."""
        assert self.choices is not None
        return tuple(label(choice) for choice in self.choices)

    @property
    def whole(self) -> bool:
        """Whether the number is an integer."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def fixed(self) -> bool:
        """Whether nothing is left to choose."""
        if self.choices is not None:
            return len(self.choices) == 1
        return self.subset is None and self.low == self.high

    @property
    def numeric(self) -> bool:
        """Whether every value is a number."""
        return self.subset is None and all(
            isinstance(end, int | float) and not isinstance(end, bool) for end in self.ends()
        )

    def draw(self, name: str, pick: Pick) -> Any:
        """A value of it. ``pick`` is not asked where nothing is left to choose."""
        if self.subset is not None:
            return self._some(name, pick)
        if self.fixed:
            return self.low if self.choices is None else self.choices[0]
        found = pick(name, self)
        if self.choices is None:
            return found
        return self.choices[self.labels.index(found)]

    def _some(self, name: str, pick: Pick) -> list[Any]:
        assert isinstance(self.subset, tuple)
        found: list[Any] = []
        for item in self.subset:
            # none at all is no delta, so the last is taken where no other was
            last = item == self.subset[-1] and not found
            if last or pick(f"{name}/{item}", BOTH):
                found.append(item)
        return found

    def ends(self) -> Iterator[Any]:
        """Every choice, or the least and the greatest number."""
        yield from (self.low, self.high) if self.choices is None else self.labels

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is one of it."""
        if self.choices is not None:
            return label(value) in self.labels
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if not self.low <= value <= self.high or (self.whole and value != int(value)):
            return False
        if self.step is None:
            return True
        steps = (value - self.low) / self.step
        return math.isclose(steps, round(steps), abs_tol=1e-9)

    def resolved(self, layers: int | None, subject: str) -> Range:
        """With the indices of ``layers`` where it is a subset of those. Raises: ConfigError."""
        if self.subset != LAYERS:
            return self
        if layers is None:
            raise ConfigError(
                f"{subject}: the model's configuration tells no number of layers. Write them out: "
                "{subset: [0, 1, 2]}."
            )
        return dataclasses.replace(self, subset=tuple(range(layers)))

    def __str__(self) -> str:
        if self.choices is not None:
            return " | ".join(map(str, self.labels))
        if self.subset is not None:
            return f"some of {self.subset}"
        return f"{self.low:g} … {self.high:g}{', log' if self.log else ''}"


BOTH = Range(choices=(False, True))


def label(value: Any) -> Any:
    """A list as text; anything else as it is."""
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else value


def read_range(subject: str, value: Any) -> Range:
    """The range that ``value`` of a space's file describes. Raises: ConfigError."""
    if isinstance(value, list | tuple):
        return _choices(subject, value)
    if not isinstance(value, Mapping):
        return Range(choices=(value,))
    check_names(subject, value, KEYS)
    when = _when(subject, value.get("when", {}))
    of = value.get("of")
    if of is not None and not isinstance(of, str):
        raise ConfigError(f"{subject}: of must be the name of an option, got {of!r}. Write of: r.")
    kinds = [key for key in ("choices", "low", "subset") if key in value]
    if len(kinds) != 1:
        raise ConfigError(
            f"{subject} must have one of choices, low and high, or subset, got "
            f"{dict(value)}. Write {{low: 1e-4, high: 1e-2, log: true}}."
        )
    if kinds == ["choices"]:
        found = _choices(subject, value["choices"])
    elif kinds == ["low"]:
        found = _number(subject, value)
    else:
        found = _subset(subject, value["subset"])
    return dataclasses.replace(found, of=of, when=when)


def check_names(subject: str, found: Iterable[Any], known: Iterable[str]) -> None:
    """Raises: ConfigError for a name that is not ``known``, with the nearest of them."""
    known = list(known)
    for name in found:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=3)
            hint = f" (did you mean {' or '.join(close)}?)" if close else ""
            raise ConfigError(f"{subject}: no {name!r}{hint}. Known: {', '.join(known)}.")


def _choices(subject: str, values: Any) -> Range:
    if not isinstance(values, list | tuple) or not values:
        raise ConfigError(f"{subject} must be a list of one value or more, got {values!r}.")
    labels = [label(value) for value in values]
    for one, text in zip(values, labels, strict=True):
        if not isinstance(text, str | int | float | bool | None):
            raise ConfigError(f"{subject}: a choice must be a number, text or list, got {one!r}.")
        if isinstance(text, float) and not math.isfinite(text):
            raise ConfigError(f"{subject}: a choice must be finite, got {one!r}.")
    if len(set(map(repr, labels))) < len(labels):
        raise ConfigError(f"{subject} has a choice twice: {values!r}. Leave one out.")
    return Range(choices=tuple(tuple(v) if isinstance(v, list) else v for v in values))


def _number(subject: str, value: Mapping[str, Any]) -> Range:
    low, high, step = value["low"], value.get("high"), value.get("step")
    log = value.get("log", False)
    for name, number in (("low", low), ("high", high), ("step", step)):
        if number is None and name == "step":
            continue
        # YAML reads 1e-4 as text: its numbers have a point
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ConfigError(
                f"{subject}: {name} must be a number, got {number!r}. YAML wants 1.0e-4 for 1e-4."
            )
        if not math.isfinite(number):
            raise ConfigError(f"{subject}: {name} must be finite, got {number!r}.")
    assert high is not None  # a number by now
    if low > high:
        raise ConfigError(f"{subject}: low must be at most high, got {low} and {high}. Swap them.")
    if not isinstance(log, bool):
        raise ConfigError(f"{subject}: log must be true or false, got {log!r}.")
    if log and low <= 0:
        raise ConfigError(f"{subject}: log needs low above 0, got {low}. Leave log out.")
    if step is not None and (step <= 0 or log):
        raise ConfigError(
            f"{subject}: step must be above 0, and not beside log, got {step}. Leave one out."
        )
    if step is not None and not math.isclose((high - low) / step, round((high - low) / step)):
        raise ConfigError(
            f"{subject}: from low to high must be whole steps, got {low}, {high} and step {step}. "
            "Change high."
        )
    if isinstance(low, int) and isinstance(high, int) and isinstance(step, float):
        low, high = float(low), float(high)
    return Range(low=low, high=high, log=log, step=step)


def _subset(subject: str, value: Any) -> Range:
    if value == LAYERS:
        return Range(subset=LAYERS)
    plain = isinstance(value, list | tuple) and all(isinstance(item, str | int) for item in value)
    if not plain or len(set(value)) < max(1, len(value)):
        raise ConfigError(
            f"{subject}: subset must be {LAYERS!r} or a list of names or indices without "
            f"repetition, got {value!r}."
        )
    return Range(subset=tuple(value))


def _when(subject: str, value: Any) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{subject}: when must be a mapping, got {value!r}. Write when: {{r: [8, 16]}}."
        )
    return tuple(
        (str(name), tuple(map(label, v)) if isinstance(v, list | tuple) else (label(v),))
        for name, v in value.items()
    )
