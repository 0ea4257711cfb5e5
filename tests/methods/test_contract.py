"""Every method keeps what it promises; a new method joins by a line in ``METHODS``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import deltaops
from deltaops.methods import Delta, LoRA, Promise
from deltaops.testing import bound, relative_error

METHODS: dict[str, Callable[[], Delta]] = {
    "lora": lambda: LoRA(r=3, alpha=5),
    "lora-dropout": lambda: LoRA(r=3, alpha=5, dropout=0.3),
    "rslora": lambda: LoRA(r=3, alpha=5, use_rslora=True),
}


@pytest.fixture(params=list(METHODS))
def delta(request: pytest.FixtureRequest) -> Delta:
    torch.manual_seed(0)
    return METHODS[request.param]()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 9, bias=False)).eval()


def promised(delta: Delta, promise: Promise) -> None:
    if promise not in delta.promises:
        pytest.skip(f"{delta.kind} does not promise that {promise.value}")


def disturb(handle: deltaops.surgery.Handle) -> None:
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)


def test_identity_at_start(delta: Delta, model: nn.Module) -> None:
    promised(delta, Promise.IDENTITY_AT_START)
    x = torch.randn(5, 12)
    before = model(x)
    deltaops.attach(model.train(), delta)
    assert relative_error(model(x), before) <= bound(0.0, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merge_equals_apply(delta: Delta, model: nn.Module, dtype: torch.dtype) -> None:
    promised(delta, Promise.MERGE_EQUALS_APPLY)
    x = torch.randn(64, 12)
    handle = deltaops.attach(model.to(dtype), delta)
    disturb(handle)
    oracle = copy.deepcopy(model).double()(x.double())
    handle.merge()
    # rounding the weight once is what merging costs; activations round a few times more
    assert relative_error(model(x.to(dtype)), oracle) < 8 * bound(0.0, dtype)


def test_revert_restores_the_bits(delta: Delta, model: nn.Module) -> None:
    promised(delta, Promise.REVERT_RESTORES_BITS)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model[2].weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    handle = deltaops.attach(model, delta)
    disturb(handle)
    handle.merge()
    handle.revert()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_only_the_delta_trains_and_it_learns(delta: Delta, model: nn.Module) -> None:
    base = {k: v.clone() for k, v in model.state_dict().items()}
    handle = deltaops.attach(model.train(), delta)
    x, y = torch.randn(128, 12), torch.randn(128, 9)
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    now = model.state_dict()
    assert all(torch.equal(v, now[k]) for k, v in base.items())


def test_save_and_load_give_the_same_bits(delta: Delta, model: nn.Module, tmp_path: Path) -> None:
    twin = copy.deepcopy(model)
    handle = deltaops.attach(model, delta)
    disturb(handle)
    handle.save(tmp_path)
    loaded = deltaops.load(twin, tmp_path)
    x = torch.randn(5, 12)
    assert torch.equal(twin(x), model(x))
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in handle.parameters()]
