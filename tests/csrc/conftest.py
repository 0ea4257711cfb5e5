"""The core, built twice for the session: as it ships, and with its 64-byte bodies emulated."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Builds = dict[str, tuple[Path, list[Path]]]
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


def build_core(folder: Path) -> Builds:
    """Kind of build -> (library, objects)."""
    core = _load_helper("core")
    if core.compiler() is None:
        pytest.skip("no g++ to build the native core with")
    if platform.machine() != "x86_64":
        pytest.skip("these tests name the x86-64 instruction sets")
    out: Builds = {}
    for kind in ("native", "emulated"):
        place = folder / kind
        place.mkdir()
        objects = core.compile_objects(place, out["native"][1] if kind == "emulated" else None)
        library = place / "libdeltaops.so"
        link = ["g++", "-shared", *map(str, objects), "-fopenmp", "-o", str(library)]
        subprocess.run(link, check=True, env=core.ENVIRONMENT)
        out[kind] = (library, objects)
    return out


def build_programs(folder: Path, builds: Builds) -> dict[str, Path]:
    """Kind of build -> the program of native/, linked with it."""
    native = _load_helper("native")
    tests = native.compile_tests(folder)
    return {
        kind: native.link_with([*objects, *tests], folder, kind)
        for kind, (_, objects) in builds.items()
    }


def build_sanitized(folder: Path, builds: Builds, sanitizer: str) -> Path:
    """The program with its core under a sanitizer."""
    native = _load_helper("native")
    reason = native.runs_here(sanitizer, folder)
    if reason is not None:
        pytest.skip(reason)
    plain = builds["native" if native.has_avx512() else "emulated"][1]
    program: Path = native.build_with(sanitizer, folder, plain)
    return program


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts what the selected tests' fixtures of the same names ask for (tests/conftest.py)."""
    names = {name for item in session.items if isinstance(item, pytest.Function)
             for name in item.fixturenames}  # fmt: skip
    ahead = session.config.pluginmanager.get_plugin("ahead")
    jobs: dict[str, Callable[[Path], Any]] = {
        "builds": build_core,
        "programs": lambda folder: build_programs(folder, ahead.result("builds")),
        "addresses": lambda folder: build_sanitized(
            folder, ahead.result("builds"), "address,undefined"
        ),
        "races": lambda folder: build_sanitized(folder, ahead.result("builds"), "thread"),
    }
    if session.config.option.collectonly or not names & jobs.keys():
        return
    for name, job in jobs.items():
        if name in names | {"builds"}:
            ahead.start(name, job)


@pytest.fixture(scope="session")
def builds(ahead: Any) -> Builds:
    """Kind of build -> (library, objects)."""
    out: Builds = ahead.result("builds")
    return out


@pytest.fixture(params=ISAS, ids=lambda p: "-".join(p))
def core(
    request: pytest.FixtureRequest,
    builds: Builds,
    core_module: ModuleType,
) -> Any:
    kind, isa = request.param
    core = core_module.Core(builds[kind][0])
    if not dict(core.isas())[isa]:
        pytest.skip(f"this CPU has no {isa}")
    assert core.set_isa(isa) == 0
    return core
