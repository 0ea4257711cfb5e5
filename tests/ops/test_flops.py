"""torch's counter, told of our ops, counts what it counts in the references."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import deltaops
from deltaops.ops import flop_formulas
from deltaops.reference import (
    attention,
    bottleneck,
    delta_linear,
    dora_norm,
    prefix_attention,
)


def counted(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        run()
    return counter.get_total_flops()


def linear(m: int = 6) -> tuple[Any, ...]:
    a, b = [torch.randn(2, 5), torch.randn(3, 5)], [torch.randn(7, 2), torch.randn(7, 3)]
    return torch.randn(m, 5), torch.randn(7, 5), torch.randn(7), a, b


def test_a_linear_forward() -> None:
    x, weight, bias, a, b = linear()
    settings = [1.0, 0.5], [0.0, 0.0], ["identity", "gelu"], None
    rows = x.reshape(2, 3, 5)
    ours = counted(
        lambda: torch.ops.deltaops.delta_linear(
            rows, weight, bias, a, b, [], [False, False], *settings, None, "auto"
        )
    )
    assert ours == counted(
        lambda: delta_linear.forward(x, weight, bias, a, b, [None, None], *settings)
    )
    assert ours == 2 * 6 * (5 * 7 + 5 * (5 + 7))


@pytest.mark.parametrize("of_x", [False, True])
def test_a_linear_backward_counts_what_is_wanted(of_x: bool) -> None:
    x, weight, _, a, b = linear()
    s, dy = torch.randn(6, 5), torch.randn(6, 7)
    settings = [1.0, 0.5], [0.0, 0.0], ["identity", "gelu"], None
    for of_bias, *of_branches in product((False, True), repeat=5):
        needs = [of_x, of_bias, *of_branches, False, False]
        ours = counted(
            lambda needs=needs: torch.ops.deltaops.delta_linear_backward(  # type: ignore[misc]  # a default in a lambda
                dy, x, weight, a, b, s, *settings, needs, None, "auto"
            )
        )
        theirs = counted(
            lambda needs=needs: delta_linear.backward(dy, x, weight, a, b, s, *settings, needs)  # type: ignore[misc]  # as above
        )
        assert ours == theirs, needs


def test_rows_that_choose_one_adapter_each_count_one() -> None:
    x, weight, bias, a, b = linear()
    adapter = torch.tensor([0, 1, 1, 0, -1, 1])
    settings = [1.0, 0.5], [0.0, 0.0], ["identity", "identity"], None
    ours = counted(
        lambda: torch.ops.deltaops.delta_linear(
            x, weight, bias, a, b, [], [False, False], *settings, adapter, "auto"
        )
    )
    assert ours == 2 * 6 * (5 * 7 + 3 * (5 + 7))


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_a_bottleneck(norm: str) -> None:
    x, down, up = torch.randn(2, 3, 8), torch.randn(4, 8), torch.randn(8, 4)
    gamma = beta = None if norm == "none" else torch.ones(8)
    given = gamma, beta, down, torch.zeros(4), up, torch.zeros(8), 1.0, 1e-5, "gelu", norm
    ours = counted(lambda: torch.ops.deltaops.bottleneck(x, None, *given, True, "auto"))
    assert ours == counted(lambda: bottleneck.forward(x.view(6, 8), x.view(6, 8), *given))
    _, h, stats = bottleneck.forward(x.view(6, 8), None, *given)
    held = h, stats, gamma, beta, down, up, 1.0, "gelu", norm, True
    dy = torch.randn(2, 3, 8)

    def backward(*needs: bool) -> int:
        return counted(lambda: torch.ops.deltaops.bottleneck_backward(dy, x, *held, needs, "auto"))

    normed = norm == "layer"
    everything = True, normed, normed, True, True, True, True
    assert backward(*everything) == counted(
        lambda: bottleneck.backward(dy.view(6, 8), x.view(6, 8), *held, everything)
    )
    one = 2 * 6 * 8 * 4
    assert backward(False, False, False, True, False, True, False) == 3 * one  # of the first layer
    assert backward(False, False, False, False, False, True, True) == one
    assert backward(True, False, False, False, False, False, False) == 2 * one
    assert backward(False, False, False, False, False, False, True) == 0


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, True)])
def test_attentions(needs: tuple[bool, ...]) -> None:
    q = torch.randn(2, 4, 5, 8)
    k, v = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    prefix = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    tail = None, 0.3, False
    assert counted(
        lambda: torch.ops.deltaops.attention(q, k, v, *tail, "auto")
    ) == counted(lambda: attention.forward(q, k, v, *tail))  # fmt: skip
    y, lse = attention.forward(q, k, v, *tail)
    ours = counted(
        lambda: torch.ops.deltaops.attention_backward(
            torch.ones_like(y), q, k, v, y, lse, *tail, needs, "auto"
        )
    )
    # the reference takes the gradient of the scores even where the values' alone is wanted
    spared = 0 if needs[0] or needs[1] else 2 * q.numel() * 6
    assert (
        ours
        == counted(lambda: attention.backward(torch.ones_like(y), q, k, v, y, lse, *tail, needs))
        - spared
    )
    assert counted(
        lambda: torch.ops.deltaops.prefix_attention(q, k, v, *prefix, *tail, None, "auto")
    ) == counted(lambda: prefix_attention.forward(q, k, v, *prefix, *tail))  # fmt: skip
    y, lse = prefix_attention.forward(q, k, v, *prefix, *tail)

    def backward(*wanted: bool) -> int:
        return counted(
            lambda: torch.ops.deltaops.prefix_attention_backward(
                torch.ones_like(y), q, k, v, *prefix, y, lse, *tail, None, wanted, "auto"
            )
        )

    assert backward(True, True, True, True, True) == counted(
        lambda: prefix_attention.backward(
            torch.ones_like(y), q, k, v, *prefix, y, lse, *tail, (True,) * 5
        )
    )
    assert backward(False, False, False, True, True) == 2 * q.numel() * 3 * 4


def test_lengths_of_rows() -> None:
    given = torch.randn(7, 5), torch.randn(3, 5), torch.randn(7, 3), 0.5
    assert counted(lambda: torch.ops.deltaops.dora_norm(*given, "auto")) == counted(
        lambda: dora_norm.forward(*given)
    )


def test_a_model_of_ours_counts_what_pefts_does() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    x = torch.randn(4, 5, 16)
    ours = build()
    deltaops.attach(ours, deltaops.LoRA(r=4, target_modules=("0", "2")))
    config = peft.LoraConfig(r=4, target_modules=["0", "2"])
    theirs: Any = peft.get_peft_model(build(), config)

    def step(model: Callable[[Tensor], Tensor]) -> int:
        return counted(lambda: model(x).sum().backward())

    assert step(ours) == step(theirs) > 0
