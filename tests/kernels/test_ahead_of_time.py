"""Every configuration of the Triton kernels compiles for the GPUs that it is meant for.

ahead.py does it, in a process for each architecture; every_variant.py, by hand, goes further.
Nothing runs on a GPU here; this finds what only a compiler can say: spilled registers, shared
memory beyond the chip, matrix cores left idle.
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

from deltaops.backends.triton.targets import TARGETS

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("ahead.py")

GEMMS = (
    "_forward_kernel", "_grad_input_kernel", "_forward_quantized_kernel",
    "_grad_input_quantized_kernel",
)  # fmt: skip
DECODE = ("_decode_kernel", "_decode_parts_kernel")
SKINNY = (
    "_project_kernel", "_grad_up_kernel", "_grad_down_kernel", "_hidden_kernel",
    "_hidden_grad_kernel",
)  # fmt: skip
ATTENTION = ("_attention_kernel", "_grad_query_kernel", "_grad_key_kernel")
MERGED = ("_merge_prefix_kernel", "_prefix_grads_kernel", "_sum_pieces_kernel")
PERSISTENT = ("_persistent_forward_kernel", "_persistent_grad_input_kernel")
# wgmma on Hopper, MFMA on AMD; Ampere and Blackwell are not looked at
MATRIX_CORES = ("sm_90", "gfx942")
ROWS = (
    "_fold_kernel", "_bottleneck_kernel", "_bottleneck_inner_kernel", "_bottleneck_outer_kernel",
    "_bottleneck_grad_kernel", "_bottleneck_grad_outer_kernel", "_bottleneck_down_kernel",
    "_bottleneck_finish_kernel", "_norm_kernel", "_norm_grad_kernel", "_norm_grad_wide_kernel",
    "_gated_kernel", "_gated_grad_kernel", "_rotary_kernel",
    "_prompt_kernel", "_prompt_grad_kernel",
)  # fmt: skip
GROUP = ("_project_group_kernel", "_grad_down_group_kernel")
DORA = ("_row_norms_kernel", "_row_norms_finish_kernel")
QUANTIZED = ("_dequantize_kernel",)
KERNELS = {*GEMMS, *SKINNY, *ATTENTION, *ROWS, *GROUP, *DORA, *QUANTIZED}
ALSO = {
    "sm_90": {*PERSISTENT, *DECODE, *MERGED, "_beside_kernel"},
    "sm_100": {*PERSISTENT},
    "gfx942": {*DECODE},
}
# of it the largest tiles, and those that it has for itself
NARROW = {*GEMMS[:2], *SKINNY[:3], *ATTENTION, *GROUP[:1], *DORA, "_bottleneck_kernel"}

ENVIRONMENT = dict(os.environ)  # what tests change of it does not reach the compilers
SABOTAGES = {
    ("sm_90", "registers"): "bytes spilled",
    ("sm_90", "stages"): "bytes of shared memory",
    ("sm_90", "warps"): "no matrix cores",
    ("gfx942", "registers"): "bytes spilled",
    ("gfx942", "stages"): "bytes of shared memory",
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
    lines, limit = [], TARGETS[arch].shared
    for kernel in found:
        name = f"{kernel['kernel']} {kernel['tiles']} {kernel['dtype']} {kernel['work']}"
        if not kernel["image"]:
            lines.append(f"{name}: no machine code")
        if kernel["spills"]:
            lines.append(f"{name}: {kernel['spills']} bytes spilled")
        if kernel["shared"] > limit:
            lines.append(f"{name}: {kernel['shared']} bytes of shared memory > {limit}")
        # tiles of fewer than 64 rows are for few tokens, where the weight's bytes are the limit;
        # float32 asks for IEEE products, which NVIDIA's tensor cores do not have
        due = kernel["tiles"].get("BLOCK_M", 0) >= 64 and "32" not in kernel["dtype"]
        if arch in MATRIX_CORES and kernel["kernel"] in (*GEMMS, *PERSISTENT) and due:
            if not kernel["matrix_cores"]:
                lines.append(f"{name}: no matrix cores")
        if kernel["kernel"] in PERSISTENT and not kernel["bulk"]:
            lines.append(f"{name}: no tensor descriptors")
        if kernel["specialise"] and not kernel["specialised"]:
            lines.append(f"{name}: no warps of their own for loads")
    return lines


def compile_all(folder: Path) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """What was found by arguments of ahead.py, on two processors; the longest first."""
    runs: list[tuple[str, ...]] = [*((arch,) for arch in reversed(TARGETS)), *SABOTAGES]
    with ThreadPool(2) as pool:
        found = pool.map(
            lambda words: compiled(folder / "-".join(words), *words), runs, chunksize=1
        )
    return dict(zip(runs, found, strict=True))


def prepare(ahead: Any, fixtures: set[str]) -> None:
    """Called by tests/conftest.py."""
    ahead.start("ahead_of_time", compile_all)


@pytest.mark.parametrize("arch", TARGETS)
def test_every_configuration_compiles_within_the_limits(ahead: Any, arch: str) -> None:
    found = ahead.result("ahead_of_time")[arch,]
    due = NARROW if arch == "sm_89" else KERNELS | ALSO.get(arch, set())
    assert {kernel["kernel"] for kernel in found} >= due
    assert problems(found, arch) == []


@pytest.mark.parametrize(("run", "message"), SABOTAGES.items())
def test_the_gate_can_fail(ahead: Any, run: tuple[str, str], message: str) -> None:
    found = problems(ahead.result("ahead_of_time")[run], run[0])
    assert any("_forward_kernel" in line and message in line for line in found), found


@pytest.mark.parametrize(
    ("arch", "what", "message"),
    [
        ("sm_90", "matrix_cores", "no matrix cores"),
        ("sm_90", "bulk", "no tensor descriptors"),
        ("sm_100", "specialised", "no warps of their own"),
    ],
)
def test_a_persistent_kernel_without_them_is_refused(
    ahead: Any, arch: str, what: str, message: str
) -> None:
    found = ahead.result("ahead_of_time")[arch,]
    (one, *_) = [k for k in found if k["kernel"] == "_persistent_forward_kernel" and k[what]]
    assert problems([one], arch) == []
    assert [message in line for line in problems([one | {what: False}], arch)] == [True]
