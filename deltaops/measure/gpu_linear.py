"""``delta_linear`` on a GPU beside the frozen layer, PEFT's, and two published plans.

bf16, adapters too. PEFT is compiled as well, once for all copies of its parameters; and it is
measured as it is by default, with float32 adapters under autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaops.ops import Branch, delta_linear
from deltaops.ops.delta_linear import draw_seed, explain
from deltaops.reference import delta_linear as reference
from deltaops.testing import assert_accurate

from . import published
from .gpu_subject import (
    COMPILED,
    DEFAULT,
    FROZEN,
    LORA_FUSION,
    OURS,
    PEFT,
    SCALING,
    UNSLOTH,
    Call,
    Peers,
    how_many,
)


@dataclass(frozen=True)
class Case:
    """M tokens, N outputs, K inputs. Forward alone for few tokens (decoding), else both ways."""

    op: ClassVar[str] = "delta_linear"

    m: int
    n: int
    k: int
    rank: int
    dropout: float = 0.0

    @property
    def backward(self) -> bool:
        """Whether the backward pass is timed too."""
        return self.m > 16

    def __str__(self) -> str:
        dropout = f" p={self.dropout:g}" if self.dropout else ""
        return f"{self.m}×{self.n}×{self.k} r={self.rank}{dropout}"

    def facts(self) -> dict[str, Any]:
        """See :class:`Subject`."""
        shape = [self.m, self.n, self.k]
        return {
            "shape": shape, "rank": self.rank, "dropout": self.dropout, "backward": self.backward
        }  # fmt: skip

    def operands(self, device: str, cache_bytes: float) -> list[Operands]:
        """See :class:`Subject`."""
        return operands(self, device, cache_bytes)

    def gate(self, copy: Operands, backend: str) -> None:
        """See :class:`Subject`."""
        gate(self, copy, backend)

    def peers(
        self, copies: list[Operands], backend: str, compile_peft: bool
    ) -> tuple[Peers, dict[str, str]]:
        """See :class:`Subject`."""
        return make_peers(self, copies, backend, compile_peft)

    def plan(self, copy: Operands, backend: str) -> str | None:
        """See :class:`Subject`."""
        branch = Branch(copy.a, copy.b, SCALING, self.dropout)
        return explain(copy.x, copy.weight, None, [branch], backend=backend).plan


@dataclass(frozen=True)
class Operands:
    """One copy of what a call reads."""

    x: Tensor
    weight: Tensor
    grad_y: Tensor
    a: Tensor
    b: Tensor


def operands(case: Case, device: str, cache_bytes: float) -> list[Operands]:
    """Random copies, together no smaller than ``cache_bytes``; at least two."""
    one = 2 * (case.n * case.k + case.m * case.k + case.m * case.n * case.backward)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        t = torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)
        return t.mul_(scale)

    return [
        Operands(
            normal(case.m, case.k).requires_grad_(case.backward),
            normal(case.n, case.k, scale=case.k**-0.5),
            normal(case.m, case.n) if case.backward else normal(1, 1),
            normal(case.rank, case.k, scale=case.k**-0.5).requires_grad_(case.backward),
            normal(case.n, case.rank, scale=case.rank**-0.5).requires_grad_(case.backward),
        )
        for _ in range(how_many(one, cache_bytes))
    ]


def make_peers(
    case: Case, copies: list[Operands], backend: str, compile_peft: bool = True
) -> tuple[Peers, dict[str, str]]:
    """Each peer as a call for each copy, and why a peer is missing."""

    def frozen(o: Operands) -> object:
        y = functional.linear(o.x, o.weight)
        return torch.autograd.grad(y, o.x, o.grad_y) if case.backward else y

    def over_copies(one: Callable[[Operands], object]) -> list[Call]:
        return [partial(one, o) for o in copies]

    peers: Peers = {FROZEN: over_copies(frozen)}
    gated, missing = gated_peers(case, copies[0].x.device, backend)
    peers |= {name: over_copies(one) for name, one in gated.items()}
    layers = [_peft_layer(case, o) for o in copies]
    if None in layers:
        return peers, missing | dict.fromkeys((PEFT, DEFAULT, COMPILED), "peft is not installed")
    peers[PEFT] = [partial(_peft, case, layer, o) for layer, o in zip(layers, copies, strict=True)]
    if case.backward:
        wide = [_peft_layer(case, o, torch.float32) for o in copies]
        peers[DEFAULT] = [
            partial(_peft, case, layer, o, partial(_under_autocast, layer))
            for layer, o in zip(wide, copies, strict=True)
        ]
    if compile_peft:
        states = [dict(layer.named_parameters()) for layer in layers]

        # parameters are arguments, so that one compilation serves every copy
        def functionally(state: dict[str, Tensor], x: Tensor) -> Tensor:
            y: Tensor = torch.func.functional_call(layers[0], state, (x,))
            return y

        torch.compiler.reset()  # one code for all cases: after eight it would stay uncompiled
        compiled = torch.compile(functionally, dynamic=False)
        peers[COMPILED] = [
            partial(_peft, case, layer, o, partial(compiled, state))
            for layer, state, o in zip(layers, states, copies, strict=True)
        ]
    return peers, missing


def _peft(case: Case, layer: Any, o: Operands, forward: Any = None) -> object:
    y = (layer if forward is None else forward)(o.x)
    return _there_and_back(case, y, o, list(_trained(layer).values()))


def _under_autocast(layer: Any, x: Tensor) -> Tensor:
    # without its cache, which a CUDA graph cannot hold
    with torch.autocast(x.device.type, x.dtype, cache_enabled=False):
        y: Tensor = layer(x)
    return y


def gated_peers(
    case: Case, device: torch.device, backend: str
) -> tuple[dict[str, Callable[[Operands], list[Tensor]]], dict[str, str]]:
    """What is held to float64: ours and the published plans, each as a call on one copy that gives
    y and the gradients of x, a and b; and why one is missing."""
    peers: dict[str, Callable[[Operands], list[Tensor]]] = {OURS: lambda o: _ours(case, o, backend)}
    missing = {}
    if case.dropout:
        missing[UNSLOTH] = "its fast path has no dropout"
    else:
        peers[UNSLOTH] = lambda o: _all_of(
            case, published.unsloth(o.x, o.weight, o.a, o.b, SCALING), o
        )
    if reason := published.lora_fusion_unavailable(device):
        missing[LORA_FUSION] = reason
    else:
        peers[LORA_FUSION] = lambda o: _all_of(
            case, published.lora_fusion(o.x, o.weight, o.a, o.b, SCALING, case.dropout), o
        )
    return peers, missing


def _all_of(case: Case, y: Tensor, o: Operands) -> list[Tensor]:
    return [y, *(torch.autograd.grad(y, [o.x, o.a, o.b], o.grad_y) if case.backward else [])]


def _there_and_back(case: Case, y: Tensor, o: Operands, trained: list[Tensor]) -> object:
    return torch.autograd.grad(y, [o.x, *trained], o.grad_y) if case.backward else y


def _ours(case: Case, o: Operands, backend: str) -> list[Tensor]:
    branch = Branch(o.a, o.b, SCALING, case.dropout)
    return _all_of(case, delta_linear(o.x, o.weight, None, [branch], backend=backend), o)


def _peft_layer(case: Case, o: Operands, dtype: torch.dtype | None = None) -> Any:
    """PEFT's own layer with the same values, adapters of ``dtype`` or else of that of x; None where
    PEFT is not installed."""
    try:
        import peft
    except ImportError:
        return None
    holder = nn.Module()
    holder.lin = nn.Linear(case.k, case.n, bias=False, device="meta", dtype=o.x.dtype)
    holder.lin.weight = nn.Parameter(o.weight, requires_grad=False)
    config = peft.LoraConfig(
        r=case.rank,
        lora_alpha=int(SCALING * case.rank),
        lora_dropout=case.dropout,
        target_modules=["lin"],
    )
    layer: Any = peft.inject_adapter_in_model(config, holder).lin
    for module, values in ((layer.lora_A, o.a), (layer.lora_B, o.b)):
        own = values.detach().to(o.x.dtype if dtype is None else dtype)  # PEFT makes them float32
        module["default"].weight = nn.Parameter(own, requires_grad=case.backward)
    return layer


def _trained(layer: Any) -> dict[str, Tensor]:
    return {"a": layer.lora_A["default"].weight, "b": layer.lora_B["default"].weight}


def gate(case: Case, o: Operands, backend: str) -> None:
    """Hold ours and the published plans to the float64 reference, with the same mask. Raises:
    AssertionError, which names the peer."""
    device = o.x.device
    torch.manual_seed(1)
    seed = draw_seed(device) if case.dropout else None
    wanted = []
    with torch.no_grad():
        for kind in (torch.float64, o.x.dtype):
            x, w, dy, a, b = (t.to(kind) for t in (o.x, o.weight, o.grad_y, o.a, o.b))
            factors = ([SCALING], [case.dropout], ["identity"], seed)
            y, s = reference.forward(x, w, None, [a], [b], [None], *factors)
            results = [y]
            if case.backward:
                needs = [True, False, True, True, False]
                results += reference.backward(dy, x, w, [a], [b], s, *factors, needs)
            wanted.append(results)
    for peer, call in gated_peers(case, device, backend)[0].items():
        torch.manual_seed(1)
        got = call(o)
        names = ("y", "grad x", "grad a", "grad b")[: len(got)]
        for name, value, oracle, baseline in zip(names, got, *wanted, strict=True):
            assert_accurate(value, oracle, baseline, f"{case}: {peer}: {name}")
