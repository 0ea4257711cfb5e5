"""Optuna's journal in a file whose lines are whole, whoever is killed and however full the disk.

Optuna's own backend locks by a file that outlives a killed process, and leaves half a line where
the disk is full, after which the journal can no longer be read. This one locks by ``flock``, which
ends with the process, and takes back what it could not write in full.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from deltaops.errors import CheckpointError


class Journal(BaseJournalBackend):
    """One JSON object a line; any number of processes of machines that share the file's locks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets = {0: 0}
        """Number of a log → where its line begins."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write all of ``logs`` or none. Raises: CheckpointError."""
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with self._locked() as handle:
            size = self._whole(handle)
            try:
                write_all(handle, text)
                os.fsync(handle)
            except OSError as error:
                os.ftruncate(handle, size)
                raise CheckpointError(
                    f"{self.path} could not be written: {error.strerror or error}. The study is as "
                    "it was before; free space and go on with `deltaops search resume "
                    f"{self.path.parent}`."
                ) from error

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Those from a number on. Raises: CheckpointError for a line that is no JSON."""
        number = log_number_from
        if number not in self._offsets:
            number = max(n for n in self._offsets if n <= log_number_from)
        try:
            with self.path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)  # no line that a full disk takes back
                file.seek(self._offsets[number])
                rest = file.read()
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}.") from error
        # what follows the last line's end is being written, or was when its writer was killed
        whole = rest[: rest.rfind(b"\n") + 1]
        offset = self._offsets[number]
        for line in whole.splitlines(keepends=True):
            offset += len(line)
            number += 1
            self._offsets[number] = offset
            if number <= log_number_from:
                continue
            try:
                found = json.loads(line)
            except ValueError as error:
                raise CheckpointError(
                    f"{self.path}, line {number}: damaged ({error}). Take the file out of a backup."
                ) from error
            yield found

    def _whole(self, handle: int) -> int:
        """The size without half a line that a killed writer left, which is cut off."""
        size = os.fstat(handle).st_size
        start = size
        while start > 0:
            begin = max(0, start - 65536)
            block = os.pread(handle, start - begin, begin)
            end = block.rfind(b"\n")
            if end >= 0:
                start = begin + end + 1
                break
            start = begin
        if start < size:
            os.ftruncate(handle, start)
        return start

    @contextmanager
    def _locked(self) -> Iterator[int]:
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} could not be opened: {error.strerror}. Choose another folder."
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)


def write_all(handle: int, text: bytes) -> None:
    """All of ``text``; a disk that fills up writes a part of it first, and then raises."""
    while text:
        text = text[os.write(handle, text) :]
