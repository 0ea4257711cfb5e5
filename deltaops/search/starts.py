"""Candidates to begin with, as texts: ``lora:r=8,alpha=16; lr=0.001, batch_size=16``.

Before ";" stands a delta in the grammar of ``--delta``, after it rates, batch size and schedule.
What is left out is the first value that the space has. ``suggest`` stands for what
:func:`deltaops.strategy.suggest` recommends, as far as the space has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from deltaops.errors import ConfigError
from deltaops.strategy.features import Task as Texts
from deltaops.strategy.suggest import suggest
from deltaops.tuning.spec import parse_delta

from .ranges import Range, check_names, label
from .space import DEFAULTS, RATE, Entry, Space

Params = dict[str, Any]
SUGGEST = "suggest"
LOOKED_AT = 5
"""Candidates of a suggestion."""


def resolved(
    starts: Sequence[str], space: Space, model: nn.Module, texts: Callable[[], Texts]
) -> list[str]:
    """``starts`` with what "suggest" stands for, the best first.

    Args:
        starts: as the settings have them.
        space: of the search.
        model: without a delta.
        texts: reads the task's, where they are needed.
    Raises: ConfigError for one that is not in the space, and where nothing suggested is.
    """
    found: list[str] = []
    for start in starts:
        found += _suggested(space, model, texts()) if start == SUGGEST else [start]
    for start in found:
        params_of(space, start)
    return list(dict.fromkeys(found))


def _suggested(space: Space, model: nn.Module, texts: Texts) -> list[str]:
    kept, why = [], []
    for one in suggest(model, texts, count=LOOKED_AT).candidates:
        try:
            params_of(space, one.spec)
        except ConfigError as error:
            why.append(str(error))
        else:
            kept.append(one.spec)
    if not kept:
        raise ConfigError(f"--start {SUGGEST}: nothing of it is in the space: {' '.join(why)}")
    return kept


def params_of(space: Space, start: str) -> Params:
    """The parameters of ``space`` at which it is ``start``. Raises: ConfigError where none are."""
    spec, _, rest = start.partition(";")
    delta = parse_delta(spec.strip())
    given = _given(start, rest)
    kinds = _kinds(Entry(delta, {}))
    why: list[str] = []
    for title, entry in space.entries.items():
        if _kinds(entry) != kinds:
            continue
        found = _match(title, entry, Entry(delta, {}), given)
        if isinstance(found, str):
            why.append(f"{title}: {found}")
            continue
        common, wrong = _common(space, given)
        if wrong:
            why.append(wrong)
            continue
        known = {*DEFAULTS, *(o for o in entry.ranges if o.rpartition(".")[2] == RATE)}
        check_names(f"start {start!r}", given, known)
        several = {"delta": title} if len(space.entries) > 1 else {}
        return several | found | common
    reason = "; ".join(why) or f"the space has {', '.join(space.entries)}"
    raise ConfigError(f"start {start!r} is not in the space: {reason}.")


def _kinds(entry: Entry) -> dict[str, type]:
    return {name: type(part) for name, part in entry.parts().items()}


def _given(start: str, rest: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise ConfigError(f"start {start!r}: expected name=value after ';', got {item!r}.")
        found[name] = _read(value)
    return found


def _read(value: str) -> Any:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _match(title: str, entry: Entry, start: Entry, given: dict[str, Any]) -> Params | str:
    """The entry's parameters, or why the start is not one of its deltas."""
    found: Params = {}
    values: dict[str, Any] = {}
    asked = start.parts()
    free = {target for option in entry.ranges for target in entry.targets(option)}
    for part, delta in entry.parts().items():
        for field, fixed in vars(delta).items():
            if (part, field) not in free and getattr(asked[part], field) != fixed:
                return f"{field} is {fixed!r} there"
    for option, allowed in entry.ranges.items():
        targets = entry.targets(option)
        if any(label(values.get(name)) not in those for name, those in allowed.when):
            for part, field in targets:
                if getattr(asked[part], field) != getattr(entry.parts()[part], field):
                    return f"{option} is not chosen beside such a {allowed.when[0][0]}"
            continue
        if targets[0][1] == RATE:
            value = given.get(option, _first(allowed))
        else:
            first, *others = [getattr(asked[part], field) for part, field in targets]
            if any(other != first for other in others):
                return f"{option} is the same in all parts"
            value = values[option] = first
            if allowed.of is not None:
                value = value / values[allowed.of]
        wrong = _put(found, f"{title}/{option}", allowed, value)
        if wrong:
            return wrong
    return found


def _common(space: Space, given: dict[str, Any]) -> tuple[Params, str | None]:
    found: Params = {}
    for name in DEFAULTS:
        allowed: Range = getattr(space, name)
        wrong = _put(found, name, allowed, given.get(name, _first(allowed)))
        if wrong:
            return {}, wrong
    return found, None


def _first(allowed: Range) -> Any:
    return next(iter(allowed.ends()))


def _put(found: Params, name: str, allowed: Range, value: Any) -> str | None:
    """Note a parameter where something is left to choose; or say why it cannot be."""
    if allowed.subset is not None:
        items = list(allowed.subset)
        chosen = items if value is None else list(value)
        if not chosen or not set(chosen) <= set(items):
            return f"{name} must be {allowed}, got {value!r}"
        for item in items[:-1]:
            found[f"{name}/{item}"] = item in chosen
        if any(item in chosen for item in items[:-1]):
            found[f"{name}/{items[-1]}"] = items[-1] in chosen
        return None
    if not allowed.holds(value):
        return f"{name} must be {allowed}, got {value!r}"
    if allowed.fixed:
        return None
    if allowed.choices is None:
        found[name] = int(value) if allowed.whole else float(value)
    else:
        found[name] = allowed.labels[allowed.labels.index(label(value))]
    return None
