"""The C program that calls the CUDA library: linked as for a GPU, and run on the emulated grid."""

from __future__ import annotations

import re
from pathlib import Path

from . import emulated
from .programs import compiled, linked, run

EXAMPLE = emulated.ROOT / "csrc" / "examples" / "lora_cuda.c"


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
    done = run(linked(EXAMPLE, tmp_path / "lora_cuda"))
    if done.returncode:
        assert re.search(r"describe: .*no NVIDIA driver|no GPU", done.stderr), done.stderr
    else:
        assert "grad_b" in done.stdout
