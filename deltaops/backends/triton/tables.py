"""What was measured on a GPU: seconds of each plan for some calls, as a JSON file.

A table lies in this package (``tables/``) for GPUs that the project has measured, or in the cache
directory, where ``deltaops tune-kernels`` writes that of this machine, which is then preferred.
It holds seconds and no decisions: the same table always gives the same choice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from deltaops.errors import DataError
from deltaops.files import cache_dir, write_json

FORMAT = "deltaops kernel timings"
VERSION = 1

SHIPPED = Path(__file__).with_name("tables")

PLANS = ("fused", "split", "torch")
"""Who computes a GEMM with its rank part; see :mod:`planner`. Of equals the first is taken."""

DIRECTIONS = ("forward", "backward")

FAR = 2.0
"""How many doublings or halvings of its numbers a call may be away from one that was measured."""


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
        Dropout counts as half of one: it costs every plan alike."""
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

    def best(self, direction: str, possible: Sequence[str]) -> str | None:
        """The fastest of the ``possible`` plans; None where none of them was measured."""
        timed = self.seconds.get(direction, {})
        found = [plan for plan in possible if plan in timed]
        return min(found, key=lambda plan: timed[plan]) if found else None


@dataclass(frozen=True)
class Table:
    """All that was measured on one kind of GPU."""

    gpu: str
    measured: Mapping[str, Any]
    """Date, command and versions."""
    entries: tuple[Entry, ...]

    def nearest(self, setting: Setting) -> Entry | None:
        """The measured call that is most like ``setting``, or None where all are too far away."""
        if not self.entries:
            return None
        entry = min(self.entries, key=lambda e: e.setting.away(setting))
        return entry if entry.setting.away(setting) <= FAR else None

    def with_entries(self, fresh: Sequence[Entry], measured: Mapping[str, Any]) -> Table:
        """These besides the old ones, of which those of the same settings go."""
        new = {entry.setting for entry in fresh}
        kept = [entry for entry in self.entries if entry.setting not in new]
        entries = sorted([*kept, *fresh], key=lambda e: e.setting)
        return Table(self.gpu, measured, tuple(entries))


def file_name(gpu: str) -> str:
    """As in "nvidia-h100-80gb-hbm3.json"."""
    return "-".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split()) + ".json"


def own(gpu: str) -> Path:
    """Where the table that was measured on this machine lies."""
    return cache_dir() / "kernels" / file_name(gpu)


def find(gpu: str) -> tuple[Table, Path] | None:
    """The table for ``gpu`` and where it lies: this machine's own, or the package's.

    Raises: DataError for one that is damaged or of another GPU.
    """
    for path in (own(gpu), SHIPPED / file_name(gpu)):
        if path.exists():
            return read(path, gpu), path
    return None


def write(path: Path, table: Table) -> None:
    """Atomically. Raises: CheckpointError where it cannot be written."""
    write_json(
        path,
        {
            "format": FORMAT,
            "version": VERSION,
            "gpu": table.gpu,
            "measured": table.measured,
            "calls": [{**e.setting._asdict(), "seconds": e.seconds} for e in table.entries],
        },
    )


def read(path: Path, gpu: str) -> Table:
    """Raises: DataError where the file is damaged, of another format, or of another GPU."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refused(path, f"could not be read as JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _refused(path, f'has no "format": "{FORMAT}"')
    if content.get("version") != VERSION:
        raise _refused(path, f"is of version {content.get('version')!r}, not {VERSION}")
    if content.get("gpu") != gpu:
        raise _refused(path, f"was measured on {content.get('gpu')!r}, not on {gpu!r}")
    measured, calls = content.get("measured"), content.get("calls")
    if not isinstance(measured, dict) or not isinstance(calls, list):
        raise _refused(path, 'must have an object "measured" and a list "calls"')
    return Table(gpu, measured, tuple(_entry(path, i, call) for i, call in enumerate(calls)))


def _entry(path: Path, i: int, call: Any) -> Entry:
    where = f"call {i}"
    if not isinstance(call, dict) or set(call) != {*Setting._fields, "seconds"}:
        raise _refused(path, f"{where} must have {', '.join(Setting._fields)} and seconds")
    setting = Setting(*(call[name] for name in Setting._fields))
    for name, kind in zip(Setting._fields, _KINDS, strict=True):
        value = call[name]
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            raise _refused(path, f"{where}: {name} must be {kind.__name__}, not {value!r}")
    seconds = call["seconds"]
    if not isinstance(seconds, dict) or not set(seconds) <= set(DIRECTIONS):
        raise _refused(path, f"{where}: seconds must be of {' and '.join(DIRECTIONS)}")
    for direction, timed in seconds.items():
        if not isinstance(timed, dict) or not set(timed) <= set(PLANS):
            raise _refused(path, f"{where}: {direction} must have plans of {', '.join(PLANS)}")
        for plan, value in timed.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise _refused(path, f"{where}: {direction} {plan} must be seconds, not {value!r}")
    return Entry(setting, seconds)


def _refused(path: Path, what: str) -> DataError:
    return DataError(
        f"the kernel timings {path} cannot be used: the file {what}. "
        "Delete it, or measure this GPU again: deltaops tune-kernels --fresh."
    )
