"""The program that launches everything once: on the emulated grid, and under compute-sanitizer on a
real GPU, which `make gpu` runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from . import emulated
from .programs import compiled, linked, run

SOURCE = Path(__file__).with_name("every_launch.c")


def test_every_launch_runs_on_the_emulated_grid(tmp_path: Path) -> None:
    """Of as few rows as in decoding, and of more; on a GPU of other numbers too."""
    done = run(compiled(SOURCE, tmp_path / "every_launch"), "7", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("every launch ran on ")
    assert done.stdout.endswith(" of capability 90\n")  # those of Hopper too


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool: str, tmp_path: Path) -> None:
    if (sanitizer := shutil.which("compute-sanitizer")) is None:
        pytest.skip("not on the PATH: compute-sanitizer")
    program = linked(SOURCE, tmp_path / "every_launch")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", str(program)]
    done = subprocess.run(command, cwd=emulated.ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
