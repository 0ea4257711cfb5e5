"""Files that are either as they were or complete: written beside their place, then renamed.

A reader, and a process that is killed at any moment, sees the old file or the new one. A folder
that does not exist yet appears whole; in one that exists, each file is replaced whole.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltaops.errors import CheckpointError

MARK = ".deltaops-partial-"
"""How the names of unfinished files begin."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in place.

    Raises: CheckpointError where the file cannot be written; ``path`` is then as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=MARK, suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise _failed(path, error) from error
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        sync(part)
        part.chmod(0o666 & ~umask())  # mkstemp makes it private, results are not
        os.replace(part, path)
    except OSError as error:
        raise _failed(path, error) from error
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically. Raises: CheckpointError."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


@contextmanager
def publishing(folder: Path, last: str) -> Iterator[Path]:
    """A scratch folder whose files move to ``folder`` when the block ends without an error.

    A new ``folder`` appears in one rename. In one that is there, each file is replaced whole, the
    one named ``last`` after all others: it may rely on them being at least as new as itself.
    Raises: CheckpointError where the disk refuses; each file is then old or new, never torn.
    """
    scratch: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=MARK, dir=folder.parent))
        yield scratch
        for file in scratch.iterdir():
            sync(file)
        scratch.chmod(0o777 & ~umask())
        if folder.exists() and any(folder.iterdir()):
            for file in sorted(scratch.iterdir(), key=lambda f: (f.name == last, f.name)):
                os.replace(file, folder / file.name)
            sync(folder)
        else:
            os.replace(scratch, folder)  # an empty folder may stand there
        sync(folder.parent)
    except OSError as error:
        raise _failed(folder, error) from error
    finally:
        if scratch is not None and scratch.exists():
            shutil.rmtree(scratch)


def check_folder(folder: Path) -> None:
    """Make sure that files can be written to ``folder``, before hours are spent on them.

    Raises: CheckpointError where they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=MARK, dir=folder):
            pass
    except OSError as error:
        raise _failed(folder, error) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process or thread at a time, of all that lock ``path``: to read a file, change it and
    replace it. An empty ``.lock`` file stays beside it; the lock itself ends with the process.

    Raises: CheckpointError where the folder cannot be written or the system cannot lock.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _failed(path, error) from error
    try:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(handle, msvcrt.LK_LOCK, 1)  # waits for ten seconds
            else:
                import fcntl

                fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise _failed(path, error) from error
        yield
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Delete the scratch files that a killed process left in ``folder``."""
    if not folder.is_dir():
        return
    for part in folder.glob(MARK + "*"):
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


def _failed(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} could not be written: {error.strerror or error}. What stood there before is as it "
        "was; free space or choose another place and try again."
    )


def sync(path: Path) -> None:
    """Ask the operating system to put ``path`` on the disk now."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder for this
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def umask() -> int:
    """What new files are not allowed here."""
    mask = os.umask(0)  # there is no way to read it without setting it
    os.umask(mask)
    return mask


def cache_dir() -> Path:
    """Where deltaops keeps what it can make again: ``$DELTAOPS_CACHE``, else the platform's own
    place. Not created here."""
    override = os.environ.get("DELTAOPS_CACHE")
    if override:
        return Path(override).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "deltaops"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "deltaops"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaops"
