"""The test program of tests/csrc/native: the C ABI from C++, without Python, torch or numpy."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "csrc" / "cpu"
SOURCES = [
    "layer.cpp",
    "op.cpp",
    "ops.cpp",
    "heads.cpp",
    "group.cpp",
    "sweep.cpp",
    "fuzz.cpp",
    "fuzz_ops.cpp",
    "fuzz_heads.cpp",
    "threads.cpp",
    "main.cpp",
]
FLAGS = json.loads((CPU / "flags.json").read_text(encoding="utf-8"))
# The sanitizers and the instruction sets that each of them watches: every width of a vector, every
# unit of the packed weight. The others would be compiled long and run no other line.
WATCHED = {
    "address,undefined": ["baseline", "avx2", "avx512_bf16"],
    "thread": ["baseline", "avx512_bf16"],
}
AVX512 = ["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"]  # as the kernel says them
ENVIRONMENT = dict(os.environ)  # what tests change of it does not reach the compilers
# The shapes here are small: a team that spins between them only takes cores from other tests.
QUIET_TEAM = {"OMP_WAIT_POLICY": "passive"}


def has_avx512() -> bool:
    """Whether this CPU runs the 64-byte bodies as they ship; else they are emulated."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return all(f" {name}" in text for name in AVX512)


def _ended(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    """``command``, ended, with what it said.

    One of CI's virtual machines answered a start with EFAULT, on addresses that the interpreter
    itself had made; such a program has not begun, so it may be started again.
    """
    for _ in range(3):
        try:
            return subprocess.run(command, capture_output=True, text=True, **more)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            refused = error
    raise refused


def _run(command: list[str]) -> None:
    done = _ended(command, cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def compile_tests(folder: Path) -> list[Path]:
    """The objects of the test program itself, for :func:`link_with`."""
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    include = f"-I{ROOT / 'csrc' / 'include'}"

    def one(name: str) -> Path:
        out = folder / f"{name}.o"
        source = ROOT / "tests" / "csrc" / "native" / name
        _run(["g++", *flags, include, "-c", str(source), "-o", str(out)])
        return out

    with ThreadPool(2) as pool:
        return pool.map(one, SOURCES, chunksize=1)


def link_with(objects: list[Path], folder: Path, name: str) -> Path:
    """The program from objects of the core as they ship and those of the tests."""
    program = folder / name
    _run(["g++", "-pthread", *map(str, objects), *FLAGS["link"], "-o", str(program)])
    return program


def build_with(sanitizer: str, folder: Path, plain: list[Path]) -> Path:
    """The program and the core, compiled with ``-fsanitize=sanitizer``.

    Instruction sets that are not watched come from the objects ``plain``, to fill their place.
    Under ThreadSanitizer the team is native/team.cpp's, since that of GCC's libgomp synchronises
    out of its sight; native/team.cpp says more.
    """
    thread = sanitizer == "thread"
    common = [flag for flag in FLAGS["common"] if flag not in ("-O3", "-g0", "-fopenmp")]
    common += ["-O1", "-g1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread"]
    # Reads through NULL and past a known object: AddressSanitizer stops at both, much cheaper.
    common += ["-DDELTAOPS_TEST_TEAM"] if thread else ["-fno-sanitize=null,object-size", "-fopenmp"]
    special = {} if has_avx512() else FLAGS["emulated"]["files"]
    common += [] if has_avx512() else FLAGS["emulated"]["common"]
    common += [f"-I{CPU / path}" for path in FLAGS["include"]]
    isas = {f"isa_{isa}.cpp" for isa in WATCHED[sanitizer]}
    watched = [name for name in FLAGS["machines"]["x86_64"]
               if name in isas or not name.startswith("isa_")]  # fmt: skip
    others = [str(path) for path in plain if path.stem not in watched]
    core = [(CPU / name, special.get(name, FLAGS["files"][name])) for name in watched]
    tests = [(ROOT / "tests" / "csrc" / "native" / name, list[str]())
             for name in SOURCES + (["team.cpp"] if thread else [])]  # fmt: skip

    def one(unit: tuple[Path, list[str]]) -> str:
        out = str(folder / f"{unit[0].name}.o")
        _run(["g++", *common, *unit[1], "-c", str(unit[0]), "-o", out])
        return out

    # The large ones first, so that no compiler is left alone with one of them at the end.
    units = sorted(core + tests, key=lambda unit: not unit[0].name.startswith("isa_"))
    with ThreadPool(2) as pool:
        objects = pool.map(one, units, chunksize=1)
    program = folder / "native"
    _run(["g++", *common, *objects, *others, *FLAGS["link"], "-o", str(program)])
    return program


def runs_here(sanitizer: str, folder: Path) -> str | None:
    """None, or why a program with this sanitizer cannot be built and started here."""
    source, program = folder / "probe.cpp", folder / "probe"
    source.write_text("int main() { return 0; }\n", encoding="utf-8")
    command = ["g++", f"-fsanitize={sanitizer}", str(source), "-o", str(program)]
    if _ended(command, env=ENVIRONMENT).returncode != 0:
        return f"g++ has no -fsanitize={sanitizer} here (install its libsanitizer)"
    done = _ended([*launcher(sanitizer), str(program)])
    return None if done.returncode == 0 else f"-fsanitize={sanitizer}: {done.stderr.strip()[:200]}"


def no_leaks_seen(folder: Path) -> str | None:
    """None, or why LeakSanitizer cannot look here: it traces the program at its end."""
    source, program = folder / "leak.cpp", folder / "leak"
    text = "#include <cstdlib>\nint main() { return std::malloc(8) == nullptr; }\n"
    source.write_text(text, encoding="utf-8")
    _run(["g++", "-O0", "-fsanitize=address", str(source), "-o", str(program)])
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=1"}
    done = _ended([str(program)], env=environment)
    if "detected memory leaks" in done.stderr:
        return None
    return f"LeakSanitizer does not work here: {done.stderr.strip()[:200] or 'it saw no leak'}"


def launcher(sanitizer: str) -> list[str]:
    """ThreadSanitizer wants a fixed memory map, which newer kernels give only when asked."""
    setarch = shutil.which("setarch") if sanitizer == "thread" else None
    if setarch is None or _ended([setarch, "-R", "true"]).returncode:
        return []
    return [setarch, "-R"]


def run(program: Path, *words: str, sanitizer: str = "", leaks: bool = False) -> str:
    """What the program says; its failure is the test's, with all it said."""
    options = {
        # A refused allocation is a status under test, not an error of the program.
        "ASAN_OPTIONS": f"allocator_may_return_null=1:detect_leaks={int(leaks)}",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:allocator_may_return_null=1",
    }
    environment = os.environ | QUIET_TEAM | options
    environment.pop("DELTAOPS_CPU_ISA", None)
    limit = None if "DELTAOPS_FUZZ_CALLS" in os.environ else 600
    done = _ended([*launcher(sanitizer), str(program), *words], env=environment, timeout=limit)
    assert done.returncode == 0, f"native {' '.join(words)}\n{done.stdout}{done.stderr[:8000]}"
    return done.stdout
