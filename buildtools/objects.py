"""Compile and link: objects are named by the hash of everything that goes into them.

So a changed flag, compiler, source or header makes another object, and an unchanged one is used
again; setuptools' own check looks at a module's sources only, and would keep a stale link. What a
compiler said lies beside its object, as .log.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .toolchain import BuildFailure

KEY_LENGTH = 16
Say = Callable[[str], None]


@dataclass(frozen=True)
class Unit:
    """One source file, the command that compiles it (without -c and -o) and what else it reads."""

    source: Path
    command: tuple[str, ...]
    reads: tuple[Path, ...]  # folders: any file in them may be included
    compiler_version: str

    def object(self, folder: Path) -> Path:
        """Where compile_all() puts its object."""
        return folder / f"{self.source.parent.name}-{self.source.stem}-{self.key()}.o"

    def key(self) -> str:
        """The hash; what a folder holds counts, not where it lies."""
        command = "\0".join((*self.command, self.compiler_version, self.source.name))
        for number, folder in enumerate(self.reads):
            command = command.replace(str(folder), f"<{number}>")
        digest = hashlib.sha256(command.encode())
        files = {path for folder in self.reads for path in folder.iterdir() if path.is_file()}
        for path in sorted(files | {self.source}, key=lambda path: (path.parent.name, path.name)):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()[:KEY_LENGTH]


def compile_all(units: Sequence[Unit], folder: Path, jobs: int, say: Say) -> list[Path]:
    """The objects of ``units``, in their order; compiled where ``folder`` has none yet."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        return list(pool.map(lambda unit: _compile(unit, folder, say), units))


def _compile(unit: Unit, folder: Path, say: Say) -> Path:
    target = unit.object(folder)
    stem = target.stem[: -KEY_LENGTH - 1]
    if target.exists():
        return target
    fresh = folder / f"{target.stem}.{os.getpid()}.tmp.o"
    said = run_tool((*unit.command, "-c", str(unit.source), "-o", str(fresh)), say)
    for suffix in (".o", ".log"):
        for old in folder.glob(f"{stem}-{'?' * KEY_LENGTH}{suffix}"):
            old.unlink(missing_ok=True)
    if said:
        target.with_suffix(".log").write_text(said + "\n", encoding="utf-8")
    fresh.rename(target)  # only now: an interrupted compiler leaves no object that looks whole
    return target


def link(command: Sequence[str], target: Path, say: Say) -> None:
    """Run a link command and put its result in place in one step.

    A process that has the old library mapped keeps it: overwriting in place would crash it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    run_tool((*command, "-o", str(fresh)), say)
    fresh.replace(target)


def run_tool(command: Sequence[str], say: Say) -> str:
    """Run a compiler or linker; what it says is shown and returned, its failure stops the build."""
    say(shlex.join(command))
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = run.stdout.strip()
    if said:
        say(said)
    if run.returncode != 0:
        raise BuildFailure(
            f"building deltaops failed (exit status {run.returncode}) at:\n"
            f"  {shlex.join(command)}\n{said}"
        )
    return said
