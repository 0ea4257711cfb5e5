"""What is measured of a single layer: ops by name, each with its formula and its fused form.

Adding an op is one entry in :data:`OPS`: tests, benchmarks, goals and report pick it up.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from deltaops.ops import Branch, delta_linear
from deltaops.reference.philox import dropout_scale

RANK, BOTTLENECK, SCALING = 16, 64, 2.0
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# M tokens, N outputs, K inputs: where a transformer spends its time.
SHAPES = (
    (2048, 2048, 2048),
    (512, 768, 768),
    (512, 3072, 768),
    (512, 768, 3072),
    (128, 768, 768),
    (1024, 384, 384),
)
SMALL_M = ((16, 2048, 2048), (1, 4096, 4096))
QUICK_SHAPES = ((512, 768, 768), (1024, 384, 384))

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class LayerOp:
    """One op. Tensors go by name: x, weight, bias, and what it trains."""

    name: str
    trains: dict[str, Callable[[int, int], tuple[int, ...]]]
    """Trained tensor → its shape, from N and K."""
    formula: Callable[[Tensors, Tensor | None], Tensor]
    """Plain torch, of the tensors and of the dropout scale of x."""
    fused: Callable[[Tensors, float], Tensor]
    """Ours, with a dropout probability."""
    rank: int = 0
    missing: str | None = None
    """Why this build has no such op; None when it has."""
    square: bool = False
    """The op keeps the width: K is both input and output, and N is the inner width."""


def _linear(t: Tensors) -> Tensor:
    return functional.linear(t["x"], t["weight"], t["bias"])


def _branch(t: Tensors, scale: Tensor | None, activate: Callable[[Tensor], Tensor]) -> Tensor:
    dropped = t["x"] if scale is None else t["x"] * scale
    wide = torch.promote_types(t["x"].dtype, t["a"].dtype)
    return SCALING * activate(dropped.to(wide) @ t["a"].to(wide).t()) @ t["b"].to(wide).t()


def _lora(t: Tensors, scale: Tensor | None) -> Tensor:
    return (_linear(t) + _branch(t, scale, lambda h: h)).to(t["x"].dtype)


def _lora_fused(t: Tensors, dropout: float) -> Tensor:
    branch = Branch(t["a"], t["b"], SCALING, dropout)
    return delta_linear(t["x"], t["weight"], t["bias"], [branch])


def _parallel(t: Tensors, scale: Tensor | None) -> Tensor:
    return (_linear(t) + _branch(t, scale, functional.relu)).to(t["x"].dtype)


def _parallel_fused(t: Tensors, dropout: float) -> Tensor:
    # by keyword: builds without activations have no such field, and `missing` says so first
    build: Any = Branch
    branch = build(t["a"], t["b"], SCALING, dropout, activation="relu")
    return delta_linear(t["x"], t["weight"], t["bias"], [branch])


def _sequential(t: Tensors, _scale: Tensor | None) -> Tensor:
    x = t["x"]
    wide = torch.promote_types(x.dtype, t["down"].dtype)
    h = functional.gelu(functional.linear(x.to(wide), t["down"], t["down_bias"]))
    return (x + functional.linear(h, t["up"], t["up_bias"])).to(x.dtype)


def _sequential_fused(t: Tensors, _dropout: float) -> Tensor:
    op: Any = _bottleneck()
    y: Tensor = op(t["x"], t["down"], t["up"], t["down_bias"], t["up_bias"], activation="gelu")
    return y


def _bottleneck() -> Any:
    return getattr(importlib.import_module("deltaops.ops"), "bottleneck", None)


def _bitfit(t: Tensors, _scale: Tensor | None) -> Tensor:
    return _linear(t)


def _bitfit_fused(t: Tensors, _dropout: float) -> Tensor:
    return delta_linear(t["x"], t["weight"], t["bias"])


_AB: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "a": lambda n, k: (RANK, k),
    "b": lambda n, k: (n, RANK),
}
OPS = {
    op.name: op
    for op in (
        LayerOp("lora", _AB, _lora, _lora_fused, RANK),
        LayerOp(
            "parallel", _AB, _parallel, _parallel_fused, RANK,
            None if "activation" in Branch._fields else "branches have no activation in this build",
        ),
        LayerOp(
            "sequential",
            {
                "down": lambda n, k: (BOTTLENECK, k),
                "up": lambda n, k: (k, BOTTLENECK),
                "down_bias": lambda n, k: (BOTTLENECK,),
                "up_bias": lambda n, k: (k,),
            },
            _sequential, _sequential_fused, BOTTLENECK,
            None if _bottleneck() else "deltaops.ops has no bottleneck in this build",
            square=True,
        ),
        LayerOp("bitfit", {"bias": lambda n, k: (n,)}, _bitfit, _bitfit_fused),
    )
}  # fmt: skip


@dataclass(frozen=True)
class LayerCase:
    """An op at a shape, dtype and dropout, with its tensors."""

    op: LayerOp
    shape: tuple[int, int, int]
    dtype: str
    tensors: Tensors
    grad: Tensor

    @classmethod
    def of(cls, op: str, shape: tuple[int, int, int], dtype: str) -> LayerCase:
        """Random tensors of unit scale; adapters float32, with values that bfloat16 holds."""
        torch.manual_seed(0)
        m, n, k = shape
        chosen, kind = OPS[op], DTYPES[dtype]
        tensors = {
            "x": torch.randn(m, k).to(kind).requires_grad_(),
            "weight": torch.randn(n, k).mul_(k**-0.5).to(kind),
            "bias": torch.randn(n).to(kind),
        }
        for name, shaped in chosen.trains.items():
            size = shaped(n, k)
            value = torch.randn(size).mul_(size[-1] ** -0.5 if len(size) == 2 else 1.0)
            narrow = kind if name == "bias" else torch.float32
            tensors[name] = value.to(torch.bfloat16).to(narrow).requires_grad_()
        grad = torch.randn(m, k if chosen.square else n).to(kind)
        return cls(chosen, shape, dtype, tensors, grad)

    @property
    def leaves(self) -> list[str]:
        """What gets a gradient: x first."""
        return ["x", *self.op.trains]

    def cast(self, *names: str, dtype: torch.dtype) -> Tensors:
        """The tensors with some of them in another dtype, as new leaves."""
        return {
            name: t.detach().to(dtype).requires_grad_(t.requires_grad) if name in names else t
            for name, t in self.tensors.items()
        }

    def back(self, y: Tensor, tensors: Tensors) -> list[Tensor]:
        """y and the gradients of the leaves."""
        leaves = [tensors[name] for name in self.leaves]
        return [y, *torch.autograd.grad(y, leaves, self.grad.to(y.dtype))]

    def answer(
        self, dtype: torch.dtype | None, dropout: float, seed: Tensor | None
    ) -> list[Tensor]:
        """The formula's y and gradients: in ``dtype``, or in the tensors' own with None."""
        t = self.tensors if dtype is None else self.cast(*self.tensors, dtype=dtype)
        scale = dropout_scale(t["x"], dropout, seed, 0)
        return self.back(self.op.formula(t, scale), t)
