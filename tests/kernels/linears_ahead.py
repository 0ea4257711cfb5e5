"""Calls for ahead.py: several layers of one x together, forward and backward, and DoRA's norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaops.backends.base import GroupMember
from deltaops.backends.triton import TritonBackend
from deltaops.backends.triton.targets import Target
from deltaops.reference.quantized import QuantizedWeight

HALF, FULL = torch.bfloat16, torch.float32


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Group:
    """A call of delta_linear_group with a branch in each layer."""

    m: int
    ranks: tuple[int, ...]
    dtype: torch.dtype = HALF
    adapter: torch.dtype = HALF
    dropout: float = 0.1
    rows: tuple[int, ...] = (4096, 1024, 1024)
    k: int = 4096
    scaling: float = 2.0

    def __call__(self) -> None:
        """Forward and every gradient."""
        run, members, linear = TritonBackend(), [], ["identity"]
        for n, r in zip(self.rows, self.ranks, strict=True):
            weight = _empty(n, self.k, dtype=self.dtype)
            a, b = _empty(r, self.k, dtype=self.adapter), _empty(n, r, dtype=self.adapter)
            settings = [self.scaling], [self.dropout], linear
            plan = run.prepare(weight, [a], [b], [None], *settings)
            seed = _empty(1, dtype=torch.int64)
            members.append(GroupMember(plan, weight, None, [a, b, None], seed, None))
        x, plan = _empty(self.m, self.k, dtype=self.dtype), members[0].plan
        ys, ss = zip(*plan.forward_group(x, members, True), strict=True)
        plan.backward_group(ys, x, members, ss, [[True, False, True, True, False]] * len(members))


@dataclass(frozen=True)
class DoraNorm:
    """A call of dora_norm."""

    r: int
    dtype: torch.dtype = HALF
    adapter: torch.dtype = FULL
    n: int = 4096
    k: int = 4096
    scaling: float = 2.0

    def __call__(self) -> None:
        """There is no gradient."""
        weight = _empty(self.n, self.k, dtype=self.dtype)
        a, b = (_empty(*s, dtype=self.adapter) for s in ((self.r, self.k), (self.n, self.r)))
        TritonBackend().dora_norm(weight, a, b, self.scaling)


@dataclass(frozen=True)
class Quantized:
    """Products with a quantised weight, by its codes, and the weight made."""

    m: int
    nf4: bool
    r: int = 16
    dtype: torch.dtype = HALF
    adapter: torch.dtype = FULL
    n: int = 4096
    k: int = 4096
    scaling: float = 2.0
    dropout: float = 0.1

    def __call__(self) -> None:
        """Forward, and dx with a mask."""
        x, shape = _empty(self.m, self.k, dtype=self.dtype), (self.n, self.k)
        a, b = (
            _empty(self.r, self.k, dtype=self.adapter),
            _empty(self.n, self.r, dtype=self.adapter),
        )
        if self.nf4:
            count = self.n * self.k
            codes, scales = _empty(count // 2, dtype=torch.uint8), _empty(count // 64, dtype=FULL)
            weight = QuantizedWeight(codes, scales, shape, "nf4", 64)
        else:
            codes, scales = _empty(*shape, dtype=torch.int8), _empty(self.n, dtype=FULL)
            weight = QuantizedWeight(codes, scales, shape, "int8", self.k)
        bias = _empty(self.n, dtype=self.dtype)
        settings = [self.scaling], [self.dropout], ["identity"]
        plan = TritonBackend().prepare(a, [a], [b], [None], *settings)
        assert plan.fuses(self.m, weight)
        seed, needs = _empty(1, dtype=torch.int64), [True, *[False] * 4]
        y, s = plan.forward_quantized(x, weight, bias, [a, b, None], seed)
        plan.backward_quantized(y, None, weight, [a, b, None], s, seed, needs)
        plan.dequantize(weight, self.dtype)


CALLS: tuple[Callable[[], None], ...] = (
    # the most masks, and the most lanes
    Group(8192, (32, 32, 32)),
    Group(8192, (64, 32, 16), dropout=0.0),
    DoraNorm(128),
    Quantized(1024, True),
    Quantized(8, False),
)
# Other types and strides, one of each kind, for one architecture: CI has no time for more of them,
# nor for all; every_variant.py compiles the other rows of the tables.
VARIATIONS: tuple[Callable[[], None], ...] = (
    # float32 adapters on a half model
    Group(8192, (16, 16, 16), HALF, FULL),
    # nothing divides by 16
    Group(8191, (3, 13, 16), rows=(1003, 400, 33), k=4001),
    DoraNorm(13, n=1003, k=4001),
    Quantized(1024, False, 64),
    Quantized(8, True, 16, FULL, n=1003),
)

# The largest tiles, for GPUs with 99 KB of shared memory.
NARROW = CALLS[1:4]


def calls(target: Target) -> tuple[Callable[[], None], ...]:
    """All whose configurations are compiled for this GPU."""
    return CALLS + (VARIATIONS if target.name == "sm_90" else ())
