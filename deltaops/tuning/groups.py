"""Tasks out of one labelled text file: the texts of the labels that belong together, a file each.

Which labels do is said by a JSON object: the name of each task, and a list of its labels.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaops.errors import ConfigError, DataError
from deltaops.files import write_atomically

from .read import Example

NAME = re.compile(r"\w[\w .:@+-]*")
"""Of a task: its file's and its folder's too."""
Groups = dict[str, tuple[str, ...]]
"""Task → its labels."""


def read_groups(path: Path) -> Groups:
    """The groups in a JSON file. Raises: ConfigError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_doubles)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"--groups {path} cannot be read: {error}. Give a JSON file such as "
            '{"cards": ["card_arrival", "card_linking"]}.'
        ) from error
    if (
        not isinstance(found, dict)
        or not found
        or not all(_are_labels(labels) for labels in found.values())
    ):
        raise ConfigError(
            f"--groups {path} must be an object of lists of two labels or more, such as "
            '{"cards": ["card_arrival", "card_linking"]}.'
        )
    for name in found:
        if NAME.fullmatch(name) is None:
            raise ConfigError(
                f"--groups {path}: a task cannot be called {name!r}, since its file is. Begin with "
                "a letter or digit."
            )
    cased: dict[str, str] = {}
    for name in found:
        other = cased.setdefault(name.casefold(), name)
        if other != name:
            raise ConfigError(
                f"--groups {path}: tasks cannot be called {other!r} and {name!r}, which are one "
                "file where case does not count. Rename one."
            )
    every = [label for labels in found.values() for label in labels]
    twice = sorted({label for label in every if every.count(label) > 1})
    if twice:
        raise ConfigError(
            f"--groups {path}: {twice[0]!r} stands there twice. A label belongs to one task."
        )
    return {name: tuple(labels) for name, labels in found.items()}


def grouped(examples: Iterable[Example], groups: Groups) -> tuple[dict[str, list[Example]], int]:
    """The examples of each group, in their order, and how many belong to none.

    Raises: DataError for a label that no example has.
    """
    of = {label: name for name, labels in groups.items() for label in labels}
    found: dict[str, list[Example]] = {name: [] for name in groups}
    rest = 0
    for example in examples:
        name = of.get(example.label or "")
        if name is None:
            rest += 1
        else:
            found[name].append(example)
    for name, labels in groups.items():
        missing = set(labels) - {example.label for example in found[name]}
        if missing:
            raise DataError(
                f"group {name!r}: no text has the label {sorted(missing)[0]!r}. Check its "
                "spelling, and --label-column."
            )
    return found, rest


def write_tasks(out: Path, tasks: Mapping[str, Sequence[Example]]) -> None:
    """``out/TASK.csv`` with the columns text and label. Raises: CheckpointError."""
    for name, examples in tasks.items():
        table = io.StringIO()
        # quoted, or a carriage return in a text would end its row
        rows = csv.writer(table, lineterminator="\n", quoting=csv.QUOTE_ALL)
        rows.writerow(("text", "label"))
        rows.writerows((example.text, example.label) for example in examples)
        raw = table.getvalue().encode()  # as bytes, so that no system changes the ends of lines
        write_atomically(
            out / f"{name}.csv",
            lambda part, raw=raw: part.write_bytes(raw),  # type: ignore[misc]  # a default, to bind it now
        )


def _without_doubles(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of equal keys ``json`` itself keeps the last. Raises: ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return found


def _are_labels(found: object) -> bool:
    return (
        isinstance(found, list)
        and len(found) > 1
        and all(isinstance(label, str) and label for label in found)
    )
