"""The journal: whole lines, on a full disk too, and after a writer that was killed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltaops.errors import CheckpointError
from deltaops.search import journal
from deltaops.search.journal import Journal

from .conftest import told


def full_after(written: int) -> Callable[[int, bytes], int]:
    """A ``write`` that has room for so many bytes more, as a disk that fills up."""
    room = written

    def write(handle: int, text: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = text[:room]
        room -= len(part)
        return os.pwrite(handle, part, os.fstat(handle).st_size)

    return write


@pytest.mark.parametrize("room", [0, 5])
def test_a_full_disk_leaves_no_half_of_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    made = Journal(tmp_path / "journal.log")
    made.append_logs([{"a": 1}])
    before = made.path.read_bytes()
    with monkeypatch.context() as full:
        full.setattr(journal.os, "write", full_after(room))
        with pytest.raises(CheckpointError, match=r"No space left.*search resume"):
            made.append_logs([{"b": 2}])
    assert made.path.read_bytes() == before
    made.append_logs([{"c": 3}])
    assert list(Journal(made.path).read_logs(0)) == [{"a": 1}, {"c": 3}]


@pytest.mark.parametrize("torn", ['{"b"', '{"b":' + "1" * 70000])
def test_half_a_line_of_a_killed_writer_is_cut_off(tmp_path: Path, torn: str) -> None:
    made = Journal(tmp_path / "journal.log")
    made.append_logs([{"a": 1}])
    with made.path.open("a") as file:
        file.write(torn)
    assert list(made.read_logs(0)) == [{"a": 1}]
    made.append_logs([{"c": 3}])
    assert list(made.read_logs(1)) == [{"c": 3}]


def test_a_damaged_line_is_told_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    path.write_text('{"a": 1}\nnonsense\n{"c": 3}\n')
    with pytest.raises(CheckpointError, match=r"journal\.log, line 2: damaged"):
        list(Journal(path).read_logs(0))


def test_a_search_on_a_full_disk_stops_and_goes_on_later(
    search: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = search(tmp_path / "straight", trials=3)
    size = (tmp_path / "straight" / "journal.log").stat().st_size
    with monkeypatch.context() as full:
        full.setattr(journal.os, "write", full_after(size // 2))
        with pytest.raises(CheckpointError, match="No space left"):
            search(tmp_path / "full", trials=3)
    assert told(search(tmp_path / "full", trials=3)) == told(straight)
