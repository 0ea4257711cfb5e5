"""Every configuration of the Triton kernels compiles for the GPUs that it is meant for.

ahead.py does it, in a process for each architecture. Nothing runs on a GPU here; this finds what
only a compiler can say: spilled registers, shared memory beyond the chip, tensor cores left idle.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("ahead.py")

# Bytes of shared memory that one block may have (CUDA C++ Programming Guide, compute
# capabilities); the compiler does not check it.
SHARED = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024}

GEMMS = ("_forward_kernel", "_grad_input_kernel")
KERNELS = {*GEMMS, "_project_kernel", "_grad_up_kernel", "_grad_down_kernel"}

pytestmark = pytest.mark.slow


def compiled(cache: Path, arch: str, *sabotage: str) -> list[dict[str, Any]]:
    """What ahead.py found. An empty cache, so that everything is compiled and reported on."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), arch, *sabotage],
        env=environment,
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


@pytest.fixture(scope="module")
def compile_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """Results by architecture; all start at once, on two processors."""
    pool = ThreadPoolExecutor(2)
    running: dict[str, Future[list[dict[str, Any]]]] = {
        arch: pool.submit(compiled, tmp_path_factory.mktemp(f"sm_{arch}"), arch) for arch in SHARED
    }
    pool.shutdown(wait=False)
    return lambda arch: running[arch].result()


@pytest.mark.parametrize("arch", SHARED)
def test_every_configuration_compiles_within_the_limits(
    compile_for: Callable[[str], list[dict[str, Any]]], arch: str
) -> None:
    found = compile_for(arch)
    assert {kernel["kernel"] for kernel in found} >= KERNELS
    assert problems(found, arch) == []


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        ("registers", "bytes spilled"),
        ("stages", "bytes of shared memory"),
        ("warps", "no wgmma"),
    ],
)
def test_the_gate_can_fail(tmp_path: Path, sabotage: str, message: str) -> None:
    found = problems(compiled(tmp_path, "90", sabotage), "90")
    assert any("_forward_kernel" in line and message in line for line in found), found
