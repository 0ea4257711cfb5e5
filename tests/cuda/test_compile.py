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

# Which file, and which architectures, are the build's own business: ask it. Its objects are used
# again, each with what ptxas said of it.
COMPILE = """
import sys
from buildtools import objects, recipe, toolchain
toolkit = toolchain.find_cuda()
if isinstance(toolkit, str):
    sys.exit("skip: " + toolkit)
units = recipe.cuda_units(toolkit)
folder = recipe.ROOT / "build" / "objects"
found = objects.compile_all(units, folder, recipe.jobs(), lambda text: None)
print("archs", *toolkit.archs)
print("tools", toolkit.root / "bin")
for unit, built in zip(units, found):
    print("unit", unit.source.stem, built)
    print("command", *unit.command)
    log = built.with_suffix(".log")
    print(log.read_text() if log.exists() else "silent")
"""

SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
KERNEL = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
# C7508: setmaxnreg is ignored; C7510: wgmma is serialised; C7519: a fence was put in
REMARK = re.compile(r"^.*\(C75\d\d\).*$", re.MULTILINE)
MULTIPLIES, COPIES, STORES, REGISTERS = "HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG"
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
    tools: Path
    objects: dict[str, Path]
    """By the stem of their sources."""


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    run = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, capture_output=True, text=True)
    if run.stderr.startswith("skip: "):
        pytest.skip(run.stderr.removeprefix("skip: ").strip())
    assert run.returncode == 0, run.stdout + run.stderr
    archs, tools = (
        re.findall(rf"^{name} (.+)$", run.stdout, re.MULTILINE)[0] for name in ("archs", "tools")
    )
    units = re.findall(r"^unit (\S+) (.+)$", run.stdout, re.MULTILINE)
    objects = {stem: Path(path) for stem, path in units}
    return Compiled(run.stdout, tuple(archs.split()), Path(tools), objects)


@pytest.mark.slow
def test_kernels_compile_and_do_not_spill(compiled: Compiled) -> None:
    kernels, found = KERNEL.findall(compiled.log), spills(compiled.log)
    assert {arch for _, arch in kernels} == set(compiled.archs)
    assert len(found) >= len(kernels) > 0
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
    for unit in ("hopper_bf16", "hopper_f16"):
        command = [tool, "-sass", str(compiled.objects[unit])]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        # both directions of two widths of tile, and the one that makes S
        assert len(FUNCTION.findall(run.stdout)) == 5
        assert lacking(run.stdout, MULTIPLIES, COPIES, STORES, REGISTERS) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unit", "kernels"),
    [("ampere_gemm", 8), ("ampere_passes", 4), ("ampere_produce", 4), ("ampere_quantized", 4)],
)
def test_sm_80_kernels_multiply_by_tensor_cores(
    compiled: Compiled, unit: str, kernels: int
) -> None:
    tool = disassembler(compiled.tools)
    if tool is None:
        pytest.skip("there is no cuobjdump")
    command = [tool, "-sass", str(compiled.objects[unit])]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    names = [name for name in FUNCTION.findall(run.stdout) if "reduce_kernel" not in name]
    assert len(names) == kernels  # for one architecture
    missing = [name for name in lacking(run.stdout, "HMMA.16816", "LDSM", "LDGSTS")
               if "reduce_kernel" not in name]  # fmt: skip
    # of few rows, kernels read global memory themselves
    few = ("gemv_kernel", "produce_kernel", "quantized_kernel")
    assert [name for name in missing if "HMMA" in name or not any(k in name for k in few)] == []


GENCODE = """
import sys
from pathlib import Path
from buildtools.toolchain import CudaToolkit
for archs in sys.argv[1:]:
    kit = CudaToolkit(Path(), Path(), "", tuple(archs.split(";")), Path())
    print(*(flag.rpartition("code=")[2] for flag in kit.gencode_by_ptx))
"""


def test_every_architecture_has_machine_code_or_older_ptx() -> None:
    wanted = {
        "80;90a;100": "sm_80 compute_80",
        "90a": "sm_90a",
        "90a;100": "sm_90a sm_100 compute_100",
        "100a;90": "sm_90 compute_90",
    }
    run = subprocess.run([sys.executable, "-c", GENCODE, *wanted], cwd=ROOT, check=True,
                         capture_output=True, text=True)  # fmt: skip
    assert run.stdout.splitlines() == list(wanted.values())


def test_the_header_is_of_c(tmp_path: Path) -> None:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no gcc")
    source = tmp_path / "caller.c"
    source.write_text('#include "deltaops_cuda.h"\nint main(void) { return 0; }\n')
    flags = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only")
    include = f"-I{ROOT / 'csrc' / 'include'}"
    subprocess.run([compiler, *flags, include, str(source)], check=True)


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
