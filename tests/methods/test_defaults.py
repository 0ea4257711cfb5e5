"""Every method without an argument: planned on each architecture that can have it, and refused on
others; what it computes there is tested in test_contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import deltaops
from deltaops.errors import TargetError
from deltaops.methods import METHODS
from deltaops.surgery import plan
from deltaops.testing.architectures import ARCHITECTURES, build
from deltaops.tuning.spec import parse_delta

WIDTH: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 128}, "gpt2": {"n_embd": 128}, "t5": {"d_model": 128},
}  # fmt: skip
"""What the default sizes divide; of the others' hidden_size."""


def wide(name: str) -> nn.Module:
    return build(name, **WIDTH.get(name, {"hidden_size": 128}))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_method_needs_an_argument(name: str) -> None:
    model = wide(name)
    for kind, method in METHODS.items():
        assert parse_delta(kind) == method()
        if name == "vit" and kind in ("prompt", "prompt-pool", "intrinsic-prompt"):
            continue  # in test_contract.REFUSED
        shown = str(plan(model, method()))
        assert shown.startswith(repr(method())), kind


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
