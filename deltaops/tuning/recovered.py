"""What few numbers recover of full prompts, task by task, in ``metrics.json``.

The file is written after each task, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaops.errors import ConfigError
from deltaops.files import remove_leftovers, write_json
from deltaops.methods.decoder import is_scores
from deltaops.surgery.files import MANIFEST

FILE = "metrics.json"

Scores = dict[str, float]


@dataclass(frozen=True)
class Recovered:
    """How a task was learnt by q numbers, and by a full prompt where that is known."""

    task: str
    texts: str
    """Fingerprint of its examples."""
    seen: bool
    """The decoder was fitted to the same examples."""
    start: Scores
    """Of the model alone."""
    tuned: Scores
    full: Scores | None

    @property
    def relative(self) -> float | None:
        """The tuned accuracy over the full prompt's; None where that is not known, or zero."""
        if self.full is None or self.full["accuracy"] == 0:
            return None
        return self.tuned["accuracy"] / self.full["accuracy"]


def mean_relative(rows: Iterable[Recovered]) -> float | None:
    """The mean recovered part of those that have one; None without any."""
    known = [row.relative for row in rows if row.relative is not None]
    return sum(known) / len(known) if known else None


def recovered_gain(rows: Iterable[Recovered]) -> float | None:
    """What is gained over the model alone, as a part of what full prompts gain, of all together.

    A sum over a sum: a task where a full prompt gains next to nothing says next to nothing.
    None where no full prompt is known, or they gain nothing.
    """
    known = [(row.start, row.tuned, row.full) for row in rows if row.full is not None]
    tuned = sum(some["accuracy"] - start["accuracy"] for start, some, _ in known)
    full = sum(whole["accuracy"] - start["accuracy"] for start, _, whole in known)
    return tuned / full if full > 0 else None


def write_recovered(out: Path, head: Mapping[str, Any], rows: Sequence[Recovered]) -> None:
    """Write ``rows`` below ``head``, which says how they were made. Raises: CheckpointError."""
    write_json(
        out / FILE,
        {
            **head,
            "tasks": [dataclasses.asdict(row) | {"relative": row.relative} for row in rows],
            "relative": {
                "seen": mean_relative(row for row in rows if row.seen),
                "unseen": mean_relative(row for row in rows if not row.seen),
            },
            "gain": {
                "seen": recovered_gain(row for row in rows if row.seen),
                "unseen": recovered_gain(row for row in rows if not row.seen),
            },
        },
    )


def read_recovered(out: Path, head: Mapping[str, Any]) -> list[Recovered]:
    """The tasks that are done in ``out``; none where it is new or empty.

    Raises: ConfigError where it holds anything but a run with this ``head``.
    """
    remove_leftovers(out)
    if not (out / FILE).is_file():
        refuse_used(out)
        return []
    try:
        found = json.loads((out / FILE).read_text(encoding="utf-8"))
        odd = [name for name in head if found[name] != head[name]]
        rows = [_row(task) for task in found["tasks"]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"--out {out}: its {FILE} is none of `deltaops intrinsic tune` "
            f"({type(error).__name__}). Choose another folder."
        ) from error
    if odd:
        raise ConfigError(
            f"--out {out} was begun with another {' and '.join(odd)}. Go on with the same, or "
            "choose another folder."
        )
    return [row for row in rows if (out / row.task / MANIFEST).is_file()]


def refuse_used(out: Path) -> None:
    """Raises: ConfigError where ``out`` has something in it, but for what a killed process left."""
    if out.is_dir():
        remove_leftovers(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} must be a new or an empty folder. Choose another.")


def _row(found: Any) -> Recovered:
    row = Recovered(**{field.name: found[field.name] for field in dataclasses.fields(Recovered)})
    known = [row.start, row.tuned, *([] if row.full is None else [row.full])]
    if not all(is_scores(scores) for scores in known):
        raise ValueError("scores")
    if not isinstance(row.task, str) or not isinstance(row.texts, str):
        raise ValueError("task")
    return row
