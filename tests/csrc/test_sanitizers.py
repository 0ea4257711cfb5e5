"""The native test program under the sanitizers, for the instruction sets that ``native`` lists.

Small shapes and -O1: each build is compiled once and all runs together take seconds.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

Builds = dict[str, tuple[Path, list[Path]]]


def build(
    sanitizer: str,
    builds: Builds,
    native_module: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp(sanitizer.replace(",", "-"))
    reason = native_module.runs_here(sanitizer, folder)
    if reason is not None:
        pytest.skip(reason)
    plain = builds["native" if native_module.has_avx512() else "emulated"][1]
    program: Path = native_module.build_with(sanitizer, folder, plain)
    return program


@pytest.fixture(scope="module")
def addresses(
    builds: Builds, native_module: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return build("address,undefined", builds, native_module, tmp_path_factory)


@pytest.fixture(scope="module")
def races(
    builds: Builds, native_module: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return build("thread", builds, native_module, tmp_path_factory)


@pytest.fixture(scope="module")
def leak_blindness(
    addresses: Path, native_module: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> str | None:
    """None where leaks are looked for, else the reason why not."""
    reason: str | None = native_module.no_leaks_seen(tmp_path_factory.mktemp("leaks"))
    return reason


def run(
    program: Path, native_module: ModuleType, sanitizer: str, *words: str, **more: bool
) -> None:
    """On the sets that this build watches, where ``words`` has the place for them."""
    isas = ",".join(native_module.WATCHED[sanitizer])
    said = native_module.run(program, words[0], isas, *words[1:], sanitizer=sanitizer, **more)
    assert f"{words[0]} baseline ok" in said


@pytest.mark.parametrize("words", [("quick",), ("fuzz", "1500"), ("threads", "2")],
                         ids=lambda words: words[0])  # fmt: skip
def test_addresses_and_behaviour_are_defined(
    addresses: Path, leak_blindness: str | None, native_module: ModuleType, words: tuple[str, ...]
) -> None:
    leaks = leak_blindness is None
    run(addresses, native_module, "address,undefined", *words, leaks=leaks)


def test_leaks_are_looked_for(leak_blindness: str | None) -> None:
    """So that a report says where the test above was blind."""
    if leak_blindness is not None:
        pytest.skip(leak_blindness)


@pytest.mark.parametrize("words", [("fuzz", "400"), ("threads", "2")],
                         ids=lambda words: words[0])  # fmt: skip
def test_threads_do_not_race(
    races: Path, native_module: ModuleType, words: tuple[str, ...]
) -> None:
    run(races, native_module, "thread", *words)
