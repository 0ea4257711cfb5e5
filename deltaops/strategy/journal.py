"""The log of a controller: a line of JSON for the start and for every action, on the disk at once.

    {"step": 0, "kind": "start", "seed": 0, "parts": [...], "delta": "LoRA(r=8)", …}
    {"step": 40, "moment": "after_step", "part": "policy", "kind": "freeze", "delta": "lora", …}

It holds no time and no random name, so that the same run writes the same bytes. A process that is
killed leaves whole lines, but for the last one; a run that goes on starts from those that its
checkpoint knows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaops.errors import CheckpointError, ConfigError
from deltaops.files import write_atomically


class Journal:
    """Lines in a file; without a path it keeps nothing."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        """Nothing is opened before the run begins."""
        self.path = None if path is None else Path(path)

    def check(self) -> None:
        """Raises: ConfigError where the file holds something already."""
        if self.path is None:
            return
        if self.path.is_dir():
            raise ConfigError(f"Controller: log={self.path} is a folder, expected a file's name.")
        if self.path.exists() and self.path.stat().st_size:
            raise ConfigError(
                f"Controller: log={self.path} is the log of another run, and this one is new. Name "
                "another file, delete that one, or resume its run."
            )

    def start(self, header: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> None:
        """Write the first lines. Raises: as :meth:`check`; CheckpointError."""
        self.check()
        self._write([header, *events])

    def check_resumed(self, header: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> None:
        """Raises: CheckpointError where the file's lines are those of another run."""
        lines = [_line(header), *map(_line, events)]
        if self.path is not None and self.path.exists():
            there = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            both = zip(there, lines, strict=False)
            number = next((i for i, (one, other) in enumerate(both, 1) if one != other), None)
            if number is not None:
                raise CheckpointError(
                    f"Controller: line {number} of log={self.path} is not that of the run which is "
                    "resumed. Name the log that this run wrote, or a new file."
                )

    def resume(self, header: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> None:
        """Drop what came after the checkpoint that knows ``events``; checked before."""
        self._write([header, *events])

    def _write(self, events: Sequence[Mapping[str, Any]]) -> None:
        if self.path is not None:
            text = "".join(map(_line, events))
            write_atomically(self.path, lambda part: part.write_text(text, encoding="utf-8"))

    def append(self, event: Mapping[str, Any]) -> None:
        """One more line. Raises: CheckpointError where the disk refuses."""
        if self.path is None:
            return
        try:
            # opened anew each time, which is seldom: no handle is lost in a fork or a copy
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(file, _line(event).encode())
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as error:
            raise CheckpointError(
                f"Controller: log={self.path} cannot be written: {error.strerror or error}. Free "
                "space, and resume the run from its last checkpoint."
            ) from error


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Header and events of a log; a line that was cut off at the end is left out.

    Raises: CheckpointError for a file that is no log.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
        found = [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a controller's log: {error}.") from error
    if not found or not isinstance(found[0], dict) or found[0].get("kind") != "start":
        raise CheckpointError(
            f"{path} is not a controller's log: it does not begin with a start. Name the file "
            "that a Controller was given as log."
        )
    return found


def _line(event: Mapping[str, Any]) -> str:
    return json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n"
