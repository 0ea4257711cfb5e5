"""What was measured on a GPU: seconds of each plan for some calls, as a JSON file.

A table lies in this package (``timings/``) for GPUs that the project has measured, and in the cache
directory, where ``deltaops tune-kernels`` writes that of this machine, which is asked first.
They hold seconds and no decisions: the same tables always give the same choice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from deltaops.errors import DataError
from deltaops.files import cache_dir, locked, write_json

FORMAT = "deltaops kernel timings"
VERSION = 2

SHIPPED = Path(__file__).with_name("timings")

PLANS = ("fused", "split", "torch", "persistent", "cuda", "ampere", "decode", "beside", "produced")
"""Who computes a GEMM with its rank part; see :mod:`planner`. Of equals the first is taken."""

DIRECTIONS = ("forward", "backward")

FAR = 2.0
"""How many doublings or halvings of its numbers a call may be away from one that was measured.
Chosen, not measured."""
MOST = 2**63
"""Numbers of a table are below it."""


class Setting(NamedTuple):
    """What a choice depends on. dtypes as in "bfloat16"."""

    m: int
    n: int
    k: int
    rank: int
    """Of all branches together."""
    dtype: str
    adapter: str
    """Of the branches; that of x where there is none."""
    dropout: bool

    def __str__(self) -> str:
        adapters = "" if self.adapter == self.dtype else f" with {self.adapter} adapters"
        dropout = ", dropout" if self.dropout else ""
        return f"{self.m}×{self.n}×{self.k} r={self.rank} {self.dtype}{adapters}{dropout}"

    def away(self, other: Setting) -> float:
        """Doublings between two calls, over all their numbers; infinite between other kinds.
        Dropout counts as half of one; that is chosen, not measured."""
        if self[4:6] != other[4:6] or (self.rank == 0) != (other.rank == 0):
            return math.inf
        pairs = zip(self[:4], other[:4], strict=True)
        doublings = sum(abs(math.log2(max(1, a) / max(1, b))) for a, b in pairs)
        return doublings + 0.5 * (self.dropout != other.dropout)


_KINDS: tuple[type, ...] = (int, int, int, int, str, str, bool)


@dataclass(frozen=True)
class Entry:
    """One measured call: direction → plan → seconds."""

    setting: Setting
    seconds: Mapping[str, Mapping[str, float]]
    measured: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Direction → date and versions of the run that measured it."""

    def best(self, direction: str, possible: Sequence[str]) -> str | None:
        """The fastest of the ``possible`` plans; None where none of them was measured."""
        timed = self.seconds.get(direction, {})
        found = [plan for plan in possible if plan in timed]
        return min(found, key=lambda plan: timed[plan]) if found else None


@dataclass(frozen=True)
class Table:
    """All that was measured on one kind of GPU."""

    gpu: str
    entries: tuple[Entry, ...]

    def nearest(self, setting: Setting, direction: str) -> Entry | None:
        """The call with a measured ``direction`` that is most like ``setting``, or None where all
        are too far away."""
        measured = [e for e in self.entries if e.seconds.get(direction)]
        if not measured:
            return None
        entry = min(measured, key=lambda e: e.setting.away(setting))
        return entry if entry.setting.away(setting) <= FAR else None

    def with_entries(self, fresh: Sequence[Entry]) -> Table:
        """These besides the old ones. Of a setting that is in both, a direction that was measured
        again replaces the old one, with its facts; the other stays."""
        entries = {entry.setting: entry for entry in self.entries}
        for new in fresh:
            old = entries.get(new.setting, Entry(new.setting, {}))
            entries[new.setting] = Entry(
                new.setting, {**old.seconds, **new.seconds}, {**old.measured, **new.measured}
            )
        return Table(self.gpu, tuple(entries[setting] for setting in sorted(entries)))


class Found(NamedTuple):
    """What there is for a GPU."""

    tables: tuple[tuple[Table, str], ...]
    """In the order in which they are asked, each with where it lies."""
    notes: tuple[str, ...]
    """Why one was left out."""


class OtherVersion(DataError):
    """A table in the format of another deltaops: not damaged, of no use."""

    def __init__(self, message: str, version: object) -> None:
        super().__init__(message)
        self.version = version


def file_name(gpu: str) -> str:
    """The name in letters and digits, and a hash: two names may differ in other characters only."""
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in gpu.lower()).split()
    return "-".join([*words, hashlib.sha256(gpu.encode()).hexdigest()[:8]]) + ".json"


def own(gpu: str) -> Path:
    """Where the table that was measured on this machine lies. Raises: RuntimeError where there is
    no home directory."""
    return cache_dir() / "kernels" / file_name(gpu)


def find(gpu: str) -> Found:
    """The tables for ``gpu``: this machine's own, then the package's.

    One that cannot be reached, or that another version of deltaops wrote, is left out with a note:
    calls must go where there is no home directory, and after an update.
    Raises: DataError for one that is there and is damaged or of another GPU.
    """
    tables, notes = [], []
    for place in (own, lambda gpu: SHIPPED / file_name(gpu)):
        try:
            path = place(gpu)
            text = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
            notes.append(f"a place of kernel timings cannot be reached ({error})")
            continue
        try:
            tables.append((_parsed(path, text, gpu), str(path)))
        except OtherVersion as error:
            notes.append(f"{path} is of version {error.version}, not {VERSION}, and left out")
    return Found(tuple(tables), tuple(notes))


def check(path: Path, gpu: str) -> None:
    """Whether :func:`add` can add to the table. Raises: DataError where it is damaged, of another
    GPU, or of a later version."""
    _old(path, gpu)


def add(
    path: Path,
    gpu: str,
    entries: Sequence[Entry],
    facts: Mapping[str, Any],
    fresh: bool = False,
) -> None:
    """Add what was measured to the table there, which other processes may add to meanwhile.

    Without an entry nothing is written.

    Args:
        facts: date and versions, JSON; kept with each of ``entries``.
        fresh: forget what the table has. A table of an earlier version is forgotten always.
    Raises: DataError as :func:`check`; CheckpointError where it cannot be written.
    """
    new = [replace(e, measured=dict.fromkeys(e.seconds, facts)) for e in entries if e.seconds]
    if not new:
        return
    with locked(path):
        old = Table(gpu, ()) if fresh else _old(path, gpu)
        write(path, old.with_entries(new))


def _old(path: Path, gpu: str) -> Table:
    if not path.exists():
        return Table(gpu, ())
    try:
        return read(path, gpu)
    except OtherVersion as error:
        if isinstance(error.version, int) and error.version < VERSION:
            return Table(gpu, ())
        raise


def write(path: Path, table: Table) -> None:
    """Atomically. Raises: CheckpointError where it cannot be written."""
    runs: list[Mapping[str, Any]] = []
    calls = []
    for entry in table.entries:
        numbers = {}
        for direction, facts in entry.measured.items():
            if facts not in runs:
                runs.append(facts)
            numbers[direction] = runs.index(facts)
        calls.append({**entry.setting._asdict(), "seconds": entry.seconds, "runs": numbers})
    head = {"format": FORMAT, "version": VERSION, "gpu": table.gpu}
    write_json(path, {**head, "runs": runs, "calls": calls})


def read(path: Path, gpu: str) -> Table:
    """Raises: DataError where the file cannot be read, is damaged, of another format or of another
    GPU; of that, OtherVersion where another deltaops wrote it."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise _refused(path, f"could not be read: {error}") from error
    return _parsed(path, text, gpu)


def _parsed(path: Path, text: bytes, gpu: str) -> Table:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"could not be read as JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _refused(path, f'has no "format": "{FORMAT}"')
    version = content.get("version")
    if type(version) is not int:
        raise _refused(path, f"is of version {version!r}, not {VERSION}")
    if version != VERSION:
        message = str(_refused(path, f"is of version {version}, not {VERSION}"))
        raise OtherVersion(message, version)
    if content.get("gpu") != gpu:
        raise _refused(path, f"was measured on {content.get('gpu')!r}, not on {gpu!r}")
    runs, calls = content.get("runs"), content.get("calls")
    if not (isinstance(runs, list) and all(isinstance(run, dict) for run in runs)):
        raise _refused(path, 'must have a list "runs" of objects')
    if not isinstance(calls, list):
        raise _refused(path, 'must have a list "calls"')
    return Table(gpu, tuple(_entry(path, i, call, runs) for i, call in enumerate(calls)))


def _entry(path: Path, i: int, call: Any, runs: Sequence[Mapping[str, Any]]) -> Entry:
    where = f"call {i}"
    if not isinstance(call, dict) or set(call) != {*Setting._fields, "seconds", "runs"}:
        raise _refused(path, f"{where} must have {', '.join(Setting._fields)}, seconds and runs")
    setting = Setting(*(call[name] for name in Setting._fields))
    for name, kind in zip(Setting._fields, _KINDS, strict=True):
        value = call[name]
        if type(value) is not kind or (isinstance(value, int) and not 0 <= value < MOST):
            raise _refused(path, f"{where}: {name} must be {kind.__name__}, not {value!r}")
    seconds = call["seconds"]
    if not isinstance(seconds, dict) or not set(seconds) <= set(DIRECTIONS):
        raise _refused(path, f"{where}: seconds must be of {' and '.join(DIRECTIONS)}")
    for direction, timed in seconds.items():
        if not isinstance(timed, dict) or not set(timed) <= set(PLANS):
            raise _refused(path, f"{where}: {direction} must have plans of {', '.join(PLANS)}")
        for plan, value in timed.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < MOST:
                raise _refused(path, f"{where}: {direction} {plan} must be seconds, not {value!r}")
    numbers = call["runs"]
    if not isinstance(numbers, dict) or set(numbers) != set(seconds):
        raise _refused(path, f"{where}: runs must name the run of each direction")
    for number in numbers.values():
        if type(number) is not int or not 0 <= number < len(runs):
            raise _refused(path, f"{where}: runs must be below {len(runs)}, not {number!r}")
    return Entry(setting, seconds, {d: runs[number] for d, number in numbers.items()})


def _refused(path: Path, what: str) -> DataError:
    return DataError(
        f"the kernel timings {path} cannot be used: the file {what}. "
        "Delete it, or measure this GPU again: deltaops tune-kernels --fresh."
    )
