"""What is built: a C library and a thin pybind11 module over it, for the CPU and for CUDA.

    csrc/cpu   ->  deltaops/libdeltaops.so       <-  deltaops/_cpu*.so   of bindings/cpu_*.cpp
    csrc/cuda  ->  deltaops/libdeltaops_cuda.so  <-  deltaops/_cuda*.so  of bindings/cuda_*.cpp

Where jaxlib is installed, deltaops/_xla*.so of bindings/xla_*.cpp stands beside the first, and
deltaops/_xla_cuda*.so of bindings/cudaxla_*.cpp beside the second. The libraries hold no Python
symbols, so C programs can link them; the modules find them beside themselves ($ORIGIN). No torch
header is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .objects import Say, Unit, compile_all, link
from .toolchain import (
    FFI_HEADERS,
    BuildFailure,
    Compiler,
    CudaToolkit,
    machine,
    pybind11_include,
    python_include,
)

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
INCLUDE = CSRC / "include"
CUDA = CSRC / "cuda"
CUDA_READS = (CUDA, CUDA / "primitives", CUDA / "ampere", CUDA / "hopper", INCLUDE)
HOPPER = "90a"  # wgmma and setmaxnreg are of this architecture alone, not of its successors
FOR_EACH = {"dropout.cu"}  # of csrc/cuda, gets machine code for every architecture

CPU_LIBRARY = "libdeltaops.so"
CUDA_LIBRARY = "libdeltaops_cuda.so"

# -g0: debug information makes a module ten times as large. No -march: it is for any machine.
BINDING_FLAGS = ("-std=c++17", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
CUDA_FLAGS = (
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "-Xptxas=-v",  # registers and spills, which tests look at
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
)
# longjmp between fibers is no error here, though a fortified one takes it for that.
EMULATED_FLAGS = (
    *("-std=c++17", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),
)


@dataclass(frozen=True)
class Build:
    """Where objects and results go, and how many compilers run at once."""

    objects: Path
    package: Path  # the folder that stands for deltaops/
    jobs: int
    say: Say


def jobs() -> int:
    """How many compilers run at once: $DELTAOPS_JOBS, else one per processor we may use.

    Raises: BuildFailure for anything but a whole number from 1 on.
    """
    asked = os.environ.get("DELTAOPS_JOBS", "")
    if not asked:
        return len(os.sched_getaffinity(0))
    if not (asked.isascii() and asked.isdigit() and int(asked)):
        raise BuildFailure(
            f"DELTAOPS_JOBS must be a whole number from 1 on, got {asked!r}. "
            "Unset it for one compiler per processor."
        )
    return int(asked)


def cpu_units(compiler: Compiler) -> list[Unit]:
    """The native CPU core, one unit per file of csrc/cpu/flags.json for this machine."""
    folder = CSRC / "cpu"
    flags = json.loads((folder / "flags.json").read_text(encoding="utf-8"))
    includes = tuple(f"-I{(folder / path).resolve()}" for path in flags["include"])
    names = flags["machines"].get(machine(), flags["machines"]["*"])
    return [
        Unit(
            source=folder / name,
            command=(*compiler.command, *flags["common"], *flags["files"][name], *includes),
            reads=(folder, INCLUDE),
            compiler_version=compiler.version,
        )
        for name in names
    ]


def cuda_units(toolkit: CudaToolkit) -> list[Unit]:
    """The CUDA library, one unit per .cu file of csrc/cuda; those of hopper/ for sm_90a alone.

    The sm_80 products take longest to compile, and Python launches them only where a table of
    measurements says so; newer GPUs than the oldest architecture translate their PTX when they
    first run them. The launchers of hopper/ are host code.
    """
    archs = ";".join(toolkit.archs)
    hopper = HOPPER in toolkit.archs
    defines = (f'-DDELTAOPS_CUDA_ARCHS="{archs}"', f"-DDELTAOPS_HOPPER={int(hopper)}")

    def unit(source: Path, gencode: tuple[str, ...]) -> Unit:
        flags = (*gencode, *CUDA_FLAGS, f"-I{INCLUDE}", f"-I{CUDA}", *defines)
        return Unit(source, (str(toolkit.nvcc), *flags), CUDA_READS, toolkit.version)

    found = [
        unit(source, toolkit.gencode if source.name in FOR_EACH else toolkit.gencode_by_ptx)
        for source in sorted(CUDA.glob("*.cu"))
    ]
    if hopper:
        gencode = (f"-gencode=arch=compute_{HOPPER},code=sm_{HOPPER}",)
        found += [unit(source, gencode) for source in sorted((CUDA / "hopper").glob("*.cu"))]
    return found


def emulated_cuda_units(compiler: Compiler, others: Sequence[Path] = ()) -> list[Unit]:
    """The CUDA library for a GPU that the CPU plays (csrc/cuda/emulation), for tests alone."""
    emulation = CUDA / "emulation"
    command = (
        *(*compiler.command, *EMULATED_FLAGS, f"-I{emulation}", f"-I{INCLUDE}", f"-I{CUDA}"),
        *("-DDELTAOPS_EMULATED", '-DDELTAOPS_CUDA_ARCHS="emulated"', "-DDELTAOPS_HOPPER=1"),
        *("-x", "c++"),
    )
    sources = [*CUDA.glob("*.cu"), *(CUDA / "hopper").glob("*.cu"), emulation / "emulation.cpp"]
    reads = (*CUDA_READS, emulation)
    return [
        Unit(source, command, reads, compiler.version) for source in (*sorted(sources), *others)
    ]


def binding_sources(device: str) -> list[Path]:
    """The files of the pybind11 module for "cpu", "cuda", "xla" or "cudaxla"."""
    return sorted((CSRC / "bindings").glob(f"{device}_*.cpp"))


def build_cpu(build: Build, compiler: Compiler, module: Path) -> None:
    """libdeltaops.so in ``build.package`` and the pybind11 module at ``module``."""
    flags = json.loads((CSRC / "cpu" / "flags.json").read_text(encoding="utf-8"))
    objects = compile_all(cpu_units(compiler), build.objects, build.jobs, build.say)
    _link_library(build, compiler, CPU_LIBRARY, objects, tuple(flags["link"]))
    _build_module(build, compiler, binding_sources("cpu"), module, CPU_LIBRARY)


def build_cuda(build: Build, compiler: Compiler, toolkit: CudaToolkit, module: Path) -> None:
    """libdeltaops_cuda.so in ``build.package`` and the pybind11 module at ``module``.

    The CUDA runtime is linked statically and looks for the driver at its first call, so the module
    imports on a machine without one.
    """
    objects = compile_all(cuda_units(toolkit), build.objects, build.jobs, build.say)
    libraries = (str(toolkit.cudart), "-ldl", "-lrt", "-lpthread")
    _link_library(build, compiler, CUDA_LIBRARY, objects, libraries)
    _build_module(build, compiler, binding_sources("cuda"), module, CUDA_LIBRARY)


def build_xla(build: Build, compiler: Compiler, headers: Path, module: Path) -> None:
    """The pybind11 module at ``module``, on the libdeltaops.so of :func:`build_cpu`."""
    _build_module(build, compiler, binding_sources("xla"), module, CPU_LIBRARY, headers)


def build_xla_cuda(build: Build, compiler: Compiler, headers: Path, module: Path) -> None:
    """The pybind11 module at ``module``, on the libdeltaops_cuda.so of :func:`build_cuda`."""
    _build_module(build, compiler, binding_sources("cudaxla"), module, CUDA_LIBRARY, headers)


def _link_library(
    build: Build, compiler: Compiler, name: str, objects: list[Path], libraries: tuple[str, ...]
) -> None:
    # --exclude-libs: the symbols of a static CUDA runtime stay our own beside torch's.
    options = (f"-Wl,-soname,{name}", "-Wl,--exclude-libs,ALL", "-Wl,--no-undefined")
    files = tuple(str(path) for path in objects)
    command = (*compiler.command, "-shared", *files, *options, *libraries)
    link(command, build.package / name, build.say)


def _build_module(
    build: Build,
    compiler: Compiler,
    sources: list[Path],
    module: Path,
    library: str,
    *headers: Path,
) -> None:
    folder = CSRC / "bindings"
    pybind11 = pybind11_include()
    includes = (f"-I{INCLUDE}", f"-isystem{pybind11}", f"-isystem{python_include()}")
    command = (*compiler.command, *BINDING_FLAGS, *includes, *(f"-isystem{h}" for h in headers))
    # what pybind11 is counts, not where: pip's isolated builds have it in a new place each time
    inside = sorted(path for path in pybind11.rglob("*") if path.is_dir())
    reads = (INCLUDE, folder, *(h / FFI_HEADERS for h in headers), pybind11, *inside)
    units = [Unit(source, command, reads, compiler.version) for source in sources]
    objects = [str(path) for path in compile_all(units, build.objects, build.jobs, build.say)]
    command = (
        *(*compiler.command, "-shared", *objects, str(build.package / library)),
        "-Wl,-rpath,$ORIGIN",
    )
    link(command, module, build.say)
