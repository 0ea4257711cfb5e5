"""The calls whose traffic is counted, and the floor of each: what :mod:`.traffic` runs.

The floor reads and writes each argument and result of a call once, and multiplies what the
mathematics says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from deltaops.backends.base import GroupMember
from deltaops.backends.triton import (
    TritonBackend,
    core,
    delta_linear,
    library_attention,
    planner,
)
from deltaops.backends.triton.group import TritonDeltaLinear
from deltaops.backends.triton.tables import Setting
from deltaops.reference.quantized import QuantizedWeight

from . import published

FORWARD, BACKWARD = "forward", "backward"


class Floor(NamedTuple):
    """The least that a direction of a call takes."""

    bytes: int
    operations: int


class Counted(Protocol):
    """A call of an op, on tensors without memory."""

    def run(self, direction: str) -> None:
        """Call the backend."""

    def floor(self, direction: str) -> Floor:
        """Of that direction."""


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
            _meta(self.dtype, self.m, rows),
            _meta(self.dtype, self.n, self.k),
            [_meta(self.adapter, *factor)],
            [self.rank],
            "meta",
            not self.dropout and self.activation == "identity",
        )
        return planner.possible(self.setting, direction, special)

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        run = TritonBackend()
        x, weight, y = (
            _meta(self.dtype, *shape)
            for shape in ((self.m, self.k), (self.n, self.k), (self.m, self.n))
        )
        a, b = _meta(self.adapter, self.rank, self.k), _meta(self.adapter, self.n, self.rank)
        parallel = self.activation != "identity"
        inner = _meta(self.adapter, self.rank) if parallel else None
        settings = [2.0], [self.dropout], [self.activation], _meta(torch.int64, 1)
        if direction == FORWARD:
            run.forward(x, weight, None, [a], [b], [inner], *settings)
        else:
            s = _meta(torch.float32, self.m, self.rank)
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
        run, x, members = TritonBackend(), _meta(self.dtype, self.m, self.k), []
        for n in self.rows:
            weight, a = _meta(self.dtype, n, self.k), _meta(self.dtype, self.rank, self.k)
            b, seed = _meta(self.dtype, n, self.rank), _meta(torch.int64, 1)
            plan = run.prepare(weight, [a], [b], [None], [2.0], [self.dropout], ["identity"])
            members.append(GroupMember(plan, weight, None, [a, b, None], seed, None))
        first = members[0].plan
        assert isinstance(first, TritonDeltaLinear)
        if direction == FORWARD:
            first.forward_group(x, members, True)
        else:
            dy = [_meta(self.dtype, self.m, n) for n in self.rows]
            s = [_meta(torch.float32, self.m, self.rank) for _ in self.rows]
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
class Prefix:
    """Causal ``prefix_attention``; every gradient is wanted."""

    b: int
    h: int
    h_kv: int
    length: int
    d: int
    prefix: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"prefix_attention B={self.b} H={self.h}/{self.h_kv} L={self.length} P={self.prefix} "
            f"D={self.d} causal {dtype}"
        )

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        run = TritonBackend()
        q, y = (self.heads(self.h) for _ in range(2))
        k, v = (self.heads(self.h_kv) for _ in range(2))
        pk, pv = (_meta(self.dtype, self.h_kv, self.prefix, self.d) for _ in range(2))
        if direction == FORWARD:
            run.prefix_attention_forward(q, k, v, pk, pv, None, 0.125, True)
        else:
            lse = _meta(torch.float32, self.b, self.h, self.length)
            needs = [True] * 5
            run.prefix_attention_backward(y, q, k, v, pk, pv, y, lse, None, 0.125, True, needs)

    def heads(self, count: int) -> Tensor:
        """So many of each token."""
        return _meta(self.dtype, self.b, count, self.length, self.d)

    def floor(self, direction: str) -> Floor:
        """Forward: q, k, v, the prefix and y, and lse. Backward: those and dy, and every gradient.
        Two products of a query and a key forward, five backward."""
        queries = self.b * self.h * self.length * self.d
        keys = 2 * (self.b * self.length + self.prefix) * self.h_kv * self.d
        pairs = self.length * (self.length + 1) // 2 + self.length * self.prefix
        lse = 4 * self.b * self.h * self.length
        size = self.dtype.itemsize
        if direction == FORWARD:
            moved, products = size * (2 * queries + keys) + lse, 2
        else:
            moved, products = size * (4 * queries + 2 * keys) + lse, 5
        return Floor(moved, 2 * products * self.b * self.h * pairs * self.d)


@dataclass(frozen=True)
class MergedPrefix(Prefix):
    """What is the kernels' where torch's attention has the own keys."""

    def __str__(self) -> str:
        return f"{super().__str__()} merged"

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        with library_attention.forced(library_attention.FLASH):
            super().run(direction)

    def heads(self, count: int) -> Tensor:
        """As a projection leaves them."""
        return _meta(self.dtype, self.b, self.length, count, self.d).transpose(1, 2)

    def floor(self, direction: str) -> Floor:
        """Forward: q, y, lse and the prefix; y and lse are written anew. Backward: dy, q, y, dq,
        lse and the prefix; dq is written anew, and the prefix's gradients."""
        queries = self.b * self.h * self.length * self.d
        keys, lse = 2 * self.prefix * self.h_kv * self.d, 4 * self.b * self.h * self.length
        size = self.dtype.itemsize
        if direction == FORWARD:
            moved, products = size * (3 * queries + keys) + 2 * lse, 2
        else:
            moved, products = size * (5 * queries + 2 * keys) + lse, 5
        return Floor(moved, 2 * products * queries * self.prefix)


@dataclass(frozen=True)
class Adapter:
    """``bottleneck`` of x, with its biases and x itself added; every gradient is wanted."""

    m: int
    k: int
    rank: int
    norm: str = "none"
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        norm = "" if self.norm == "none" else f" after a {self.norm} norm"
        return f"bottleneck {self.m}×{self.k} r={self.rank} gelu{norm} {dtype}"

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        run, normed = TritonBackend(), self.norm != "none"
        x, y = (_meta(self.dtype, self.m, self.k) for _ in range(2))
        down, up = _meta(self.dtype, self.rank, self.k), _meta(self.dtype, self.k, self.rank)
        inner, outer = _meta(self.dtype, self.rank), _meta(self.dtype, self.k)
        gamma, beta = (_meta(self.dtype, self.k) if normed else None for _ in range(2))
        if direction == FORWARD:
            run.bottleneck_forward(
                x, x, gamma, beta, down, inner, up, outer, 1.0, 1e-5, "gelu", self.norm
            )
        else:
            h = _meta(torch.float32, self.m, self.rank)
            stats = _meta(torch.float32, self.m if normed else 0, 2)
            needs = [True, normed, normed, True, True, True, True]
            run.bottleneck_backward(
                y, x, h, stats, gamma, beta, down, up, 1.0, "gelu", self.norm, True, needs
            )

    def floor(self, direction: str) -> Floor:
        """Forward: x, the parameters and y. Backward: dy, x and dx, the matrices and every
        parameter's gradient. h is neither: it can be made again from x, which is read anyway."""
        rows, matrices = self.m * self.k, 2 * self.rank * self.k
        vectors = self.rank + (1 if self.norm == "none" else 3) * self.k
        size, products = self.dtype.itemsize, 2 * self.m * matrices
        if direction == FORWARD:
            return Floor(size * (2 * rows + matrices + vectors), products)
        return Floor(size * (3 * rows + 2 * matrices + vectors), 2 * products)


@dataclass(frozen=True)
class Norm:
    """``norm_bias``; every gradient is wanted."""

    m: int
    k: int
    norm: str = "layer"
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"norm_bias {self.norm} {self.m}×{self.k} {str(self.dtype).removeprefix('torch.')}"

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        run = TritonBackend()
        x, y = (_meta(self.dtype, self.m, self.k) for _ in range(2))
        gamma, bias = (_meta(self.dtype, self.k) for _ in range(2))
        if direction == FORWARD:
            run.norm_bias_forward(x, gamma, bias, 1e-5, self.norm)
        else:
            stats = _meta(torch.float32, self.m, 2)
            run.norm_bias_backward(y, x, stats, gamma, self.dtype, self.norm, [True] * 3)

    def floor(self, direction: str) -> Floor:
        """Forward: x, gamma, bias and y. Backward: dy, x, dx, gamma and two gradients."""
        matrices, vectors = (2, 2) if direction == FORWARD else (3, 3)
        return Floor(self.dtype.itemsize * (matrices * self.m + vectors) * self.k, 0)


@dataclass(frozen=True)
class DoraNorm:
    """``dora_norm``, which has no gradient."""

    n: int
    k: int
    rank: int
    dtype: torch.dtype = torch.bfloat16

    directions: ClassVar = (FORWARD,)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"dora_norm {self.n}×{self.k} r={self.rank} {dtype}"

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        weight, a = _meta(self.dtype, self.n, self.k), _meta(self.dtype, self.rank, self.k)
        TritonBackend().dora_norm(weight, a, _meta(self.dtype, self.n, self.rank), 2.0)

    def floor(self, direction: str) -> Floor:
        """W, A, B and the norms."""
        n, k, r = self.n, self.k, self.rank
        return Floor(self.dtype.itemsize * (n * k + r * (n + k)) + 4 * n, 2 * n * k * r)


@dataclass(frozen=True)
class Prompt:
    """``prompt_embedding`` of tokens that are all different."""

    b: int
    tokens: int
    d: int
    prompt: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"prompt_embedding B={self.b} P={self.prompt} T={self.tokens} D={self.d} {dtype}"

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        run, rows = TritonBackend(), self.b * self.tokens
        if direction == FORWARD:
            ids, table = _meta(torch.int64, self.b, self.tokens), _meta(self.dtype, rows, self.d)
            run.prompt_embedding_forward(_meta(self.dtype, self.prompt, self.d), ids, table)
        else:
            dy = _meta(self.dtype, self.b, self.prompt + self.tokens, self.d)
            run.prompt_embedding_backward(dy, self.prompt, self.dtype)

    def floor(self, direction: str) -> Floor:
        """Forward: the prompt, ids, their rows and y. Backward: dy of the prompt, and its
        gradient."""
        b, p, rows, size = self.b, self.prompt, self.b * self.tokens, self.dtype.itemsize
        if direction == FORWARD:
            return Floor(size * self.d * (p + rows + b * p + rows) + 8 * rows, 0)
        return Floor(size * self.d * (b + 1) * p, 0)


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
            codes, scales = _meta(torch.int8, n, k), _meta(torch.float32, n)
            return QuantizedWeight(codes, scales, shape, self.kind, k)
        codes, scales = _meta(torch.uint8, n * k // 2), _meta(torch.float32, n * k // 64)
        return QuantizedWeight(codes, scales, shape, self.kind, 64)

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        x, weight = _meta(self.dtype, self.m, self.k), self._weight()
        a, b = _meta(self.dtype, self.rank, self.k), _meta(self.dtype, self.n, self.rank)
        plan = TritonBackend().prepare(a, [a], [b], [None], [2.0], [0.0], ["identity"])
        fused, operands = plan.fuses(self.m, weight), [a, b, None]
        dense = None if fused else plan.dequantize(weight, self.dtype)
        if direction == FORWARD:
            if dense is None:
                plan.forward_quantized(x, weight, None, operands, None)
            else:
                plan.forward(x, dense, None, operands, None, True)
            return
        dy, s = _meta(self.dtype, self.m, self.n), _meta(torch.float32, self.m, self.rank)
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
            _meta(self.dtype, *shape)
            for shape in ((self.m, self.k), (self.n, self.k), (self.m, self.n))
        )
        a = [_meta(self.dtype, self.rank, self.k) for _ in range(count)]
        b = [_meta(self.dtype, self.n, self.rank) for _ in range(count)]
        settings = [2.0] * count, [0.0] * count, ["identity"] * count, None
        adapter = _meta(torch.int32, self.m)
        if direction == FORWARD:
            run.forward(x, weight, None, a, b, [None] * count, *settings, adapter)
        else:
            s = _meta(torch.float32, self.m, count * self.rank)
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
class Gated:
    """``gated``; both gradients are wanted."""

    m: int
    k: int
    activation: str = "silu"
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"gated {self.activation} {self.m}×{self.k} {str(self.dtype).removeprefix('torch.')}"

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        run, (gate, up) = TritonBackend(), (_meta(self.dtype, self.m, self.k) for _ in range(2))
        if direction == FORWARD:
            run.gated_forward(gate, up, self.activation)
        else:
            run.gated_backward(_meta(self.dtype, self.m, self.k), gate, up, self.activation,
                               [True, True])  # fmt: skip

    def floor(self, direction: str) -> Floor:
        """Forward: gate, up and y. Backward: those two, dy and two gradients."""
        matrices = 3 if direction == FORWARD else 5
        return Floor(self.dtype.itemsize * matrices * self.m * self.k, 0)


@dataclass(frozen=True)
class Rotary:
    """``rotary`` of H heads, with tables of float32."""

    b: int
    h: int
    length: int
    d: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"rotary B={self.b} H={self.h} L={self.length} D={self.d} {dtype}"

    def run(self, direction: str) -> None:
        """See :class:`Counted`."""
        run, x = TritonBackend(), _meta(self.dtype, self.b, self.h, self.length, self.d)
        cos, sin = (_meta(torch.float32, 1, self.length, self.d) for _ in range(2))
        (run.rotary_forward if direction == FORWARD else run.rotary_backward)(x, cos, sin, True)

    def floor(self, direction: str) -> Floor:
        """x and y, or dy and dx, and the angles."""
        heads, angles = 2 * self.b * self.h, 2 * torch.float32.itemsize
        return Floor((self.dtype.itemsize * heads + angles) * self.length * self.d, 0)


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
            _meta(self.dtype, *shape)
            for shape in ((self.m, self.k), (self.n, self.k), (self.m, self.n))
        )
        a, b = _meta(self.dtype, self.rank, self.k), _meta(self.dtype, self.n, self.rank)
        seed, context = _meta(torch.int64, 1), _Context()
        if direction == FORWARD:
            published.LoraFusion.forward(context, x, weight, a, b, 2.0, self.dropout, seed)
            return
        precision = core.kernels("precision").rank_precision(self.dtype, [a])
        keep, s = _meta(torch.uint8, self.m, self.k), _meta(torch.float32, self.m, self.rank)
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


CALLS: tuple[Counted, ...] = (
    *(Linear(8192, 4096, 4096, r) for r in (16, 64, 128)),
    Linear(8192, 4096, 4096, 16, dropout=0.1),
    Linear(8192, 4096, 4096, 16, dropout=0.1, adapter=torch.float32),
    Linear(8192, 4096, 4096, 64, activation="gelu"),
    Linear(8192, 14336, 4096, 16),
    Linear(8192, 4096, 14336, 16),
    Linear(512, 4096, 4096, 16),
    Linear(1, 4096, 4096, 16),
    Linear(16, 14336, 4096, 64),
    Group(8192, (4096, 1024, 1024), 4096, 16),
    Group(8192, (4096, 1024, 1024), 4096, 16, dropout=0.1),
    Group(8192, (14336, 14336), 4096, 16),
    DoraNorm(4096, 4096, 16),
    Quantized(16, 4096, 4096, 16, "nf4"),
    Quantized(512, 4096, 4096, 16, "int8"),
    Quantized(8192, 4096, 4096, 16, "nf4"),
    Prefix(4, 32, 8, 2048, 128, 20),
    MergedPrefix(4, 32, 8, 2048, 128, 20),
    MergedPrefix(4, 32, 8, 2048, 128, 100),
    Prompt(8, 1024, 4096, 20),
    Adapter(8192, 4096, 64),
    Adapter(8192, 4096, 64, "layer"),
    Adapter(512, 4096, 64),
    Norm(8192, 4096),
    Norm(8192, 14336),
    # its rank takes two programs
    Adapter(8192, 4096, 256, "layer"),
    Mixed(8192, 4096, 4096, 16, 8),
    Gated(8192, 14336),
    Rotary(4, 32, 2048, 128),
    LoraFusion(8192, 4096, 4096, 16, 0.1),
)
"""Whose numbers are committed; a new op is one more entry."""


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
