"""Every method without an argument: planned on each architecture that can have it, and refused on
others; with --everything attached and trained there, too. What it computes there is tested in
test_contract, in other sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import deltaops
from deltaops.errors import TargetError
from deltaops.methods import METHODS
from deltaops.surgery import plan
from deltaops.testing.architectures import ARCHITECTURES, answer, build
from deltaops.tuning.spec import parse_delta

from .oracle import grad_of, loss_of

WIDTH: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 128}, "gpt2": {"n_embd": 128}, "t5": {"d_model": 128},
}  # fmt: skip
"""What the default sizes divide; of the others' hidden_size."""


REFUSED = ("prompt", "prompt-pool", "prefix-pool", "intrinsic-prompt")
"""What a ViT cannot have; test_contract has the reason."""


def wide(name: str) -> nn.Module:
    return build(name, **WIDTH.get(name, {"hidden_size": 128}))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_method_needs_an_argument(name: str) -> None:
    model = wide(name)
    for kind, method in METHODS.items():
        assert parse_delta(kind) == method()
        if name == "vit" and kind in REFUSED:
            continue
        shown = str(plan(model, method()))
        assert shown.startswith(repr(method())), kind


@pytest.mark.everything
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_method_needs_an_argument_to_train(kind: str, name: str) -> None:
    if name == "vit" and kind in REFUSED:
        pytest.skip("it cannot have it")
    model = wide(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    handle = deltaops.attach(model, METHODS[kind]())
    y = answer(name, model)
    loss_of(y).backward()
    grads = [grad_of(p) for p in handle.parameters()]
    assert y.shape[-1] == 128
    assert all(bool(g.isfinite().all()) for g in (y, *grads))
    assert any(bool(g.any()) for g in grads)
    handle.revert()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Odd(nn.Module):
    """No layer that a delta knows."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv2d(3, 4, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.filters(x)
        return found


@pytest.mark.parametrize("kind", METHODS)
def test_an_unknown_architecture_is_told_what_was_found(kind: str) -> None:
    model = Odd()
    with pytest.raises(TargetError, match=r"Found: (1 Conv2d|Odd, with 0 linear layers)"):
        deltaops.attach(model, METHODS[kind]())
    assert type(model.filters) is nn.Conv2d
    assert all(p.requires_grad for p in model.parameters())
