"""Results may be changed in place, as torch's own may: a model with ``ReLU(inplace=True)`` does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops.ops import Branch, bottleneck, delta_linear, gated, norm_bias, rotary

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
DOWN, UP, WIDE = torch.ones(2, 8), torch.ones(8, 2), torch.linspace(-1, 1, 48).view(6, 8)
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "delta_linear": lambda x: delta_linear(x, WIDE, None, [Branch(DOWN, torch.ones(6, 2))]),
    "norm_bias": lambda x: norm_bias(x, torch.ones(8)),
    "gated": lambda x: gated(x, x),
    "bottleneck": lambda x: bottleneck(x, DOWN, UP),
    "rotary": lambda x: rotary(x[None], torch.ones(1, 3, 8), torch.ones(1, 3, 8)),
}


@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8)])
@pytest.mark.parametrize("op", OPS)
def test_in_place(op: str, shape: tuple[int, ...]) -> None:
    if op == "rotary" and len(shape) == 2:
        pytest.skip("rotary has four dimensions")
    leaves = [X.reshape(shape).clone().requires_grad_() for _ in range(2)]
    changed, want = OPS[op](leaves[0]), OPS[op](leaves[1]) * 2
    changed.mul_(2)
    assert torch.equal(changed, want)
    for y in (changed, want):
        y.square().sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_a_model_that_does_so() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 4))
    want = model(X)
    deltaops.attach(model, deltaops.LoRA(r=2))
    y = model(X)
    torch.testing.assert_close(y, want)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
