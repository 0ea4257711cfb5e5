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

from . import ddp_worker
from .test_contract import METHODS, PAIRS, UNREAD

Pairs = list[tuple[str, str]]
Gradients = dict[tuple[str, str], dict[str, Tensor]]
ONE = [pair for pair in PAIRS if pair[1] == "llama"]
OTHERS = [pair for pair in PAIRS if pair not in ONE]


def prepare(ahead: Any, fixtures: set[str]) -> None:
    """Both processes run beside the tests that come before."""
    if "distributed" in fixtures:
        ahead.start("gloo", lambda folder: two_processes(folder, ONE))
    if "elsewhere" in fixtures:
        ahead.start("gloo elsewhere", lambda folder: two_processes(folder, OTHERS))


def two_processes(folder: Path, pairs: Pairs) -> Gradients:
    deltas = {(method, name): METHODS[method]() for method, name in pairs}
    (folder / "deltas.pkl").write_bytes(pickle.dumps(deltas))
    command = [sys.executable, "-P", ddp_worker.__file__]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(ddp_worker.WORLD)
    ]
    try:
        printed = [
            process.communicate(timeout=240 if pairs == ONE else 1200)[0].decode()
            for process in running
        ]
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


@pytest.fixture(scope="module")
def elsewhere(ahead: Any) -> Gradients:
    found: Gradients = ahead.result("gloo elsewhere")
    return found


@pytest.mark.parametrize(("method", "name"), ONE)
def test_gradients_are_those_of_the_full_batch(
    method: str, name: str, distributed: Gradients
) -> None:
    held(method, name, distributed)


@pytest.mark.everything
@pytest.mark.parametrize(("method", "name"), OTHERS)
def test_gradients_on_other_architectures(method: str, name: str, elsewhere: Gradients) -> None:
    held(method, name, elsewhere)


def held(method: str, name: str, distributed: Gradients) -> None:
    """To the gradients of the full batch in one process."""
    expected = ddp_worker.gradients(METHODS[method](), name, None)
    found = distributed[method, name]
    assert found.keys() == expected.keys()
    assert found
    whole = torch.cat([grad.flatten() for grad in expected.values()]).norm()
    for key, grad in found.items():
        # a softmax does not feel a bias of its keys: what is left of that gradient is rounding
        size = max(expected[key].norm(), 1e-2 * whole)
        assert (grad - expected[key]).norm() < 1e-4 * size, key
        assert bool(grad.any()) != (UNREAD[name] in key), key
