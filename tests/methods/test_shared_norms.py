"""A norm that a model has in two places: one module, or two with one parameter."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops import BitFit, LNTuning
from deltaops.errors import AttachError
from deltaops.methods import Delta
from deltaops.surgery import plan
from deltaops.surgery.files import CONFIG, MANIFEST

WIDTH = 6
DELTAS = {"bitfit": BitFit(target_modules="all-norm"), "lntuning": LNTuning()}
for_each = pytest.mark.parametrize("delta", DELTAS.values(), ids=DELTAS)


class Twice(nn.Module):
    """``first`` and ``second`` around a layer."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.inner(self.first(x)))
        return y


def one(kind: Any) -> Twice:
    """The same module in both places."""
    torch.manual_seed(0)
    norm = kind(WIDTH)
    return Twice(norm, norm)


X = torch.linspace(-1, 2, 4 * WIDTH).reshape(4, WIDTH)


@for_each
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_shared_module_is_trained_once_for_both_places(
    delta: Delta, kind: Any, tmp_path: Path
) -> None:
    model = one(kind)
    before = model(X)
    handle = deltaops.attach(model, delta, frozen=False)
    assert handle.sites == ("first",)
    assert model.first is model.second
    parameters = list(handle.parameters())
    assert len({id(p) for p in parameters}) == len(parameters)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.5)
    y = model(X)
    # an independent oracle: the values in both norms of a plain model
    plain = Twice(kind(WIDTH), kind(WIDTH))
    plain.inner.load_state_dict(model.inner.state_dict())
    offset = torch.zeros(WIDTH)
    with torch.no_grad():
        for norm in (plain.first, plain.second):
            for parameter in norm.parameters():
                if isinstance(delta, LNTuning) or parameter.eq(0).all():
                    parameter.add_(0.5)
    if isinstance(delta, BitFit) and kind is nn.RMSNorm:
        offset += 0.5
    expected = plain.second(plain.inner(plain.first(X) + offset)) + offset
    torch.testing.assert_close(y, expected)
    twin = copy.deepcopy(model)
    assert twin.first is twin.second
    assert torch.equal(twin(X), y)
    handle.save(tmp_path)
    other = one(kind)
    deltaops.load(other, tmp_path, frozen=False)
    assert torch.equal(other(X), y)
    handle.revert()
    assert torch.equal(model(X), before)


def test_a_shared_module_has_our_file_since_peft_adapts_one_place_alone(tmp_path: Path) -> None:
    deltaops.attach(one(nn.LayerNorm), LNTuning()).save(tmp_path / "ours")
    assert (tmp_path / "ours" / MANIFEST).exists()
    apart = Twice(nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH))
    deltaops.attach(apart, LNTuning(target_modules=["first"])).save(tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / CONFIG).read_text())
    assert config["target_modules"] == ["first"]
    with pytest.raises(deltaops.errors.CheckpointError, match="'first' is also at 'second'"):
        deltaops.load(one(nn.LayerNorm), tmp_path / "peft")


@for_each
def test_two_norms_with_one_parameter_are_refused_before_anything_changes(delta: Delta) -> None:
    model = Twice(nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH))
    model.second.weight, model.second.bias = model.first.weight, model.first.bias  # type: ignore[assignment]  # norms'
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(AttachError, match=r"of 'second' is also that of 'first'.*exclude_modules"):
        plan(model, delta)
    with pytest.raises(AttachError, match="also that of 'first'"):
        deltaops.attach(
            model, LNTuning(target_modules=["first"]) + BitFit(target_modules=["second"])
        )
    assert [type(module) for module in model.modules()] == kinds
    assert model.second.weight is model.first.weight
    assert all(p.requires_grad for p in model.parameters())
    handle = deltaops.attach(model, type(delta)(target_modules=["first"]))
    handle.revert()
    assert model.second.weight is model.first.weight
