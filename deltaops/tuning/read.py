"""Texts and labels out of JSONL, CSV and text files; every fault is told by its line number."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaops.errors import DataError

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".txt": "text"}
MAX_SHOWN = 8
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Example:
    """A text, its label where one was asked for, and the line it starts on (from 1)."""

    text: str
    label: str | None
    line: int


@dataclass(frozen=True)
class Columns:
    """Which fields to read; ``label`` is None where no label is wanted."""

    text: str = "text"
    label: str | None = None


class _BadLine(Exception):
    """A fault in one line; collected, so that one message shows them all."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(f"line {line}: {why}")


def read_examples(source: str, columns: Columns) -> list[Example]:
    """Read a file, or a data set of the ``datasets`` library where no such file exists.

    Args:
        source: a ``.jsonl``, ``.csv``, ``.tsv`` or text file, or ``name[:config][@split]``.
        columns: the fields that hold the text and the label; a text file is one text.
    Raises: DataError with the line numbers of what is broken, or where nothing is left to read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        kind = SUFFIXES.get(path.suffix.lower(), "text")
        if kind == "text" and columns.label is not None:
            raise DataError(
                f"{path}: classification needs a label beside each text, and a "
                f"{path.suffix or 'text'} file has none. Give a CSV or JSONL file."
            )
        examples = _collect(source, _READERS[kind](_decode(path), path, columns))
    elif path.exists():
        raise DataError(f"{path} is a folder, expected a file. Name the file to read.")
    elif path.suffix.lower() in SUFFIXES or source.startswith((".", "/", "~")):
        raise DataError(
            f"{path}: there is no such file. Check the path (relative to {Path.cwd()})."
        )
    else:
        examples = _from_datasets(source, columns)
    if not examples:
        raise DataError(f"{source}: holds no text. Give a file with at least one example.")
    return examples


def _decode(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: expected UTF-8, got the byte 0x{raw[error.start]:02x} "
            f"({error.reason}). Convert the file, e.g. with `iconv -t utf-8`."
        ) from error


def _collect(source: str, rows: Iterator[Example | _BadLine]) -> list[Example]:
    good: list[Example] = []
    bad: list[_BadLine] = []
    for row in rows:
        if isinstance(row, _BadLine):
            bad.append(row)
        else:
            good.append(row)
    if bad:
        shown = "\n".join(f"  {fault}" for fault in bad[:MAX_SHOWN])
        rest = f"\n  and {len(bad) - MAX_SHOWN} more" if len(bad) > MAX_SHOWN else ""
        lines = "1 line is" if len(bad) == 1 else f"{len(bad)} lines are"
        raise DataError(
            f"{source}: {lines} broken, nothing was trained.\n{shown}{rest}\n"
            "Mend or remove them, then start again."
        )
    return good


def _example(record: dict[str, Any], columns: Columns, line: int) -> Example | _BadLine:
    """An example of a record with named fields, or what is wrong with it."""
    values: list[str | None] = []
    for column in (columns.text, columns.label):
        if column is None:
            values.append(None)
            continue
        if column not in record:
            return _BadLine(line, f"no field {column!r}, only {_names(record)}")
        value = record[column]
        is_label = column == columns.label
        if is_label and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            return _BadLine(line, f"{column!r} must be text, got {type(value).__name__}")
        if not value.strip():
            return _BadLine(line, f"{column!r} is empty")
        if _SURROGATE.search(value):
            return _BadLine(line, f"{column!r} has half of a surrogate pair, which is no character")
        values.append(value)
    text, label = values
    assert text is not None  # columns.text always names a field
    return Example(text, label, line)


def _names(record: dict[str, Any]) -> str:
    return ", ".join(repr(name) for name in record) or "none"


def _read_jsonl(text: str, path: Path, columns: Columns) -> Iterator[Example | _BadLine]:
    # split("\n"), since splitlines() also breaks at U+2028, which JSON allows inside a string
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            yield _BadLine(number, f"not JSON ({error.msg} at column {error.colno})")
            continue
        except ValueError as error:  # a number of thousands of digits
            yield _BadLine(number, f"not usable JSON ({error})")
            continue
        except RecursionError:
            yield _BadLine(number, "not usable JSON (nested too deeply)")
            continue
        if isinstance(record, dict):
            yield _example(record, columns, number)
        else:
            yield _BadLine(number, f"expected a JSON object, got {type(record).__name__}")


def _read_csv(text: str, path: Path, columns: Columns) -> Iterator[Example | _BadLine]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # The reader's state is lost after a fault, so what follows cannot be judged.
            yield _BadLine(start, f"not CSV ({error}); lines after it were not read")
            return
        line, start = start, reader.line_num + 1
        if not row:
            continue
        if header is None:
            header = row
            missing = [c for c in (columns.text, columns.label) if c is not None and c not in row]
            if missing:
                raise DataError(
                    f"{path}, line {line}: no column {', '.join(map(repr, missing))}, the header "
                    f"has {', '.join(map(repr, row))}. Name yours with --text-column and "
                    "--label-column."
                )
        elif len(row) != len(header):
            yield _BadLine(line, f"{len(row)} fields where the header has {len(header)}")
        else:
            yield _example(dict(zip(header, row, strict=True)), columns, line)


def _read_text(text: str, path: Path, columns: Columns) -> Iterator[Example | _BadLine]:
    if text.strip():
        yield Example(text, None, 1)


_READERS: dict[str, Callable[[str, Path, Columns], Iterator[Example | _BadLine]]] = {
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "text": _read_text,
}


def _from_datasets(source: str, columns: Columns) -> list[Example]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source}: there is no such file, and a data set by that name needs the `datasets` "
            "library. Check the path, or `pip install datasets`."
        ) from error
    name, _, split = source.partition("@")
    name, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    # The library raises its own, fsspec's, huggingface_hub's and pyarrow's errors here.
    except Exception as error:
        raise DataError(
            f"{source}: there is no such file, and `datasets` could not load it as "
            f"name[:config][@split]: {error}"
        ) from error
    wanted = [c for c in (columns.text, columns.label) if c is not None]
    missing = [c for c in wanted if c not in rows.column_names]
    if missing:
        raise DataError(
            f"{source}: no column {', '.join(map(repr, missing))}, it has "
            f"{', '.join(map(repr, rows.column_names))}. Name yours with --text-column and "
            "--label-column."
        )
    return _collect(source, (_example(row, columns, i) for i, row in enumerate(rows, 1)))
