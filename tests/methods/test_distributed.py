"""DistributedDataParallel in two processes: every method's gradients are the full batch's."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaops.testing import relative_error

from . import ddp_worker
from .test_contract import METHODS

Gradients = dict[str, dict[str, Tensor]]


def prepare(ahead: Any, fixtures: set[str]) -> None:
    """Both processes run beside the tests that come before."""
    if "distributed" in fixtures:
        ahead.start("gloo", two_processes)


def two_processes(folder: Path) -> Gradients:
    deltas = {name: make() for name, make in METHODS.items()}
    (folder / "deltas.pkl").write_bytes(pickle.dumps(deltas))
    command = [sys.executable, "-P", ddp_worker.__file__]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(ddp_worker.WORLD)
    ]
    try:
        printed = [process.communicate(timeout=240)[0].decode() for process in running]
    finally:
        for process in running:
            process.kill()
    assert [p.returncode for p in running] == [0] * ddp_worker.WORLD, "\n".join(printed)
    found: Gradients = torch.load(folder / "grads.pt", weights_only=True)
    return found


@pytest.fixture(scope="module")
def distributed(ahead: Any) -> Gradients:
    found: Gradients = ahead.result("gloo")
    return found


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_full_batch(method: str, distributed: Gradients) -> None:
    expected = ddp_worker.gradients(METHODS[method](), None)
    found = distributed[method]
    assert found.keys() == expected.keys()
    assert found
    for key, grad in found.items():
        assert relative_error(grad, expected[key]) < 1e-4, key
        assert bool(grad.any()), key
