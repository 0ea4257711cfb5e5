"""The float64 suites once more under DELTAOPS_CPU_ISA, for each set that is not the default here.

The variable is read once, at the first call, so every set has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest

from deltaops.backends.cpu import native

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = dict(os.environ)  # what tests change of it stays with them
SUITES = [
    Path(__file__).with_name(f"test_{op}.py")
    for op in ("attention", "delta_linear", "gated", "prefix_attention", "rotary")
]


def other_isas() -> list[str]:
    module = native()
    if isinstance(module, str):
        return []
    return [name for name, runs in module.isas() if runs and name != module.isa()]


def ask(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = ENVIRONMENT | {"DELTAOPS_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, "-P", *command], env=environment, cwd=ROOT, capture_output=True, text=True
    )


def run_suites(isa: str) -> subprocess.CompletedProcess[str]:
    # Deselected: other backends, which the variable does not reach.
    return ask(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu or native_core",
               *map(str, SUITES))  # fmt: skip


def prepare(ahead: Any, fixtures: set[str]) -> None:
    """Called by tests/conftest.py."""

    def all_isas(folder: Path) -> dict[str, subprocess.CompletedProcess[str]]:
        with ThreadPool(2) as pool:
            done = pool.map(run_suites, other_isas(), chunksize=1)
        return dict(zip(other_isas(), done, strict=True))

    if "ahead" in fixtures:
        ahead.start("every_isa", all_isas)


@pytest.mark.waits
@pytest.mark.parametrize("isa", other_isas())
def test_fp64_suites_under_each_isa(ahead: Any, isa: str) -> None:
    word = ask(isa, "-c", "from deltaops.backends.cpu import native; print(native().isa())")
    assert word.stdout.strip() == isa, word.stderr
    done = ahead.result("every_isa")[isa]
    assert done.returncode == 0, done.stdout[-6000:]
    assert "skipped" not in done.stdout
    assert " passed" in done.stdout


def test_an_isa_that_is_not_there_is_an_error_and_not_another_one() -> None:
    done = ask("sse9", "-c", "from deltaops.backends.cpu import native; native().isa()")
    assert done.returncode != 0
    assert "DELTAOPS_CPU_ISA" in done.stderr
    assert "sse9" in done.stderr
