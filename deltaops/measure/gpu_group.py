"""q, k and v, or gate and up, as one op on a GPU, beside the frozen layers and PEFT's.

Frozen layers of one x cost autograd more than their products: it reads and writes dx once more for
each that is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaops.ops import Branch, delta_linear
from deltaops.ops.delta_linear import draw_seed
from deltaops.ops.delta_linear_group import Layer, delta_linear_group
from deltaops.reference import delta_linear as reference
from deltaops.testing import assert_accurate

from .gpu_subject import FROZEN, OURS, PEFT, SCALING, Call, Peers, how_many

APART = "deltaops, layer by layer"


@dataclass(frozen=True)
class Group:
    """One copy of what a call reads."""

    x: Tensor
    weights: list[Tensor]
    grads: list[Tensor]
    a: list[Tensor]
    b: list[Tensor]

    def layers(self, dropout: float) -> list[Layer]:
        """As the op takes them."""
        return [
            Layer(weight, branches=[Branch(a, b, SCALING, dropout)])
            for weight, a, b in zip(self.weights, self.a, self.b, strict=True)
        ]

    def back(self, ys: list[Tensor], trained: list[Tensor]) -> list[Tensor]:
        """Outputs, and the gradients of x and of what is trained."""
        return [*ys, *torch.autograd.grad(ys, [self.x, *trained], self.grads)]


@dataclass(frozen=True)
class GroupCase:
    """M tokens and K inputs of layers with N outputs each; forward and backward."""

    op: ClassVar[str] = "delta_linear_group"

    m: int
    n: tuple[int, ...]
    k: int
    rank: int
    dropout: float = 0.0

    def __str__(self) -> str:
        dropout = f" p={self.dropout:g}" if self.dropout else ""
        return f"{self.m}×{'+'.join(map(str, self.n))}×{self.k} r={self.rank}{dropout}"

    def facts(self) -> dict[str, Any]:
        """See :class:`Subject`."""
        shape = [self.m, list(self.n), self.k]
        return {"shape": shape, "rank": self.rank, "dropout": self.dropout, "backward": True}

    def operands(self, device: str, cache_bytes: float) -> list[Group]:
        """See :class:`Subject`."""
        one = 2 * (sum(self.n) * (self.k + self.m) + self.m * self.k)
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            t = torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)
            return t.mul_(scale)

        return [
            Group(
                normal(self.m, self.k).requires_grad_(),
                [normal(n, self.k, scale=self.k**-0.5) for n in self.n],
                [normal(self.m, n) for n in self.n],
                [normal(self.rank, self.k, scale=self.k**-0.5).requires_grad_() for _ in self.n],
                [normal(n, self.rank, scale=self.rank**-0.5).requires_grad_() for n in self.n],
            )
            for _ in range(how_many(one, cache_bytes))
        ]

    def gate(self, copy: Group, backend: str) -> None:
        """See :class:`Subject`. With the same masks: each layer's seed is drawn in its turn."""
        device, count = copy.x.device, len(self.n)
        torch.manual_seed(1)
        seeds = [draw_seed(device) if self.dropout else None for _ in self.n]
        plain = [self._by_reference(copy, seeds, kind) for kind in (torch.float64, copy.x.dtype)]
        names = ["y"] * count + ["grad x"] + ["grad a"] * count + ["grad b"] * count
        for peer, one in (("group", ours), ("layer by layer", apart)):
            torch.manual_seed(1)
            got = one(self.dropout, backend, copy)
            for name, value, oracle, low in zip(names, got, *plain, strict=True):
                assert_accurate(value, oracle, low, f"{self}: {peer}: {name}")

    def _by_reference(
        self, copy: Group, seeds: list[Tensor | None], kind: torch.dtype
    ) -> list[Tensor]:
        needs = [True, False, True, True, False]
        found: list[list[Tensor]] = [[], [], [], []]
        with torch.no_grad():
            x = copy.x.to(kind)
            for i, seed in enumerate(seeds):
                factors = ([SCALING], [self.dropout], ["identity"], seed)
                w, dy, a, b = (t[i].to(kind) for t in (copy.weights, copy.grads, copy.a, copy.b))
                y, s = reference.forward(x, w, None, [a], [b], [None], *factors)
                more = reference.backward(dy, x, w, [a], [b], s, *factors, needs)
                for several, one in zip(found, (y, *more), strict=True):
                    several.append(one)
        ys, xs, as_, bs = found
        grad_x = xs[0]
        for more_x in xs[1:]:
            grad_x = grad_x + more_x
        return [*ys, grad_x, *as_, *bs]

    def peers(
        self, copies: list[Group], backend: str, compile_peft: bool
    ) -> tuple[Peers, dict[str, str]]:
        """See :class:`Subject`; PEFT is not compiled here."""
        peers: Peers = {
            FROZEN: [partial(frozen, o) for o in copies],
            OURS: [partial(ours, self.dropout, backend, o) for o in copies],
            APART: [partial(apart, self.dropout, backend, o) for o in copies],
        }
        theirs = [self._peft(o) for o in copies]
        calls = [call for call in theirs if call is not None]
        if len(calls) < len(copies):
            return peers, {PEFT: "peft is not installed"}
        return peers | {PEFT: calls}, {}

    def plan(self, copy: Group, backend: str) -> str | None:
        """None: each y is planned by itself and dx for all layers, and no backend has words for
        that."""
        return None

    def _peft(self, copy: Group) -> Call | None:
        """PEFT's own layers with the same values; None where PEFT is not installed."""
        try:
            import peft
        except ImportError:
            return None
        holder, layers, trained = nn.Module(), list[Any](), list[Tensor]()
        names = [f"lin{i}" for i in range(len(self.n))]
        for name, weight in zip(names, copy.weights, strict=True):
            linear = nn.Linear(self.k, len(weight), bias=False, device="meta", dtype=copy.x.dtype)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            setattr(holder, name, linear)
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=int(SCALING * self.rank),
            lora_dropout=self.dropout,
            target_modules=names,
        )
        model: Any = peft.inject_adapter_in_model(config, holder)
        for name, a, b in zip(names, copy.a, copy.b, strict=True):
            layer = getattr(model, name)
            # in dtype: PEFT would make them float32
            layer.lora_A["default"].weight = nn.Parameter(a.detach())
            layer.lora_B["default"].weight = nn.Parameter(b.detach())
            layers.append(layer)
        trained += [layer.lora_A["default"].weight for layer in layers]
        trained += [layer.lora_B["default"].weight for layer in layers]
        return lambda: copy.back([layer(copy.x) for layer in layers], trained)


def frozen(copy: Group) -> list[Tensor]:
    """Torch's layers without a delta."""
    return copy.back([functional.linear(copy.x, weight) for weight in copy.weights], [])


def ours(dropout: float, backend: str, copy: Group) -> list[Tensor]:
    """One op."""
    ys = delta_linear_group(copy.x, copy.layers(dropout), backend=backend)
    return copy.back(ys, [*copy.a, *copy.b])


def apart(dropout: float, backend: str, copy: Group) -> list[Tensor]:
    """An op for each layer."""
    ys = [delta_linear(copy.x, *layer, backend=backend) for layer in copy.layers(dropout)]
    return copy.back(ys, [*copy.a, *copy.b])
