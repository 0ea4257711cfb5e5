"""Which processes of a study are alive: each holds a lock, which the system ends with it.

There is no heartbeat to wait for. A process that was killed, or whose machine was, holds no lock,
and its trials are free at once; one that is merely slow keeps them. Machines that share a folder
must share ``flock`` too (a local disk, NFS 4; not NFS 3 without its lock manager).
"""

from __future__ import annotations

import fcntl
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltaops.errors import CheckpointError

FOLDER = "workers"


@contextmanager
def working(study: Path) -> Iterator[str]:
    """Inside, this process counts as alive under the name that it gets."""
    name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    path = study / FOLDER / name
    hidden = path.with_name(f".{name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in [p.name for p in path.parent.iterdir() if not p.name.startswith(".")]:
            alive(study, other)
        handle = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX)
        hidden.rename(path)  # seen once it is locked, or another would take it for a dead one's
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written: {error.strerror}. Free space or choose another folder."
        ) from error
    try:
        yield name
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def alive(study: Path, name: str) -> bool:
    """Whether the process of that name runs; the file of one that does not is deleted."""
    path = study / FOLDER / name
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    path.unlink(missing_ok=True)
    return False
