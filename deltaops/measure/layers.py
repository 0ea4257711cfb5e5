"""One linear layer with LoRA, forward and backward, against the frozen layer and PEFT's.

The shapes are those where a transformer spends its time: M tokens, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaops.ops import Branch, delta_linear
from deltaops.reference import delta_linear as reference
from deltaops.testing import assert_accurate

from .interleave import Timing, interleaved

RANK = 16
SHAPES = (
    (2048, 2048, 2048),
    (512, 768, 768),
    (512, 3072, 768),
    (512, 768, 3072),
    (128, 768, 768),
    (1024, 384, 384),
)
QUICK_SHAPES = SHAPES[1:2] + SHAPES[5:]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}

FROZEN_EAGER, FROZEN_OURS, FUSED, PEFT = "frozen eager", "frozen ours", "fused", "PEFT"


@dataclass(frozen=True)
class LayerResult:
    """One shape, dtype and dropout: seconds of each peer, forward and backward."""

    shape: tuple[int, int, int]
    dtype: str
    dropout: float
    timings: dict[str, Timing]

    def ratio(self, above: str, below: str) -> float | None:
        """Median over median; None where a peer is missing."""
        if above not in self.timings or below not in self.timings:
            return None
        return self.timings[above].median / self.timings[below].median

    def as_json(self) -> dict[str, Any]:
        """Shape, setting and every timing in seconds."""
        return {
            "shape": self.shape,
            "dtype": self.dtype,
            "dropout": self.dropout,
            "rank": RANK,
            "seconds": {name: t.as_json() for name, t in self.timings.items()},
        }


def measure_layer(
    shape: tuple[int, int, int], dtype: str, dropout: float, rounds: int
) -> LayerResult:
    """Gate, then time. Raises: AssertionError where a peer's numbers are wrong."""
    m, n, k = shape
    torch.manual_seed(0)
    kind = DTYPES[dtype]
    x = torch.randn(m, k, dtype=kind, requires_grad=True)
    layer = nn.Linear(k, n, dtype=kind).requires_grad_(False)
    # float32 adapters, PEFT's default also on a bfloat16 model
    a = torch.randn(RANK, k).mul_(k**-0.5).requires_grad_()
    b = torch.randn(n, RANK).mul_(RANK**-0.5).requires_grad_()
    grad = torch.randn(m, n, dtype=kind)
    branch = Branch(a, b, 2.0, dropout)

    def back(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        return [y, *torch.autograd.grad(y, leaves, grad)]

    peers: dict[str, Callable[[], list[Tensor]]] = {
        FROZEN_EAGER: lambda: back(functional.linear(x, layer.weight, layer.bias), [x]),
        FROZEN_OURS: lambda: back(delta_linear(x, layer.weight, layer.bias), [x]),
        FUSED: lambda: back(delta_linear(x, layer.weight, layer.bias, [branch]), [x, a, b]),
    }
    peft_layer = _peft_layer(layer, a, b, dropout)
    if peft_layer is not None:
        pa, pb = peft_layer.lora_A["default"].weight, peft_layer.lora_B["default"].weight
        peers[PEFT] = lambda: back(peft_layer(x), [x, pa, pb])
    _gate(x, layer, branch, grad, peers)
    return LayerResult(shape, dtype, dropout, interleaved(peers, rounds=rounds))


def _peft_layer(layer: nn.Linear, a: Tensor, b: Tensor, dropout: float) -> Any:
    """PEFT's own layer with the same values; None where PEFT is not installed."""
    try:
        import peft
    except ImportError:
        return None
    holder = nn.Module()
    holder.lin = nn.Linear(layer.in_features, layer.out_features, dtype=layer.weight.dtype)
    holder.lin.load_state_dict(layer.state_dict())
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules=["lin"]
    )
    wrapped: Any = peft.inject_adapter_in_model(config, holder).lin
    with torch.no_grad():
        for name, value in (("lora_A", a), ("lora_B", b)):
            factor = getattr(wrapped, name)["default"]
            factor.to(torch.float32).weight.copy_(value)
    return wrapped


def _gate(
    x: Tensor,
    layer: nn.Linear,
    branch: Branch,
    grad: Tensor,
    peers: dict[str, Callable[[], list[Tensor]]],
) -> None:
    """Hold the fused layer to float64 before anything is timed; with dropout, by the same mask."""
    a, b, scaling, dropout = branch[:4]  # a LoRA branch
    torch.manual_seed(1)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64) if dropout else None
    torch.manual_seed(1)
    fused = peers[FUSED]()
    results = []
    with torch.no_grad():
        for kind in (torch.float64, None):
            xs, weight, bias, dy = (
                t.to(kind or x.dtype) for t in (x, layer.weight, layer.bias, grad)
            )
            down, up = [a.to(kind or a.dtype)], [b.to(kind or b.dtype)]
            settings = [scaling], [dropout], ["identity"], seed
            y, s = reference.forward(xs, weight, bias, down, up, [None], *settings)
            needs = [True, False, True, True, False]
            grads = reference.backward(dy, xs, weight, down, up, s, *settings, needs)
            results.append([y, *grads])
    for name, got, oracle, baseline in zip(
        ("y", "grad x", "grad a", "grad b"), fused, *results, strict=True
    ):
        assert_accurate(got, oracle, baseline, f"{list(x.shape)} {name}")
