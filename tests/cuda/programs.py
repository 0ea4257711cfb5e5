"""C programs that call the CUDA library: built for the emulated grid, or linked as for a GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import deltaops

from . import emulated

RUNTIME = Path(__file__).with_name("runtime")
STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
TOOLKIT = """
from buildtools import toolchain
found = toolchain.find_cuda()
print("skip " + found if isinstance(found, str) else f"{found.root} {found.cudart}")
"""


def needs(*programs: str) -> None:
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not on the PATH: {', '.join(missing)}")


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def compiled(source: Path, target: Path) -> Path:
    """For the emulated grid."""
    needs("cc")
    emulated.library()
    folder = emulated.ROOT / "build" / "emulated"
    command = ["cc", "-std=c11", *STRICT, "-DDELTAOPS_EMULATED", f"-I{RUNTIME}",
               f"-I{deltaops.get_include()}",
               str(source), f"-L{folder}", f"-Wl,-rpath,{folder}", "-ldeltaops_cuda", "-lm",
               "-o", str(target)]  # fmt: skip
    subprocess.run(command, check=True)
    return target


def linked(source: Path, target: Path) -> Path:
    """For a GPU, with the library that is built here."""
    needs("cc")
    asked = subprocess.run([sys.executable, "-c", TOOLKIT], cwd=emulated.ROOT, check=True,
                           capture_output=True, text=True).stdout.strip()  # fmt: skip
    library = Path(deltaops.__file__).with_name("libdeltaops_cuda.so")
    if asked.startswith("skip ") or not library.exists():
        pytest.skip(asked.removeprefix("skip ") if library.exists() else f"no {library}")
    root, cudart = map(Path, asked.split())
    command = ["cc", "-std=c99", *STRICT, f"-isystem{root / 'include'}",
               f"-I{deltaops.get_include()}", str(source), f"-L{library.parent}",
               f"-Wl,-rpath,{library.parent}", "-ldeltaops_cuda", str(cudart),
               "-ldl", "-lrt", "-lpthread", "-lm", "-o", str(target)]  # fmt: skip
    subprocess.run(command, check=True)
    return target
