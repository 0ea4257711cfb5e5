"""The C program that calls the CUDA library: linked as for a GPU, and run on the emulated grid."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import deltaops

from . import emulated

EXAMPLE = emulated.ROOT / "csrc" / "examples" / "lora_cuda.c"
RUNTIME = Path(__file__).with_name("runtime")
STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
TOOLKIT = """
from buildtools import toolchain
found = toolchain.find_cuda()
print("skip " + found if isinstance(found, str) else f"{found.root} {found.cudart}")
"""


def needs(*programs: str) -> None:
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not on the PATH: {', '.join(missing)}")


def run(program: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=60)


def compiled(source: Path, target: Path) -> Path:
    """For the emulated grid."""
    needs("cc")
    emulated.library()
    folder = emulated.ROOT / "build" / "emulated"
    command = ["cc", "-std=c11", *STRICT, f"-I{RUNTIME}", f"-I{deltaops.get_include()}",
               str(source), f"-L{folder}", f"-Wl,-rpath,{folder}", "-ldeltaops_cuda", "-lm",
               "-o", str(target)]  # fmt: skip
    subprocess.run(command, check=True)
    return target


def test_it_is_right_on_the_emulated_grid(tmp_path: Path) -> None:
    done = run(compiled(EXAMPLE, tmp_path / "lora_cuda"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^\w+", done.stdout, re.MULTILINE) == [
        "C", "y", "grad_x", "grad_bias", "grad_a", "grad_b",
    ]  # fmt: skip


def test_it_fails_when_a_result_is_off(tmp_path: Path) -> None:
    source = EXAMPLE.read_text(encoding="utf-8")
    wrong = source.replace("project.scaling = scaling;", "project.scaling = 1.1f * scaling;")
    assert wrong != source
    (tmp_path / "wrong.c").write_text(wrong, encoding="utf-8")
    done = run(compiled(tmp_path / "wrong.c", tmp_path / "wrong"))
    assert done.returncode == 1
    assert "relative error" in done.stdout


def test_it_links_for_a_gpu_and_says_where_there_is_none(tmp_path: Path) -> None:
    needs("cc")
    asked = subprocess.run([sys.executable, "-c", TOOLKIT], cwd=emulated.ROOT, check=True,
                           capture_output=True, text=True).stdout.strip()  # fmt: skip
    library = Path(deltaops.__file__).with_name("libdeltaops_cuda.so")
    if asked.startswith("skip ") or not library.exists():
        pytest.skip(asked.removeprefix("skip ") if library.exists() else f"no {library}")
    root, cudart = map(Path, asked.split())
    program = tmp_path / "lora_cuda"
    command = ["cc", "-std=c99", *STRICT, f"-isystem{root / 'include'}",
               f"-I{deltaops.get_include()}", str(EXAMPLE), f"-L{library.parent}",
               f"-Wl,-rpath,{library.parent}", "-ldeltaops_cuda", str(cudart),
               "-ldl", "-lrt", "-lpthread", "-lm", "-o", str(program)]  # fmt: skip
    subprocess.run(command, check=True)
    done = run(program)
    if done.returncode:
        assert re.search(r"describe: .*no NVIDIA driver|no GPU", done.stderr), done.stderr
    else:
        assert "grad_b" in done.stdout
