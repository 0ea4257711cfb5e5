"""Spaces: which deltas, of which settings, a search chooses among.

deltas:                      # one of these
  lora:                      # its name, and what it is in the grammar of --delta
    r: [4, 8, 16]            # any option of the method; see :mod:`.ranges`
    alpha: {choices: [1, 2], of: r}
    lr: {low: 3.0e-4, high: 1.0e-2, log: true}
  both:
    delta: lora:r=8+bitfit   # where the name does not say it
    lora.lr: 1.0e-3          # of one part of several; without its name, of all that have it
    bitfit.lr: 5.0e-3
batch_size: [8, 16]
schedule: [linear, cosine]
warmup: {low: 0.0, high: 0.2}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from deltaops.errors import ConfigError, DeltaopsError
from deltaops.methods import Combined, Delta, parts_of
from deltaops.surgery import plan
from deltaops.tuning.spec import parse_delta
from deltaops.tuning.workshop import check_rate

from .builtin import SPACES
from .candidate import SCHEDULES, Candidate
from .ranges import Pick, Range, check_names, label, read_range

DEFAULTS: dict[str, Any] = {"batch_size": 8, "schedule": "linear", "warmup": 0.06}
RATE = "lr"


@dataclass(frozen=True)
class Entry:
    """One of a space's deltas: what it is without options, and the ranges of these."""

    delta: Delta | Combined
    ranges: Mapping[str, Range]

    def parts(self) -> dict[str, Delta]:
        """Name → delta; a single one has the name ""."""
        return parts_of(self.delta)

    def targets(self, option: str) -> list[tuple[str, str]]:
        """The parts that ``option`` is of, each with the name of its field."""
        parts = self.parts()
        part, dot, field = option.rpartition(".")
        if dot:
            return [(part, field)] if part in parts else []
        return [
            (name, option)
            for name, delta in parts.items()
            if option == RATE or option in _fields(delta)
        ]

    def draw(self, title: str, pick: Pick) -> tuple[Delta | Combined, dict[str, float]]:
        """A delta, and the rate of each part. Raises: ConfigError of the method."""
        values: dict[str, Any] = {}
        changes: dict[str, dict[str, Any]] = {part: {} for part in self.parts()}
        for option, allowed in self.ranges.items():
            if any(label(values.get(name)) not in those for name, those in allowed.when):
                continue
            value = allowed.draw(f"{title}/{option}", pick)
            if allowed.of is not None:
                value = value * values[allowed.of]
            values[option] = value
            for part, field in self.targets(option):
                changes[part][field] = value
        rates = {part: float(change.pop(RATE)) for part, change in changes.items()}
        made = {
            part: dataclasses.replace(delta, **changes[part])  # type: ignore[type-var]  # every delta is a dataclass
            for part, delta in self.parts().items()
        }
        if isinstance(self.delta, Combined):
            return dataclasses.replace(self.delta, parts=made), rates
        return made[""], rates


@dataclass(frozen=True)
class Space:
    """What is searched; ``text`` is what it was read from, without names of built-in ones."""

    entries: Mapping[str, Entry]
    batch_size: Range
    schedule: Range
    warmup: Range
    text: Mapping[str, Any]

    def draw(self, pick: Pick) -> Candidate:
        """A candidate; ``pick`` decides what a range leaves open. Raises: ConfigError."""
        names = Range(choices=tuple(self.entries))
        name = names.draw("delta", pick)
        delta, rates = self.entries[name].draw(name, pick)
        return Candidate(
            delta, tuple(rates.items()), int(self.batch_size.draw("batch_size", pick)),
            str(self.schedule.draw("schedule", pick)), float(self.warmup.draw("warmup", pick)),
        )  # fmt: skip

    def resolved(self, model: nn.Module) -> Space:
        """With the model's layers in place of that word; every end of every range tried on it.

        Raises: ConfigError that names the option, for a value that its method or the model refuses.
        """
        config: Any = getattr(model, "config", None)
        count = getattr(config, "num_hidden_layers", None)
        entries = {
            title: Entry(
                entry.delta,
                {o: r.resolved(count, f"space: {title}: {o}") for o, r in entry.ranges.items()},
            )
            for title, entry in self.entries.items()
        }
        found = dataclasses.replace(self, entries=entries)
        for title, entry in entries.items():
            for option, chosen, make in _corners(title, entry):
                try:
                    plan(model, make())
                except DeltaopsError as error:
                    at = f": {option} = {chosen}" if option else ""
                    raise ConfigError(f"space: {title}{at}: {error}") from error
        return found


def _corners(title: str, entry: Entry) -> Iterator[tuple[str, Any, Callable[[], Delta | Combined]]]:
    """Each end of each range, the others at their first, those that it depends on where it is
    there: option, value, how the delta is made."""

    def needed(option: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, those in entry.ranges[option].when:
            found |= needed(name) | {f"{title}/{name}": those[0]}
        return found

    def at(chosen: Mapping[str, Any]) -> Callable[[], Delta | Combined]:
        def pick(name: str, allowed: Range) -> Any:
            return chosen[name] if name in chosen else next(iter(allowed.ends()))

        return lambda: entry.draw(title, pick)[0]

    yield "", None, at({})
    for option, allowed in entry.ranges.items():
        if allowed.subset is None and (allowed.when or not allowed.fixed):
            for value in allowed.ends():
                yield option, value, at(needed(option) | {f"{title}/{option}": value})


def load_space(source: str | Path | Mapping[str, Any]) -> Space:
    """A built-in space by its name, one in a YAML file, or one as a mapping.

    Raises: ConfigError that names the place, and the nearest names that there are.
    """
    if isinstance(source, Mapping):
        return read_space(source)
    if str(source) in SPACES:
        return read_space(SPACES[str(source)])
    path = Path(source)
    if not path.is_file():
        check_names("--space (a built-in one; or a YAML file, which this is not)", [str(source)],
                    SPACES)  # fmt: skip
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"--space {path} cannot be read as YAML: {error}") from error
    return read_space(found)


def read_space(text: Any) -> Space:
    """The space that a mapping describes. Raises: ConfigError."""
    if not isinstance(text, Mapping):
        raise ConfigError(f"space: must be a mapping with 'deltas', got {type(text).__name__}.")
    check_names("space", text, ("deltas", *DEFAULTS))
    deltas = text.get("deltas")
    if not isinstance(deltas, Mapping) or not deltas:
        raise ConfigError(
            "space: deltas must be a mapping of one delta or more, such as "
            "{lora: {r: [4, 8], lr: 0.001}}."
        )
    entries = {str(title): _entry(str(title), value) for title, value in deltas.items()}
    ranges = {
        name: read_range(f"space: {name}", text.get(name, value))
        for name, value in DEFAULTS.items()
    }
    _check_common(ranges)
    return Space(entries, **ranges, text=text)


def _entry(title: str, value: Any) -> Entry:
    subject = f"space: {title}"
    if not isinstance(value, Mapping):
        raise ConfigError(f"{subject} must be a mapping of options, got {value!r}.")
    if "/" in title:
        raise ConfigError(f"{subject}: a name must have no '/', which sets its options apart.")
    try:
        delta = parse_delta(str(value.get("delta", title)))
    except DeltaopsError as error:
        raise ConfigError(f"{subject}: {error}") from error
    ranges = {
        str(option): read_range(f"{subject}: {option}", allowed)
        for option, allowed in value.items()
        if option != "delta"
    }
    entry = Entry(delta, ranges)
    parts = entry.parts()
    known = [RATE, *dict.fromkeys(f for part in parts.values() for f in _fields(part))]
    known += [f"{n}.{f}" for n, part in parts.items() if n for f in (RATE, *_fields(part))]
    check_names(subject, ranges, known)
    before: list[str] = []
    for option, allowed in ranges.items():
        needed = [name for name, _ in allowed.when] + ([allowed.of] if allowed.of else [])
        check_names(f"{subject}: {option}: options before it", needed, before)
        _check_needed(f"{subject}: {option}", allowed, ranges)
        before.append(option)
    rated = {part for option in ranges if option.endswith(RATE) and _field(option) == RATE
             for part, _ in entry.targets(option)}  # fmt: skip
    missing = [part for part in parts if part not in rated]
    if missing:
        hint = f" for {', '.join(missing)}" if missing != [""] else ""
        raise ConfigError(
            f"{subject}: no learning rate{hint}. Write lr: {{low: 1.0e-4, high: 1.0e-2, log: "
            "true}."
        )
    for option, allowed in ranges.items():
        if _field(option) == RATE:
            if allowed.subset is not None or allowed.when:
                raise ConfigError(f"{subject}: {option} must be a number without conditions.")
            for end in allowed.ends():
                if isinstance(end, bool) or not isinstance(end, int | float):
                    raise ConfigError(
                        f"{subject}: {option} must be a number, got {end!r}. YAML wants 1.0e-4 "
                        "for 1e-4."
                    )
                if allowed.of is None:
                    check_rate(f"{subject}: {option}", float(end))
    return entry


def _check_needed(subject: str, allowed: Range, ranges: Mapping[str, Range]) -> None:
    """Raises: ConfigError for a condition that never holds, and for a factor of no number."""
    for name, those in allowed.when:
        other = ranges[name]
        if other.of is not None or other.subset is not None:
            raise ConfigError(f"{subject}: when {name}: that is no plain choice. Name another.")
        for value in those:
            if not other.holds(value):
                raise ConfigError(f"{subject}: when {name} is {value!r}: it is {other} only.")
    if allowed.of is None:
        return
    base = ranges[allowed.of]
    if not allowed.numeric or not base.numeric:
        raise ConfigError(
            f"{subject}: of {allowed.of} multiplies, and needs numbers on both sides."
        )
    if not set(base.when) <= set(allowed.when):
        raise ConfigError(
            f"{subject}: of {allowed.of}, which is not always there. Give it the same when."
        )


def _check_common(ranges: Mapping[str, Range]) -> None:
    for name, allowed in ranges.items():
        if allowed.subset is not None or allowed.of or allowed.when:
            raise ConfigError(f"space: {name} must be a value, a list or low and high.")
    check_names("space: schedule", ranges["schedule"].choices or (), SCHEDULES)
    for end in ranges["batch_size"].ends():
        if isinstance(end, bool) or not isinstance(end, int) or end < 1:
            raise ConfigError(f"space: batch_size must be an integer of 1 or more, got {end!r}.")
    for end in ranges["warmup"].ends():
        if isinstance(end, bool) or not isinstance(end, int | float) or not 0 <= end <= 1:
            raise ConfigError(f"space: warmup must be a part of the steps, 0 to 1, got {end!r}.")


def _field(option: str) -> str:
    return option.rpartition(".")[2]


def _fields(delta: Delta) -> list[str]:
    return [field.name for field in dataclasses.fields(delta) if field.init]  # type: ignore[arg-type]  # every delta is one
