"""Imports point one way (``LAYERS``, left to right); read from the source, so nothing is loaded."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import deltaops

ROOT = Path(__file__).resolve().parents[2]

LAYERS = (
    {"cli"},
    {"tuning", "measure", "search"},
    {"strategy"},
    {"surgery"},
    {"methods"},
    {"modules"},
    {"ops"},
    {"dispatch"},
    {"backends", "bindings"},
    {"kernels", "native", "_cpu", "_cuda", "_xla", "_xla_cuda", "reference", "packing", "files"},
    {"memory"},
)
RANK = {layer: rank for rank, layers in enumerate(LAYERS) for layer in layers}
EVERYWHERE = {"errors", "__version__"}
# deltaops.testing stands beside the measuring code: both compare ops with the reference.
RANK["testing"] = RANK["measure"]
# Methods are compared by training them, so measuring has the training loop.
SIBLINGS = {
    ("cli", "testing"), ("measure", "testing"), ("measure", "tuning"), ("tuning", "tuning"),
    ("search", "tuning"),
}  # fmt: skip
# deltaops.numpy and deltaops.jax are names of what lies in bindings.
RANK["numpy"] = RANK["jax"] = RANK["dispatch"]
NATIVE = ("_cpu", "_cuda", "_xla", "_xla_cuda")
NATIVE_USERS = ("backends", "bindings", "native")
WITHOUT_TORCH = ("bindings", "native")
KERNELS_MAY_IMPORT = {"torch", "triton"}
REFERENCE_MAY_IMPORT = {"torch", "numpy"}


def sources(folder: str) -> Iterator[tuple[str, str]]:
    """Module name → text of each file of a package; kernels/ as it is installed."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(("deltaops", *parts) if parts[0] == "kernels" else parts)
        yield name, path.read_text(encoding="utf-8")


def imported(module: str, text: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that ``module`` imports when it runs.

    ``from a import b`` counts as ``a.b``. What only type checkers see is left out; a call of
    ``import_module`` with a written-out name is not.
    """
    package = module.removesuffix(".__init__") if module.endswith("__init__") else parent(module)
    tree = ast.parse(text)
    unseen = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in unseen:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def parent(module: str) -> str:
    return module.rpartition(".")[0]


def layer_of(name: str) -> str:
    """The layer of a name inside deltaops; public names count as the layer that they live in."""
    head = name.split(".")[1] if "." in name else ""
    return head if head in RANK else (deltaops._HOMES.get(head) or head).split(".")[0]


def violations(module: str, text: str) -> list[str]:
    """What ``module`` imports against the rules, a sentence each."""
    broken = []
    own = layer_of(module)
    for line, name in imported(module, text):
        top = name.split(".")[0]
        reason = None
        if top == "tests":
            reason = "shipped code must not import tests"
        elif top == "kernels":
            reason = "that name is Hugging Face's; ours is deltaops.kernels"
        elif own == "kernels" and not name.startswith("deltaops.kernels"):
            if top not in KERNELS_MAY_IMPORT | set(sys.stdlib_module_names):
                reason = "kernels import triton and torch only"
        elif own == "reference" and not name.startswith(("deltaops.reference", "deltaops.errors")):
            if top not in REFERENCE_MAY_IMPORT | set(sys.stdlib_module_names):
                reason = "the reference imports torch only"
        elif own in WITHOUT_TORCH and top == "torch":
            reason = "bindings stand on the native core, without torch"
        elif top == "deltaops":
            reason = inside(own, module, name)
        if reason:
            broken.append(f"{module}:{line} imports {name}: {reason}")
    return broken


def inside(own: str, module: str, name: str) -> str | None:
    """Why a module of the layer ``own`` may not import ``name`` of deltaops, or None."""
    other = layer_of(name)
    if own == "__init__":
        if name == "deltaops.dispatch.backends":  # or the folder backends/ would take its name
            return None
        return "deltaops/__init__.py loads its parts when they are first used"
    if own in EVERYWHERE:
        return "errors import nothing of deltaops"
    if other in EVERYWHERE:
        return None
    if name == "deltaops":  # its lazy names reach as far left as surgery
        return None if RANK[own] < RANK["surgery"] else "the front door is for users and programs"
    if other not in RANK:
        return f"{other or name} has no place in LAYERS"
    if own == other == "backends" and module != "deltaops.backends.__init__":
        rival = name.split(".")[2:3]
        same = rival in ([], ["base"], ["calls"], ["plain"], [module.split(".")[2]])
        return None if same else "one backend must not import another"
    if own == other or (own, other) in SIBLINGS:
        return None
    if own == "testing" and other in {"cli", "tuning", "measure"}:
        return "testing ships for others' backends and needs none of our programs"
    if own in WITHOUT_TORCH and other not in {own, "native", "files", *NATIVE}:
        return "bindings stand on the native core, without torch"
    if own == "native" and other in NATIVE:  # which it loads
        return None
    if other in NATIVE and own not in NATIVE_USERS:
        return "only a backend calls the native core"
    if other == "kernels" and own != "backends":
        return "only a backend launches kernels"
    return None if RANK[own] < RANK[other] else f"{own} is not left of {other}"


SHIPPED = [*sources("deltaops"), *sources("kernels")]


@pytest.mark.parametrize(("module", "text"), SHIPPED, ids=[name for name, _ in SHIPPED])
def test_imports_point_to_the_right(module: str, text: str) -> None:
    assert violations(module, text) == []


@pytest.mark.parametrize(
    ("module", "text", "reason"),
    [
        ("deltaops.ops.x", "from deltaops.modules import LinearPlace", "ops is not left of"),
        ("deltaops.ops.x", "import deltaops.modules", "ops is not left of modules"),
        ("deltaops.modules.x", "from deltaops import LoRA", "modules is not left of methods"),
        ("deltaops.surgery.x", "def f():\n    from deltaops.cli import main", "not left of cli"),
        ("deltaops.tuning.x", "from deltaops.measure import steps", "tuning is not left of"),
        ("deltaops.dispatch", "from .ops import delta_linear", "dispatch is not left of ops"),
        ("deltaops.backends.cpu", "from .reference import ReferenceBackend", "one backend"),
        ("deltaops.backends.cpu", "from . import cuda", "one backend must not"),
        ("deltaops.backends.cpu.x", "from deltaops.backends import triton", "one backend must not"),
        ("deltaops.backends.x", "from deltaops.backends import cpu", "one backend must not"),
        ("deltaops.reference.x", "import triton", "the reference imports torch only"),
        ("deltaops.reference.x", "from deltaops import _cpu", "the reference imports torch"),
        ("deltaops.reference.__init__", "from ..ops import delta_linear", "imports torch only"),
        ("deltaops.kernels.x", "from deltaops.errors import ShapeError", "kernels import triton"),
        ("deltaops.kernels.x", "from ..reference import philox", "kernels import triton"),
        ("deltaops.ops.x", "import_module('deltaops._cpu')", "only a backend calls"),
        ("deltaops.ops.x", "import deltaops.kernels.forward", "only a backend launches"),
        ("deltaops.bindings.numpy.x", "import torch", "without torch"),
        ("deltaops.bindings.jax.x", "from deltaops.reference import philox", "without torch"),
        ("deltaops.backends.x", "from deltaops.bindings import c", "backends is not left of"),
        ("deltaops.native", "from deltaops.memory import start", "without torch"),
        ("deltaops.testing.x", "import deltaops.cli", "testing"),
        ("deltaops.cli.x", "from tests.cases import CASES", "must not import tests"),
        ("deltaops.cli.x", "import deltaops.novelty", "has no place in LAYERS"),
        ("deltaops.backends.x", "import kernels", "Hugging Face's"),
        ("deltaops.modules.x", "import deltaops", "the front door is for users and programs"),
        ("deltaops.errors", "from .dispatch import select", "errors import nothing"),
        ("deltaops.__init__", "from .surgery import attach", "when they are first used"),
    ],
)
def test_each_rule_can_fail(module: str, text: str, reason: str) -> None:
    (found,) = violations(module, text)
    assert reason in found


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("deltaops.ops.x", "from deltaops.reference import delta_linear"),
        (
            "deltaops.ops.x",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n import deltaops.cli",
        ),
        ("deltaops.backends.cpu", "from .base import Backend"),
        ("deltaops.backends.cpu", "from .calls import Call"),
        ("deltaops.backends.triton.x", "from deltaops.backends.plain import PlainPlan"),
        ("deltaops.backends.cpu.x", "from .core import native"),
        ("deltaops.backends.triton", "from deltaops.kernels import forward"),
        ("deltaops.bindings.jax.x", "from deltaops.bindings.numpy import PackedWeight"),
        ("deltaops.bindings.numpy.x", "import numpy as np\nfrom deltaops.native import load"),
        ("deltaops.kernels.x", "import triton.language as tl\nfrom .tiles import grouped_tile"),
        ("deltaops.cli.x", "from deltaops import LoRA, __version__"),
    ],
)
def test_the_rules_let_through_what_they_should(module: str, text: str) -> None:
    assert violations(module, text) == []


FOREIGN = re.compile(r'^\s*#\s*include\s*[<"](Python\.h|pybind11/|torch/|ATen/|c10/)', re.MULTILINE)


def native_sources(folder: str) -> list[Path]:
    return [
        p for p in sorted((ROOT / "csrc" / folder).rglob("*")) if p.suffix in {".h", ".cpp", ".cu"}
    ]


@pytest.mark.parametrize("folder", ["cpu", "cuda", "include"])
def test_native_core_knows_neither_python_nor_torch(folder: str) -> None:
    files = native_sources(folder)
    assert files
    assert [p.name for p in files if FOREIGN.search(p.read_text(encoding="utf-8"))] == []


def test_no_binding_reads_torch_headers() -> None:
    texts = [p.read_text(encoding="utf-8") for p in native_sources("bindings")]
    found = [match.group(1) for text in texts for match in FOREIGN.finditer(text)]
    assert found
    assert {name for name in found if name not in {"Python.h", "pybind11/"}} == set()


@pytest.mark.parametrize("line", ["#include <Python.h>", "  # include <torch/extension.h>"])
def test_foreign_headers_are_seen(line: str) -> None:
    assert FOREIGN.search(f"#include <vector>\n{line}\n")
