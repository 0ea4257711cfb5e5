"""benchmarks/test_ops.py under pytest-benchmark, untimed: its gate and its peers still fit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.everything
def test_each_op_runs_beside_its_peers() -> None:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--benchmark-disable", "-rs"]
    result = subprocess.run(
        [*command, "benchmarks", "-k", "512x768x768-f32"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, result.stdout
    assert int(passed[1]) >= 10, result.stdout  # ours and the peers of four ops
