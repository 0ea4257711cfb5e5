"""What is written of a run of every_variant.py, and what the committed one says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from deltaops.backends.triton.targets import TARGETS
from deltaops.backends.triton.traffic import ENTRIES

sys.path.append(str(Path(__file__).parent))
import sweep_summary
import test_ahead_of_time as limits

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
PAGE = "triton-variants.md"
ELSEWHERE = {
    *("_persistent_forward_kernel", "_persistent_grad_input_kernel", "_beside_kernel"),
    *("_merge_prefix_kernel", "_prefix_grads_kernel", "_sum_pieces_kernel"),
}
"""Kernels that only some targets have."""


def variant(kernel: str, shared: int, spills: int = 0) -> dict[str, Any]:
    """What the compiler says of one."""
    return {
        "kernel": kernel, "tiles": {"BLOCK_M": 16}, "dtype": "torch.float32", "work": "fp32",
        "image": 1, "spills": spills, "shared": shared, "matrix_cores": False, "specialise": False,
    }  # fmt: skip


def test_a_run_is_counted_and_other_targets_stay(tmp_path: Path) -> None:
    found = [variant("_a_kernel", 10), variant("_a_kernel", 30, spills=8), variant("_b_kernel", 20)]
    for name in ("sm_90", "sm_80"):
        pairs = [(one, limits.problems([one], name)) for one in found]
        summary = sweep_summary.of_target(name, pairs, ["_b_kernel"], {"gemms": 2})
        sweep_summary.write(tmp_path, name, summary)
    written = json.loads((tmp_path / "triton-variants.json").read_text(encoding="utf-8"))
    assert list(written) == ["sm_80", "sm_90"]
    counts = dict(zip(sweep_summary.COUNTS, (2, 0, 1, 1, 30, 0), strict=True))
    assert written["sm_80"]["kernels"]["_a_kernel"] == counts
    assert ["8 bytes spilled" in line for line in written["sm_80"]["problems"]] == [True]
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "| a_kernel | 2, 30, 1 refused | 2, 30, 1 refused |" in page
    assert "| b_kernel | 1, 20, 1 left | 1, 20, 1 left |" in page


def test_the_committed_run_reached_everything_and_refuses_nothing() -> None:
    known = json.loads((RESULTS / "triton-variants.json").read_text(encoding="utf-8"))
    assert set(known) == set(TARGETS)
    for name, one in known.items():
        assert one["problems"] == []
        assert one["shared_limit"] == TARGETS[name].shared
        assert set(ENTRIES) - ELSEWHERE <= set(one["kernels"])
        assert [kernel for kernel, counts in one["kernels"].items() if counts["left"]] == []
    assert set(ENTRIES) <= set(known["sm_90"]["kernels"])
    assert (RESULTS / PAGE).read_text(encoding="utf-8") == sweep_summary.tables(known)


def test_every_call_of_the_sweep_can_be_made(tmp_path: Path) -> None:
    """It is run by hand; here no time is left for a compiler."""
    code = (
        "import sys, pathlib, every_variant; every_variant.FOUND = pathlib.Path(sys.argv[1]); "
        "raise SystemExit(every_variant.main(['sm_90', '--seconds', '0']))"
    )
    places = {"PYTHONPATH": str(Path(__file__).parent), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path / "found")],
        env={**os.environ, **places}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(" left\n") == 10, run.stdout  # a line for each area
