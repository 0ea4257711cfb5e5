"""A compiled core of another build than the package."""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

import deltaops
from deltaops.backends.cpu import core
from deltaops.cli import app
from deltaops.errors import BuildError


@pytest.fixture
def stale(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """What stands in for ``deltaops._cpu``, which has next to nothing."""
    module = ModuleType("deltaops._cpu")
    module.abi_version = lambda: core.ABI_VERSION  # type: ignore[attr-defined]  # as compiled
    monkeypatch.setitem(sys.modules, "deltaops._cpu", module)
    monkeypatch.setattr("deltaops.memory._core", None)
    monkeypatch.setattr("deltaops.memory._on", False)
    core.native.cache_clear()
    yield module
    core.native.cache_clear()


def test_another_abi_says_how_to_rebuild(stale: ModuleType) -> None:
    stale.abi_version = lambda: 3  # type: ignore[attr-defined]  # as above
    told = rf"C ABI {core.ABI_VERSION} .* has 3: .*setup.py build_e"
    x = torch.ones(2, 2)
    with pytest.raises(BuildError, match=told):
        deltaops.explain(x, x)
    assert re.search(told, deltaops.backends()["cpu"])
    found = CliRunner().invoke(app, ["doctor", "--json"])
    assert found.exit_code == 1
    assert re.search(told, json.loads(found.stdout)["core"]["reason"])


def test_what_it_lacks_says_how_to_rebuild(stale: ModuleType) -> None:
    with pytest.raises(BuildError, match=r"must have 'recycle_limit' .* Rebuild it: `python setup"):
        core.core()
    stale.recycle_limit = lambda size: None  # type: ignore[attr-defined]  # as above
    stale.set_tensor_types = lambda *kinds: None  # type: ignore[attr-defined]  # as above
    with pytest.raises(BuildError, match="must have 'rotary'"):
        core.core().rotary()
    assert not hasattr(core.core(), "__wrapped__")  # Python may still ask what it asks of modules


def test_pickle_may_look_for_a_name_in_every_module() -> None:
    def nowhere() -> None: ...

    nowhere.__module__ = None  # type: ignore[assignment]  # as builtins of C have it
    assert core.core() is sys.modules["deltaops._cpu"]
    assert pickle.whichmodule(nowhere, "nowhere") == "__main__"  # type: ignore[attr-defined]  # not in typeshed
