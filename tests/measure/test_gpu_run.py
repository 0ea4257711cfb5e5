"""``make gpu``: a step that fails or loses the GPU's context takes no other with it."""

from __future__ import annotations

import importlib.util
import shutil
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from deltaops.measure import gpu
from deltaops.measure.interleave import Timing

TESTS = Path(__file__).resolve().parents[1]
FAKE = """
import os

class AcceleratorError(RuntimeError): ...

def test_good(): ...
def test_wrong(): assert False
def test_lost(): raise AcceleratorError("an illegal memory access was encountered")
def test_next(): ...
def test_dies(): os.abort()
def test_last(): ...
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tests/gpu.py, whose tests are those above."""
    spec = importlib.util.spec_from_file_location("gpu_driver", TESTS / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    shutil.copy(TESTS / "conftest.py", tmp_path)
    (tmp_path / "test_fake.py").write_text(FAKE, encoding="utf-8")
    return module


def test_a_share_goes_on_behind_the_test_that_lost_its_process(
    driver: ModuleType, tmp_path: Path
) -> None:
    tests = ("good", "wrong", "lost", "next", "dies", "last")
    names, log = [f"test_fake.py::test_{name}" for name in tests], tmp_path / "log"
    found = driver.run_share(names, log, time.monotonic() + 100)
    assert list(found.values()) == ["PASSED", "FAILED", "FAILED", "PASSED", "DIED", "PASSED"]
    said = log.read_text(encoding="utf-8")
    assert said.count("test session starts") == 3
    # where it happens: a process that is killed sums up nothing at its end
    assert "assert False" in said.partition("test_lost")[0]


def test_what_the_time_did_not_reach_is_said(driver: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_fake.py").write_text("import time\ndef test_slow(): time.sleep(60)\n")
    found = driver.run_share(["test_fake.py::test_slow"], tmp_path / "log", time.monotonic())
    assert found == {"test_fake.py::test_slow": "not reached"}


def test_a_case_that_fails_takes_no_other_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = [ValueError("no such tile\nand so on"), None, torch.AcceleratorError("illegal"), None]
    fate = iter(error)

    def made_up(case: gpu.Case) -> gpu.Result:
        if one := next(fate):
            raise one
        return gpu.Result(case, {gpu.FROZEN: Timing.of([1.0]), gpu.OURS: Timing.of([1.0])}, 0.0)

    cases = (gpu.Case(24, 32, 48, 4),) * 4
    assert gpu.run(tmp_path, 10.0, "GPU", cases, made_up, lambda: 0.0) == gpu.CONTEXT_LOST
    printed = capsys.readouterr().out
    assert "left out: failed: ValueError: no such tile" in printed
    assert "1 of 4 cases left out: the GPU's context was lost" in printed
