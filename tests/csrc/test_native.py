"""The C ABI from C++: every instruction set that runs here, as it ships and emulated.

``DELTAOPS_FUZZ_CALLS=1000000 DELTAOPS_FUZZ_SEED=7 pytest tests/csrc/test_native.py -k fuzz`` makes
the fuzz run as long as wanted, on another stream; a failure names the call, its seed repeats it.
Under the sanitizers: see test_sanitizers.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Builds = dict[str, tuple[Path, list[Path]]]
CALLS = os.environ.get("DELTAOPS_FUZZ_CALLS", "3000")
SEED = os.environ.get("DELTAOPS_FUZZ_SEED", "1")


@pytest.fixture(scope="module")
def programs(ahead: Any) -> dict[str, Path]:
    out: dict[str, Path] = ahead.result("programs")
    return out


@pytest.fixture(params=["native", "emulated"])
def program(request: pytest.FixtureRequest, programs: dict[str, Path]) -> Path:
    return programs[request.param]


def test_sweep_matches_double(program: Path, native_module: ModuleType) -> None:
    assert "sweep baseline ok" in native_module.run(program, "sweep")


def test_fuzz_ends_in_statuses(program: Path, native_module: ModuleType) -> None:
    assert "fuzz baseline ok" in native_module.run(program, "fuzz", "all", CALLS, SEED)


def test_callers_at_once_get_the_same_bits(program: Path, native_module: ModuleType) -> None:
    assert "threads baseline ok" in native_module.run(program, "threads")


def test_emulated_build_reaches_every_body(
    builds: Builds, programs: dict[str, Path], native_module: ModuleType, core_module: ModuleType
) -> None:
    isas = core_module.Core(builds["emulated"][0]).isas()
    if not dict(isas)["avx2"]:
        pytest.skip("this CPU has no AVX2, which the emulation is compiled for")
    said = native_module.run(programs["emulated"], "quick").splitlines()
    assert said == [f"quick {name} ok" for name, _ in isas]
    assert {"avx512", "avx512_bf16"} <= {name for name, _ in isas}
