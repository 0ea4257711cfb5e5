"""Linear layers whose traffic is counted: one, a group of one x, quantised, of mixed adapters, and
the plan of a peer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaops.backends.base import GroupMember
from deltaops.backends.triton import TritonBackend, core, delta_linear, planner
from deltaops.backends.triton.group import TritonDeltaLinear
from deltaops.backends.triton.tables import Setting
from deltaops.reference.quantized import QuantizedWeight

from . import published
from .traffic_floor import FORWARD, Floor, meta


@dataclass(frozen=True)
class Linear:
    """``delta_linear`` with one branch, LoRA or a parallel adapter; every gradient is wanted."""

    m: int
    n: int
    k: int
    rank: int
    dropout: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    adapter: torch.dtype = torch.bfloat16
    activation: str = "identity"
    """Of a parallel adapter, which has a bias before it too."""

    @property
    def setting(self) -> Setting:
        """What a choice depends on."""
        return planner.setting_of(
            self.dtype, (self.adapter,), self.m, self.n, self.k, (self.rank,), self.dropout > 0
        )

    def __str__(self) -> str:
        branch = "" if self.activation == "identity" else f" {self.activation}"
        return f"delta_linear {self.setting}{branch}"

    def plans(self, direction: str) -> tuple[str, ...]:
        """Those that can run it on the GPU that stands in."""
        rows, factor = (
            (self.k, (self.n, self.rank)) if direction == FORWARD else (self.n, (self.rank, self.k))
        )
        special = delta_linear.special(
            direction,
            meta(self.dtype, self.m, rows),
            meta(self.dtype, self.n, self.k),
            [meta(self.adapter, *factor)],
            [self.rank],
            "meta",
            not self.dropout and self.activation == "identity",
        )
        return planner.possible(self.setting, direction, special)

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        run = TritonBackend()
        x, weight, y = (
            meta(self.dtype, *shape)
            for shape in ((self.m, self.k), (self.n, self.k), (self.m, self.n))
        )
        a, b = meta(self.adapter, self.rank, self.k), meta(self.adapter, self.n, self.rank)
        parallel = self.activation != "identity"
        inner = meta(self.adapter, self.rank) if parallel else None
        settings = [2.0], [self.dropout], [self.activation], meta(torch.int64, 1)
        if direction == FORWARD:
            run.forward(x, weight, None, [a], [b], [inner], *settings)
        else:
            s = meta(torch.float32, self.m, self.rank)
            needs = [True, False, True, True, parallel]
            run.backward(y, x, weight, [a], [b], s, *settings, needs)

    def floor(self, direction: str) -> Floor:
        """Forward: x, W, A, B and y. Backward: dy, x, W, A, B and dx, dA, dB. S is neither: it can
        be made again from x, which is read anyway. An inner bias is too little to count."""
        m, n, k, r = self.m, self.n, self.k, self.rank
        narrow, wide = self.dtype.itemsize, self.adapter.itemsize
        moved = narrow * (m * k + n * k + m * n) + wide * r * (n + k)
        operations = 2 * m * (n * k + r * (n + k))
        if direction == FORWARD:
            return Floor(moved, operations)
        return Floor(moved + narrow * m * k + wide * r * (n + k), operations + 2 * m * r * (n + k))


@dataclass(frozen=True)
class Group:
    """``delta_linear_group`` of layers with one branch each; every gradient is wanted."""

    m: int
    rows: tuple[int, ...]
    k: int
    rank: int
    dropout: float = 0.0
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        rows, dtype = "+".join(map(str, self.rows)), str(self.dtype).removeprefix("torch.")
        dropout = " dropout" if self.dropout else ""
        return f"delta_linear_group {self.m}×({rows})×{self.k} r={self.rank} {dtype}{dropout}"

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        run, x, members = TritonBackend(), meta(self.dtype, self.m, self.k), []
        for n in self.rows:
            weight, a = meta(self.dtype, n, self.k), meta(self.dtype, self.rank, self.k)
            b, seed = meta(self.dtype, n, self.rank), meta(torch.int64, 1)
            plan = run.prepare(weight, [a], [b], [None], [2.0], [self.dropout], ["identity"])
            members.append(GroupMember(plan, weight, None, [a, b, None], seed, None))
        first = members[0].plan
        assert isinstance(first, TritonDeltaLinear)
        if direction == FORWARD:
            first.forward_group(x, members, True)
        else:
            dy = [meta(self.dtype, self.m, n) for n in self.rows]
            s = [meta(torch.float32, self.m, self.rank) for _ in self.rows]
            needs = [[True, False, True, True, False] for _ in self.rows]
            first.backward_group(dy, x, members, s, needs)

    def floor(self, direction: str) -> Floor:
        """As that of :class:`Linear`, with x and dx once for all layers."""
        m, n, k, size = self.m, sum(self.rows), self.k, self.dtype.itemsize
        factors = self.rank * (n + len(self.rows) * k)
        moved = size * (m * k + n * k + m * n + factors)
        operations = 2 * m * (n * k + factors)
        if direction == FORWARD:
            return Floor(moved, operations)
        return Floor(moved + size * (m * k + factors), operations + 2 * m * factors)


@dataclass(frozen=True)
class Quantized:
    """``quantized_linear`` with one branch, with W made where the passes do; every gradient is
    wanted."""

    m: int
    n: int
    k: int
    rank: int
    kind: str
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"quantized_linear {self.kind} {self.m}×{self.n}×{self.k} r={self.rank} {dtype}"

    def _weight(self) -> QuantizedWeight:
        n, k = shape = self.n, self.k
        if self.kind == "int8":
            codes, scales = meta(torch.int8, n, k), meta(torch.float32, n)
            return QuantizedWeight(codes, scales, shape, self.kind, k)
        codes, scales = meta(torch.uint8, n * k // 2), meta(torch.float32, n * k // 64)
        return QuantizedWeight(codes, scales, shape, self.kind, 64)

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        x, weight = meta(self.dtype, self.m, self.k), self._weight()
        a, b = meta(self.dtype, self.rank, self.k), meta(self.dtype, self.n, self.rank)
        plan = TritonBackend().prepare(a, [a], [b], [None], [2.0], [0.0], ["identity"])
        fused, operands = plan.fuses(self.m, weight), [a, b, None]
        dense = None if fused else plan.dequantize(weight, self.dtype)
        if direction == FORWARD:
            if dense is None:
                plan.forward_quantized(x, weight, None, operands, None)
            else:
                plan.forward(x, dense, None, operands, None, True)
            return
        dy, s = meta(self.dtype, self.m, self.n), meta(torch.float32, self.m, self.rank)
        needs = [True, False, True, True, False]
        if dense is None:
            plan.backward_quantized(dy, x, weight, operands, s, None, needs)
        else:
            plan.backward(dy, x, dense, operands, s, None, needs)

    def floor(self, direction: str) -> Floor:
        """As that of :class:`Linear`, with the codes and scales for W."""
        m, n, k, r = self.m, self.n, self.k, self.rank
        codes, scales = self._weight()[:2]
        dense = Linear(m, n, k, r, dtype=self.dtype, adapter=self.dtype).floor(direction)
        moved = dense.bytes - self.dtype.itemsize * n * k + codes.nbytes + scales.nbytes
        return Floor(moved, dense.operations)


@dataclass(frozen=True)
class Mixed:
    """``delta_linear`` of a batch that mixes adapters, each row with one of them; every gradient is
    wanted."""

    m: int
    n: int
    k: int
    rank: int
    adapters: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"{self.m}×{self.n}×{self.k} r={self.rank}"
        return f"delta_linear {shape} {self.adapters} adapters by row {dtype}"

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        run, count = TritonBackend(), self.adapters
        x, weight, y = (
            meta(self.dtype, *shape)
            for shape in ((self.m, self.k), (self.n, self.k), (self.m, self.n))
        )
        a = [meta(self.dtype, self.rank, self.k) for _ in range(count)]
        b = [meta(self.dtype, self.n, self.rank) for _ in range(count)]
        settings = [2.0] * count, [0.0] * count, ["identity"] * count, None
        adapter = meta(torch.int32, self.m)
        if direction == FORWARD:
            run.forward(x, weight, None, a, b, [None] * count, *settings, adapter)
        else:
            s = meta(torch.float32, self.m, count * self.rank)
            needs = [True, False, *[True] * (2 * count), *[False] * count]
            run.backward(y, x, weight, a, b, s, *settings, needs, adapter)

    def floor(self, direction: str) -> Floor:
        """As that of :class:`Linear`, with every adapter read and written, and one multiplied for
        each row."""
        one = Linear(self.m, self.n, self.k, self.rank, dtype=self.dtype, adapter=self.dtype)
        least, ways = one.floor(direction), 1 if direction == FORWARD else 2
        more = (self.adapters - 1) * self.rank * (self.n + self.k) * self.dtype.itemsize
        return Floor(least.bytes + ways * more + 4 * self.m, least.operations)


@dataclass(frozen=True)
class LoraFusion:
    """The plan of :mod:`.published`; every gradient is wanted."""

    m: int
    n: int
    k: int
    rank: int
    dropout: float
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"LoRAFusion's plan {self.m}×{self.n}×{self.k} r={self.rank} {dtype} dropout"

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        x, weight, y = (
            meta(self.dtype, *shape)
            for shape in ((self.m, self.k), (self.n, self.k), (self.m, self.n))
        )
        a, b = meta(self.dtype, self.rank, self.k), meta(self.dtype, self.n, self.rank)
        seed, context = meta(torch.int64, 1), _Context()
        if direction == FORWARD:
            published.LoraFusion.forward(context, x, weight, a, b, 2.0, self.dropout, seed)
            return
        precision = core.kernels("precision").rank_precision(self.dtype, [a])
        keep, s = meta(torch.uint8, self.m, self.k), meta(torch.float32, self.m, self.rank)
        context.save_for_backward(x, keep, s, weight, a, b)
        context.settings = 2.0, self.dropout, precision
        published.LoraFusion.backward(context, y)

    def floor(self, direction: str) -> Floor:
        """That of :class:`Linear`."""
        return Linear(
            self.m, self.n, self.k, self.rank, self.dropout, self.dtype, self.dtype
        ).floor(direction)


class _Context:
    """What autograd keeps from a forward pass."""

    saved_tensors: tuple[Tensor | None, ...]
    settings: tuple[object, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """For the backward pass."""
        self.saved_tensors = tensors
