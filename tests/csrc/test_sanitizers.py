"""The native test program under the sanitizers, for every instruction set that runs here.

Small shapes and -O1: each build is compiled once and all runs together take seconds.
"""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from types import ModuleType

import pytest


def build(
    sanitizer: str, native_module: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the native core with")
    if platform.machine() != "x86_64":
        pytest.skip("these tests name the x86-64 instruction sets")
    folder = tmp_path_factory.mktemp(sanitizer.replace(",", "-"))
    reason = native_module.runs_here(sanitizer, folder)
    if reason is not None:
        pytest.skip(reason)
    program: Path = native_module.build_with(sanitizer, folder)
    return program


@pytest.fixture(scope="module")
def addresses(native_module: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("address,undefined", native_module, tmp_path_factory)


@pytest.fixture(scope="module")
def races(native_module: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("thread", native_module, tmp_path_factory)


@pytest.mark.parametrize("words", [("quick",), ("fuzz", "all", "1500"), ("threads", "all", "2")],
                         ids=lambda words: words[0])  # fmt: skip
def test_addresses_and_behaviour_are_defined(
    addresses: Path, native_module: ModuleType, words: tuple[str, ...]
) -> None:
    assert "ok" in native_module.run(addresses, *words, sanitizer="address,undefined")


@pytest.mark.parametrize("words", [("fuzz", "all", "400"), ("threads", "all", "2")],
                         ids=lambda words: words[0])  # fmt: skip
def test_threads_do_not_race(
    races: Path, native_module: ModuleType, words: tuple[str, ...]
) -> None:
    assert "ok" in native_module.run(races, *words, sanitizer="thread")
