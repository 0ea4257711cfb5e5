"""What nvcc makes of the CUDA sources, for every architecture: no spills, and the instructions that
the kernels are written for."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Which file, and which architectures, are the build's own business: ask it.
COMPILE = """
import subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from buildtools import recipe, toolchain
toolkit = toolchain.find_cuda()
if isinstance(toolkit, str):
    sys.exit("skip: " + toolkit)
def compile(unit):
    out = Path(sys.argv[1], unit.source.stem + ".o")
    return unit, subprocess.run([*unit.command, "-c", str(unit.source), "-o", str(out)],
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
with ThreadPoolExecutor(recipe.jobs()) as pool:
    for unit, run in pool.map(compile, recipe.cuda_units(toolkit, ("-Xptxas=-v",))):
        print("command", *unit.command)
        print(run.stdout)
        if run.returncode:
            sys.exit("failed: " + str(unit.source))
print("archs", *toolkit.archs)
print("tools", toolkit.root / "bin")
"""

SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
# C7508: setmaxnreg is ignored; C7510: wgmma is serialised; C7519: a fence was put in
REMARK = re.compile(r"^.*\(C75\d\d\).*$", re.MULTILINE)
MULTIPLIES, COPIES, REGISTERS = "HGMMA", "UTMALDG", "USETMAXREG"
FUNCTION = re.compile(r"Function : (\S+)")


def spills(log: str) -> list[int]:
    """Bytes spilled (stores plus loads) of each kernel in what ``ptxas -v`` said."""
    return [int(stores) + int(loads) for stores, loads in SPILL.findall(log)]


def remarks(log: str) -> list[str]:
    """Where ptxas did something else than the kernel asks for."""
    return REMARK.findall(log)


def lacking(sass: str, *wanted: str) -> list[str]:
    """``kernel: instruction`` for each that a kernel of the disassembly has not."""
    names, bodies = FUNCTION.findall(sass), FUNCTION.split(sass)[2::2]
    return [
        f"{name}: {instruction}"
        for name, body in zip(names, bodies, strict=True)
        for instruction in wanted
        if instruction not in body
    ]


@dataclass(frozen=True)
class Compiled:
    """One build of all units."""

    log: str
    archs: tuple[str, ...]
    objects: Path
    tools: Path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = tmp_path_factory.mktemp("cuda")
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    if run.stderr.startswith("skip: "):
        pytest.skip(run.stderr.removeprefix("skip: ").strip())
    assert run.returncode == 0, run.stdout + run.stderr
    archs, tools = (
        re.findall(rf"^{name} (.+)$", run.stdout, re.MULTILINE)[0] for name in ("archs", "tools")
    )
    return Compiled(run.stdout, tuple(archs.split()), folder, Path(tools))


@pytest.mark.slow
def test_kernels_compile_and_do_not_spill(compiled: Compiled) -> None:
    found = spills(compiled.log)
    assert len(found) >= len(compiled.archs)
    assert sum(found) == 0, compiled.log


@pytest.mark.slow
def test_ptxas_does_what_the_kernels_ask_for(compiled: Compiled) -> None:
    assert remarks(compiled.log) == []


@pytest.mark.slow
def test_no_header_of_torch_or_python_is_in_reach(compiled: Compiled) -> None:
    folders = re.findall(r"-I(\S+)", compiled.log)
    assert folders
    assert {Path(folder).relative_to(ROOT).parts[0] for folder in folders} == {"csrc"}


def disassembler(tools: Path) -> str | None:
    """cuobjdump of the toolkit, or else Triton's."""
    found = shutil.which("cuobjdump", path=str(tools)) or shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton")
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        found = shutil.which("cuobjdump", path=str(path))
    return found


@pytest.mark.slow
def test_hopper_kernels_are_of_hopper_s_instructions(compiled: Compiled) -> None:
    if "90a" not in compiled.archs:
        pytest.skip(f"compiled for {', '.join(compiled.archs)}")
    tool = disassembler(compiled.tools)
    if tool is None:
        pytest.skip("there is no cuobjdump")
    objects = sorted(compiled.objects.glob("hopper_*f16.o"))
    assert len(objects) == 2
    for path in objects:
        run = subprocess.run([tool, "-sass", str(path)], capture_output=True, text=True, check=True)
        assert len(FUNCTION.findall(run.stdout)) == 4  # both directions, two widths of tile
        assert lacking(run.stdout, MULTIPLIES, COPIES, REGISTERS) == []


@pytest.mark.slow
@pytest.mark.parametrize(("unit", "kernels"), [("ampere_gemm", 8), ("ampere_passes", 4)])
def test_sm_80_kernels_multiply_by_tensor_cores(
    compiled: Compiled, unit: str, kernels: int
) -> None:
    tool = disassembler(compiled.tools)
    if tool is None:
        pytest.skip("there is no cuobjdump")
    command = [tool, "-sass", str(compiled.objects / f"{unit}.o")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    names = [name for name in FUNCTION.findall(run.stdout) if "reduce_kernel" not in name]
    assert len(names) == kernels * len(compiled.archs)
    missing = [name for name in lacking(run.stdout, "HMMA.16816", "LDSM", "LDGSTS")
               if "reduce_kernel" not in name]  # fmt: skip
    # gemv_kernel reads global memory itself
    assert [name for name in missing if "gemv" not in name or "HMMA" in name] == []


def test_spills_are_seen() -> None:
    log = "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
    assert spills(log) == [16]


@pytest.mark.parametrize(
    "line",
    [
        "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain",
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are ser",
        "ptxas info    : (C7519) warpgroup.arrive is injected in around line 804 by compiler",
    ],
)
def test_remarks_are_seen(line: str) -> None:
    assert remarks(f"ptxas info    : 0 bytes gmem\n{line}\n") == [line]


def test_a_missing_instruction_is_seen() -> None:
    sass = (
        "\tFunction : first\n HGMMA.64x256x16.F32.BF16 R24 ;\n UTMALDG.2D [UR20] ;\n"
        "\tFunction : second\n HMMA.16816.F32.BF16 R4 ;\n UTMALDG.2D [UR20] ;\n"
    )
    assert lacking(sass, MULTIPLIES, COPIES) == ["second: HGMMA"]


# A kernel that asks for registers without a cap, and one that multiplies without a fence: what
# nvcc itself says of them.
CARELESS = """
#include "primitives/warpgroup.h"
#include "primitives/wgmma.h"
using namespace deltaops;
__global__ void uncapped(float *out) {
  if (threadIdx.x / 128 == 0) {
    registers_down<40>();
  } else {
    registers_up<232>();
    out[threadIdx.x] = out[0];
  }
}
__global__ void __launch_bounds__(128, 1) unfenced(float *out, uint64_t left, uint64_t right) {
  float acc[64];
  for (int i = 0; i < 64; ++i) acc[i] = out[i];
  wgmma<__half, 128, Major::kInner>(acc, left, right, true);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < 64; ++i) out[i] = acc[i];
}
"""


@pytest.mark.slow
def test_nvcc_still_remarks_on_careless_kernels(compiled: Compiled, tmp_path: Path) -> None:
    if "90a" not in compiled.archs:
        pytest.skip(f"compiled for {', '.join(compiled.archs)}")
    source = tmp_path / "careless.cu"
    source.write_text(CARELESS, encoding="utf-8")
    command = re.findall(r"^command (.+)$", compiled.log, re.MULTILINE)[-1].split()
    run = subprocess.run([*command, "-cubin", str(source), "-o", str(tmp_path / "careless.cubin")],
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    assert run.returncode == 0, run.stdout
    found = {code for line in remarks(run.stdout) for code in re.findall(r"C75\d\d", line)}
    assert found == {"C7508", "C7519"}, run.stdout
