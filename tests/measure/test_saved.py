"""Bytes held for the backward pass, counted without holding on to them."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import torch
from torch import Tensor, nn

from deltaops.measure.saved import saved_bytes


def test_each_storage_counts_once_and_what_is_known_does_not() -> None:
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    # exp keeps its output, which the product keeps again
    assert saved_bytes(lambda: x.exp() @ weight, [x, weight]) == 5 * 8 * 4
    assert saved_bytes(lambda: x @ weight, [weight]) == 5 * 8 * 4


def step(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward()


def test_nothing_is_held_afterwards() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Softmax(-1))
    x = torch.randn(3, 4)
    alive = [weakref.ref(p) for p in model.parameters()]
    assert saved_bytes(partial(model, x), model.parameters()) > 0
    assert saved_bytes(partial(step, model, x), model.parameters()) > 0
    del model
    gc.collect()
    assert [r() for r in alive] == [None] * len(alive)
