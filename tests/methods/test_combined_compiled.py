"""Combinations under torch.compile, in one graph, which follows what is switched and weighed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops import Adapter, BitFit, LoRA, ParallelAdapter, Prefix
from deltaops.surgery import Handle
from deltaops.testing.architectures import answer, build

# transformers renames gradient checkpointing between the versions that we support
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.reset()
    torch.manual_seed(0)
    yield
    torch.compiler.reset()
    torch.set_num_threads(before)


def moved(handle: Handle) -> Handle:
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return handle


def close(ours: Tensor, eager: Tensor) -> None:
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def grad_of(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def test_a_model_with_gates_gives_outputs_and_gradients() -> None:
    model = build("bert", num_hidden_layers=1)
    delta = Prefix(num_virtual_tokens=2) + Adapter(size=3) + ParallelAdapter(size=3) + LoRA(r=2)
    handle = moved(deltaops.attach(model, delta.with_gates()))
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    for run in (model, compiled):
        y = answer("bert", run)
        (y * torch.linspace(-1, 2, y.numel()).reshape(y.shape)).mean().backward()
        found.append([y, *map(grad_of, handle.parameters())])
        model.zero_grad()
    for eager, ours in zip(*found, strict=True):
        close(ours, eager)


def test_a_graph_follows_what_is_switched_and_weighed_later() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6))
    delta = LoRA(r=2) + LoRA(r=3) + BitFit() + Adapter(size=3, target_modules=["0"])
    handle = moved(deltaops.attach(model, delta))
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 6)
    with torch.no_grad():
        on = compiled(x)
        close(on, model(x))
        for part in ("lora2", "adapter"):
            with handle.disabled(part):
                off = compiled(x)
                close(off, model(x))
            assert not torch.allclose(on, off)
        handle.weigh("lora2", 0.5)
        weighed = compiled(x)
        close(weighed, model(x))
    assert not torch.allclose(weighed, on)
