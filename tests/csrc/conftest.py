"""Builds the core twice for the session: as it ships, and with its 64-byte bodies emulated."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ISAS = [
    ("native", "baseline"),
    ("native", "avx2"),
    ("native", "avx512"),
    ("native", "avx512_bf16"),
    ("emulated", "avx512"),
    ("emulated", "avx512_bf16"),
]


def _load_helper(file: str) -> ModuleType:
    # importlib import mode has no package here, so helpers are loaded by path, once, by name.
    name = f"deltaops_tests_csrc_{file}"
    if name not in sys.modules:
        path = Path(__file__).with_name(f"{file}.py")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def core_module() -> ModuleType:
    return _load_helper("core")


@pytest.fixture(scope="session")
def native_module() -> ModuleType:
    return _load_helper("native")


@pytest.fixture(scope="session")
def builds(
    tmp_path_factory: pytest.TempPathFactory, core_module: ModuleType
) -> dict[str, tuple[Path, list[Path]]]:
    """Kind of build -> (library, objects)."""
    if core_module.compiler() is None:
        pytest.skip("no g++ to build the native core with")
    if platform.machine() != "x86_64":
        pytest.skip("these tests name the x86-64 instruction sets")
    out: dict[str, tuple[Path, list[Path]]] = {}
    for kind in ("native", "emulated"):
        folder = tmp_path_factory.mktemp(kind)
        objects = core_module.compile_objects(
            folder, out["native"][1] if kind == "emulated" else None
        )
        library = folder / "libdeltaops.so"
        link = ["g++", "-shared", *map(str, objects), "-fopenmp", "-o", str(library)]
        subprocess.run(link, check=True)
        out[kind] = (library, objects)
    return out


@pytest.fixture(params=ISAS, ids=lambda p: "-".join(p))
def core(
    request: pytest.FixtureRequest,
    builds: dict[str, tuple[Path, list[Path]]],
    core_module: ModuleType,
) -> Any:
    kind, isa = request.param
    core = core_module.Core(builds[kind][0])
    if not dict(core.isas())[isa]:
        pytest.skip(f"this CPU has no {isa}")
    assert core.set_isa(isa) == 0
    return core
