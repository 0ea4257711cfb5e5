"""Find the C++ compiler, Python's headers, pybind11 and nvcc, or say what to install."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_CUDA_ARCHS = "80;90a;100"
FFI_HEADERS = Path("xla", "ffi", "api")


class BuildFailure(Exception):
    """The native code cannot be built; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command that runs it and what it says of its version."""

    command: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class CudaToolkit:
    """nvcc and the toolkit it belongs to (nvcc itself may be a wrapper in another folder)."""

    nvcc: Path
    root: Path
    version: str
    archs: tuple[str, ...]
    cudart: Path

    @property
    def gencode(self) -> tuple[str, ...]:
        """Machine code for each architecture, and PTX of the oldest for chips newer than all."""
        return self._gencode(self.archs)

    @property
    def gencode_by_ptx(self) -> tuple[str, ...]:
        """The same without what that PTX serves too: such a GPU translates it at its first use."""
        oldest = self._oldest
        kept = [a for a in self.archs if oldest is None or a == oldest or _number(a) < int(oldest)]
        return self._gencode(kept)

    @property
    def _oldest(self) -> str | None:
        """Of the architectures whose PTX runs on later ones: not of 90a or 100f."""
        return min((arch for arch in self.archs if arch.isdigit()), key=int, default=None)

    def _gencode(self, archs: Sequence[str]) -> tuple[str, ...]:
        flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        if self._oldest is not None:
            flags.append(f"-gencode=arch=compute_{self._oldest},code=compute_{self._oldest}")
        return tuple(flags)


def _number(arch: str) -> int:
    return int(arch.rstrip("af"))


def _output(*command: str) -> str:
    """Standard output and error of a command that must succeed."""
    run = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )
    return run.stdout


def find_compiler() -> Compiler:
    """$CXX, else g++, clang++ or c++ from the PATH, tried on a program of one line."""
    if sys.platform != "linux":
        raise BuildFailure(
            f"deltaops builds its native core on Linux only so far; this is {sys.platform}. "
            "Use a Linux machine, a container or WSL."
        )
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]) is None:
            continue
        _try(command)
        return Compiler(tuple(command), _output(*command, "--version").splitlines()[0])
    looked = f"$CXX = {shlex.join(asked)}" if asked else "g++, clang++ and c++ on the PATH"
    raise BuildFailure(
        "deltaops needs a C++17 compiler to build its native CPU core, and none was found "
        f"(looked for {looked}).\n"
        "  Debian, Ubuntu:  sudo apt install g++\n"
        "  Fedora, RHEL:    sudo dnf install gcc-c++\n"
        "  conda:           conda install -c conda-forge cxx-compiler\n"
        "Or name one that is installed: CXX=/path/to/g++ pip install ."
    )


def _try(command: list[str]) -> None:
    """Compile and link one OpenMP program: a compiler without its library or libgomp fails here."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(
            "#include <omp.h>\n#include <string>\n"
            "int main() { return std::string().size() > 0 && omp_get_max_threads(); }\n"
        )
        run = subprocess.run(
            [*command, "-std=c++17", "-fopenmp", str(source), "-o", str(Path(folder, "probe"))],
            capture_output=True,
            text=True,
        )
    if run.returncode != 0:
        raise BuildFailure(
            f"the C++ compiler {shlex.join(command)} cannot build a C++17 program with OpenMP:\n"
            f"{run.stderr.strip()}\n"
            "Install its C++ standard library and OpenMP (both come with g++; for clang on "
            "Debian: sudo apt install libomp-dev), or set CXX to another compiler."
        )


def python_include() -> Path:
    """The folder of Python.h."""
    folder = Path(sysconfig.get_path("include"))
    if not (folder / "Python.h").exists():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise BuildFailure(
            f"deltaops needs the headers of Python {version} to build its bindings, and "
            f"{folder / 'Python.h'} is not there.\n"
            f"  Debian, Ubuntu:  sudo apt install python{version}-dev\n"
            f"  Fedora, RHEL:    sudo dnf install python{version}-devel"
        )
    return folder


def pybind11_include() -> Path:
    """The folder of pybind11/pybind11.h."""
    if importlib.util.find_spec("pybind11") is None:
        raise BuildFailure(
            "deltaops needs pybind11 to build its bindings, and it is not installed beside "
            f"{sys.executable}. Run: {sys.executable} -m pip install pybind11 "
            "(or leave out --no-build-isolation, and pip fetches it)."
        )
    import pybind11

    return Path(pybind11.get_include()).resolve()


def find_jax() -> Path | str:
    """What DELTAOPS_JAX allows: the folder of XLA's FFI headers, or why JAX is left out.

    They are those of the jaxlib in the environment that is built for, which pip's isolated build
    cannot import and can read all the same.
    """
    wish = os.environ.get("DELTAOPS_JAX", "auto")
    if wish not in ("auto", "0", "1"):
        raise BuildFailure(f"DELTAOPS_JAX must be auto, 0 or 1, got {wish!r}.")
    if wish == "0":
        return "DELTAOPS_JAX=0"
    places = [Path(sysconfig.get_path(kind)) for kind in ("platlib", "purelib")]
    spec = importlib.util.find_spec("jaxlib")
    places += [Path(folder).parent for folder in (spec and spec.submodule_search_locations) or ()]
    for place in places:
        include = place / "jaxlib" / "include"
        if (include / FFI_HEADERS / "ffi.h").exists():
            return include
    missing = f"jaxlib was not found (looked in {', '.join(sorted({str(p) for p in places}))})"
    if wish == "1":
        raise BuildFailure(
            f"DELTAOPS_JAX=1 asks for the JAX module, and {missing}. Install jax first, or build "
            "without it: DELTAOPS_JAX=0."
        )
    return missing


def machine() -> str:
    """The processor family as csrc/cpu/flags.json names it."""
    name = platform.machine().lower()
    return "x86_64" if name in ("x86_64", "amd64") else name


def find_cuda() -> CudaToolkit | str:
    """What DELTAOPS_CUDA and the machine allow: the toolkit, or why the CUDA module is left out."""
    wish = os.environ.get("DELTAOPS_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise BuildFailure(f"DELTAOPS_CUDA must be auto, 0 or 1, got {wish!r}.")
    if wish == "0":
        return "DELTAOPS_CUDA=0"
    nvcc = _find_nvcc()
    if nvcc is not None:
        return _toolkit(nvcc)
    missing = "nvcc was not found (looked at $NVCC, $CUDA_HOME, the PATH and /usr/local/cuda/bin)"
    if wish == "1":
        raise BuildFailure(
            f"DELTAOPS_CUDA=1 asks for the CUDA module, and {missing}. Install the CUDA toolkit "
            "(12.8 or newer), or set NVCC=/path/to/nvcc, or build without it: DELTAOPS_CUDA=0."
        )
    return missing


def _find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [
        os.environ.get("NVCC"),
        f"{home}/bin/nvcc" if home else None,
        "nvcc",
        "/usr/local/cuda/bin/nvcc",
    ]
    for candidate in candidates:
        found = shutil.which(candidate) if candidate else None
        if found:
            return Path(found)
    return None


def _toolkit(nvcc: Path) -> CudaToolkit:
    # nvcc may be a shell wrapper; a dry run names the folder that the real one belongs to.
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.touch()
        try:
            dry = _output(str(nvcc), "--dryrun", "-c", str(source))
            version = _output(str(nvcc), "--version").strip().splitlines()[-1]
            codes = set(re.findall(r"sm_(\d+)", _output(str(nvcc), "--list-gpu-code")))
        except (OSError, subprocess.CalledProcessError) as error:
            raise BuildFailure(
                f"{nvcc} was found and does not run ({error}); repair the CUDA toolkit, or build "
                "without the CUDA module: DELTAOPS_CUDA=0."
            ) from error
    top = re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
    root = Path(top.group(1).strip()).resolve() if top else nvcc.resolve().parent.parent
    places = ("lib64", "lib", f"targets/{platform.machine()}-linux/lib")
    cudart = [root / place / "libcudart_static.a" for place in places]
    cudart = [path for path in cudart if path.exists()]
    if not cudart:
        raise BuildFailure(
            f"the CUDA toolkit {root} (of {nvcc}) has no libcudart_static.a in "
            f"{', '.join(places)}; install its runtime development files "
            "(Debian: cuda-cudart-dev), or build without the CUDA module: DELTAOPS_CUDA=0."
        )
    return CudaToolkit(nvcc, root, version, _archs(codes, version), cudart[0])


def _archs(codes: set[str], version: str) -> tuple[str, ...]:
    """The architectures to compile for: those asked for, or the default ones that nvcc knows."""
    asked = os.environ.get("DELTAOPS_CUDA_ARCHS", "")
    wanted = [arch for arch in re.split(r"[;, ]+", asked or DEFAULT_CUDA_ARCHS) if arch]
    odd = [arch for arch in wanted if not re.fullmatch(r"\d+[af]?", arch)]
    if odd:
        raise BuildFailure(
            f"DELTAOPS_CUDA_ARCHS must be a list such as {DEFAULT_CUDA_ARCHS}, got {asked!r}."
        )
    known = [arch for arch in wanted if arch.rstrip("af") in codes]
    if not known or (asked and known != wanted):
        unknown = [arch for arch in wanted if arch not in known]
        raise BuildFailure(
            f"nvcc ({version}) does not compile for sm_{', sm_'.join(unknown)}; it knows "
            f"{', '.join(sorted(codes, key=int))}. Set DELTAOPS_CUDA_ARCHS to some of them."
        )
    return tuple(known)
