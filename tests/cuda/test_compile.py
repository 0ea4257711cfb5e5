"""The CUDA sources compile for every architecture without spilling a register."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Which file, and which architectures, are the build's own business: ask it.
COMPILE = """
import subprocess, sys
from pathlib import Path
from buildtools import recipe, toolchain
toolkit = toolchain.find_cuda()
if isinstance(toolkit, str):
    sys.exit("skip: " + toolkit)
for unit in recipe.cuda_units(toolkit, ("-Xptxas=-v",)):
    out = Path(sys.argv[1], unit.source.stem + ".o")
    run = subprocess.run([*unit.command, "-c", str(unit.source), "-o", str(out)],
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(run.stdout)
    if run.returncode:
        sys.exit("failed: " + str(unit.source))
print("archs", *toolkit.archs)
"""

SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def spills(log: str) -> list[int]:
    """Bytes spilled (stores plus loads) of each kernel in what ``ptxas -v`` said."""
    return [int(stores) + int(loads) for stores, loads in SPILL.findall(log)]


@pytest.mark.slow
def test_kernels_compile_and_do_not_spill(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    if run.stderr.startswith("skip: "):
        pytest.skip(run.stderr.removeprefix("skip: ").strip())
    assert run.returncode == 0, run.stdout + run.stderr
    (archs,) = re.findall(r"^archs (.+)$", run.stdout, re.MULTILINE)
    found = spills(run.stdout)
    assert len(found) >= len(archs.split())
    assert sum(found) == 0, run.stdout


def test_spills_are_seen() -> None:
    log = "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
    assert spills(log) == [16]
