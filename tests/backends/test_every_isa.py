"""The float64 suites once more under DELTAOPS_CPU_ISA, for each set that is not the default here.

The variable is read once, at the first call, so every set has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deltaops.backends.cpu import native

SUITES = [
    Path(__file__).with_name(f"test_{op}.py")
    for op in ("attention", "delta_linear", "gated", "rotary")
]


def other_isas() -> list[str]:
    module = native()
    if isinstance(module, str):
        return []
    return [name for name, runs in module.isas() if runs and name != module.isa()]


def ask(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DELTAOPS_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, "-P", *command], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("isa", other_isas())
def test_fp64_suites_under_each_isa(isa: str) -> None:
    word = ask(isa, "-c", "from deltaops.backends.cpu import native; print(native().isa())")
    assert word.stdout.strip() == isa, word.stderr
    # Deselected: other backends, which the variable does not reach.
    done = ask(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu or native_core",
               *map(str, SUITES))  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert "skipped" not in done.stdout
    assert " passed" in done.stdout


def test_an_isa_that_is_not_there_is_an_error_and_not_another_one() -> None:
    done = ask("sse9", "-c", "from deltaops.backends.cpu import native; native().isa()")
    assert done.returncode != 0
    assert "DELTAOPS_CPU_ISA" in done.stderr
    assert "sse9" in done.stderr
