"""Every configuration of the Triton kernels compiles for the GPUs that it is meant for.

ahead.py does it, in a process for each architecture. Nothing runs on a GPU here; this finds what
only a compiler can say: spilled registers, shared memory beyond the chip, tensor cores left idle.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("ahead.py")

# Bytes of shared memory that one block may have (CUDA C++ Programming Guide, compute
# capabilities); the compiler does not check it.
SHARED = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024}

GEMMS = ("_forward_kernel", "_grad_input_kernel")
SKINNY = ("_project_kernel", "_grad_up_kernel", "_grad_down_kernel")
ATTENTION = ("_attention_kernel", "_grad_query_kernel", "_grad_key_kernel")
ROWS = (
    "_fold_kernel", "_bottleneck_kernel", "_bottleneck_inner_kernel", "_bottleneck_outer_kernel",
    "_bottleneck_grad_kernel", "_bottleneck_grad_outer_kernel", "_bottleneck_down_kernel",
    "_bottleneck_finish_kernel", "_norm_kernel", "_norm_grad_kernel", "_norm_grad_wide_kernel",
    "_gated_kernel", "_gated_grad_kernel", "_rotary_kernel",
)  # fmt: skip
KERNELS = {*GEMMS, *SKINNY, *ATTENTION, *ROWS}

ENVIRONMENT = dict(os.environ)  # what tests change of it does not reach the compilers
SABOTAGES = {
    "registers": "bytes spilled",
    "stages": "bytes of shared memory",
    "warps": "no wgmma",
}

pytestmark = [pytest.mark.slow, pytest.mark.waits]


def compiled(cache: Path, arch: str, *sabotage: str) -> list[dict[str, Any]]:
    """What ahead.py found. An empty cache, so that everything is compiled and reported on."""
    environment = {**ENVIRONMENT, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), arch, *sabotage],
        env=environment,
        cwd=SCRIPT.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert isinstance(found, list)
    return found


def problems(found: list[dict[str, Any]], arch: str) -> list[str]:
    """What the gate refuses, a line each."""
    lines = []
    for kernel in found:
        name = f"{kernel['kernel']} {kernel['tiles']} {kernel['dtype']} {kernel['work']}"
        if not kernel["image"]:
            lines.append(f"{name}: no cubin")
        if kernel["spills"]:
            lines.append(f"{name}: {kernel['spills']} bytes spilled")
        if kernel["shared"] > SHARED[arch]:
            lines.append(f"{name}: {kernel['shared']} bytes of shared memory > {SHARED[arch]}")
        # tiles of fewer than 64 rows are for few tokens, where the weight's bytes are the limit;
        # float32 asks for IEEE products, which tensor cores do not have
        tensor_cores = kernel["tiles"].get("BLOCK_M", 0) >= 64 and "32" not in kernel["dtype"]
        if arch == "90" and kernel["kernel"] in GEMMS and tensor_cores and not kernel["wgmma"]:
            lines.append(f"{name}: no wgmma")
    return lines


def compile_all(folder: Path) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """What was found by arguments of ahead.py, on two processors; the longest first."""
    runs: list[tuple[str, ...]] = [*((arch,) for arch in reversed(SHARED)),
                                   *(("90", sabotage) for sabotage in SABOTAGES)]  # fmt: skip
    with ThreadPool(2) as pool:
        found = pool.map(
            lambda words: compiled(folder / "-".join(words), *words), runs, chunksize=1
        )
    return dict(zip(runs, found, strict=True))


def prepare(ahead: Any, fixtures: set[str]) -> None:
    """Called by tests/conftest.py."""
    ahead.start("ahead_of_time", compile_all)


@pytest.mark.parametrize("arch", SHARED)
def test_every_configuration_compiles_within_the_limits(ahead: Any, arch: str) -> None:
    found = ahead.result("ahead_of_time")[arch,]
    assert {kernel["kernel"] for kernel in found} >= KERNELS
    assert problems(found, arch) == []


@pytest.mark.parametrize(("sabotage", "message"), SABOTAGES.items())
def test_the_gate_can_fail(ahead: Any, sabotage: str, message: str) -> None:
    found = problems(ahead.result("ahead_of_time")["90", sabotage], "90")
    assert any("_forward_kernel" in line and message in line for line in found), found
