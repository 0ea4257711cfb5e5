"""The table of methods on disk: one JSON a machine and head, into which each line is merged."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from deltaops.errors import ConfigError
from deltaops.files import write_atomically, write_json
from deltaops.measure.store import slug

from .contenders import contenders
from .lines import Record, Settings
from .picture import draw_table
from .reader import NAMED, TRAINED
from .report import table_markdown

FILES = {NAMED: "methods", TRAINED: "methods-trained-head"}
"""Head → the end of the name of its table's files."""


@dataclass(frozen=True)
class Comparison:
    """All lines that there are so far, in the table's order."""

    settings: Settings
    machine: dict[str, Any]
    """Of the run that goes on with it; every line is of the same processor and threads."""
    records: tuple[Record, ...]

    def with_record(self, record: Record, machine: dict[str, Any]) -> Comparison:
        """The same table with this line, which keeps of an older one what it lacks."""
        found = {r.name: r for r in self.records}
        found[record.name] = record.updated(found.get(record.name))
        order = [*contenders(self.settings.head), *found]
        lines = sorted(found.values(), key=lambda r: order.index(r.name))
        return Comparison(self.settings, machine, tuple(lines))

    def as_json(self) -> dict[str, Any]:
        """Every field."""
        return {
            "settings": asdict(self.settings),
            "machine": self.machine,
            "methods": [r.as_json() for r in self.records],
        }


def origin_of(machine: dict[str, Any]) -> dict[str, str]:
    """What a line says of the run that measured it."""
    versions = {"deltaops": machine["deltaops"], **machine["versions"]}
    return {
        "command": machine["command"],
        "date": machine["date"],
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def file_of(folder: Path, machine: dict[str, Any], settings: Settings) -> Path:
    """Where this machine's table of this head lies in ``folder``."""
    few = "" if settings.few_shot is None else f"-{settings.few_shot}-shot"
    budget = "" if settings.parameters is None else f"-{settings.parameters}-parameters"
    return folder / f"{slug(machine)}-{FILES[settings.head]}{few}{budget}.json"


def read_table(path: Path) -> Comparison:
    """A table from its JSON. Raises: ConfigError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        given = dict(value["settings"])
        seed = given.pop("seed", 0)  # of every run, before lines had several
        settings = Settings(**given)
        records = tuple(_named_now(Record.of_json(r, seed), settings) for r in value["methods"])
        return Comparison(settings, value["machine"], records)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no table of `deltaops compare` ({type(error).__name__}: {error}). Move it "
            "elsewhere and measure again."
        ) from error


def _named_now(record: Record, settings: Settings) -> Record:
    """An old line under its present title; one that was sized has its size in it."""
    known = contenders(settings.head).get(record.name)
    if known is None or settings.parameters is not None:
        return record
    return replace(record, title=known.title)


def begin(path: Path, settings: Settings, machine: dict[str, Any]) -> Comparison:
    """The table to go on with, by a run on ``machine``: what ``path`` holds, or an empty one.

    Raises: ConfigError where the file was made with other settings.
    """
    if not path.exists():
        return Comparison(settings, machine, ())
    old = read_table(path)
    if old.settings != settings:
        was, now = asdict(old.settings), asdict(settings)
        odd = ", ".join(f"{k}={was[k]!r}" for k in was if was[k] != now[k])
        raise ConfigError(
            f"{path} was made with {odd}, and lines of other settings are no table. Use those, or "
            "another --out."
        )
    return replace(old, machine=machine)


def write_table(path: Path, table: Comparison) -> None:
    """JSON, report and picture, each whole or as it was. Raises: CheckpointError."""
    write_json(path, table.as_json())
    picture = path.with_suffix(".png")
    write_atomically(picture, partial(draw_table, records=table.records, subtitle=subtitle(table)))
    text = table_markdown(table.settings, table.machine, table.records, picture.name)
    write_atomically(path.with_suffix(".md"), lambda part: part.write_text(text, encoding="utf-8"))


def subtitle(table: Comparison) -> str:
    """Under the picture's title."""
    s, m = table.settings, table.machine
    few = "" if s.few_shot is None else f", {s.few_shot} texts a label"
    return (
        f"{s.model} on {s.train}{few}, {s.head} head, {s.steps} steps of {s.batch_size}; "
        f"{m['processor']}, {m['threads']} threads, {m['isa']}"
    )
