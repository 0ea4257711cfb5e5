"""What ``import deltaops`` loads, seen in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("triton", "jax", "flax", "transformers", "peft", "matplotlib", "typer", "optuna")

# A blocked package raises what a missing one does. torch is loaded before the block: it looks for
# triton itself, and that is not what is tested.
BLOCK = """
import sys
import torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)
for name in [n for n in sys.modules if n.split(".")[0] in {names!r}]:
    del sys.modules[name]
sys.meta_path.insert(0, Blocked())
"""

LOADED = """
import sys
import torch
before = set(sys.modules)
import deltaops
{more}
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(*sorted(new & set({names!r})))
"""

ONE_CALL = """
import deltaops
from deltaops.ops import Branch, delta_linear
x, w = torch.randn(3, 5), torch.randn(4, 5)
y = delta_linear(x, w, None, (Branch(torch.randn(2, 5), torch.zeros(4, 2)),))
torch.testing.assert_close(y, x @ w.T)
print(*(type(d).__name__ for d in [deltaops.LoRA(r=2)]), len(deltaops.backends()) > 1)
"""


def python(code: str, folder: Path) -> str:
    """What a new interpreter prints, started in an empty folder with warnings as errors."""
    run = subprocess.run(
        # -P: only what is installed, nothing of the folder it starts in
        [sys.executable, "-P", "-W", "error", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_import_loads_no_optional_package(tmp_path: Path) -> None:
    assert python(LOADED.format(more="", names=HEAVY), tmp_path) == ""


def test_that_test_can_fail(tmp_path: Path) -> None:
    assert python(LOADED.format(more="import typer", names=HEAVY), tmp_path) == "typer"


def test_import_and_one_call_without_any_optional_package(tmp_path: Path) -> None:
    said = python(BLOCK.format(names=set(HEAVY)) + ONE_CALL, tmp_path)
    assert said == "LoRA True"


@pytest.mark.parametrize("name", HEAVY)
def test_the_block_blocks(name: str, tmp_path: Path) -> None:
    code = BLOCK.format(names={name}) + (
        f"try:\n    import {name}\nexcept ModuleNotFoundError as error:\n    print(error.name)\n"
    )
    assert python(code, tmp_path) == name
