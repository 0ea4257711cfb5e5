"""The native test program under the sanitizers, for the instruction sets that ``native`` lists.

Small shapes and -O1: each build is compiled once and all runs together take seconds. A long fuzz,
30000 calls of each op on each of those instruction sets, takes ten minutes:

    DELTAOPS_FUZZ_CALLS=120000 pytest tests/csrc/test_sanitizers.py -k "addresses and fuzz"

``DELTAOPS_FUZZ_SEED`` chooses another stream; a failure names the call, its seed repeats it.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CALLS = os.environ.get("DELTAOPS_FUZZ_CALLS")  # of delta_linear, and a quarter of each other op
SEED = os.environ.get("DELTAOPS_FUZZ_SEED", "1")

pytestmark = pytest.mark.waits


@pytest.fixture(scope="module")
def addresses(ahead: Any) -> Path:
    program: Path = ahead.result("addresses")
    return program


@pytest.fixture(scope="module")
def races(ahead: Any) -> Path:
    program: Path = ahead.result("races")
    return program


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


@pytest.mark.parametrize("words", [("quick",), ("fuzz", CALLS or "1500", SEED), ("threads", "2")],
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


@pytest.mark.parametrize("words", [("fuzz", CALLS or "400", SEED), ("threads", "2")],
                         ids=lambda words: words[0])  # fmt: skip
def test_threads_do_not_race(
    races: Path, native_module: ModuleType, words: tuple[str, ...]
) -> None:
    run(races, native_module, "thread", *words)
