"""What a backend is: an implementation of the ops that can say, in words, what it cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor


class DeltaLinearCall(NamedTuple):
    """All that a backend may look at to accept or refuse a ``delta_linear``. Hashable."""

    device: str
    dtype: torch.dtype
    adapter_dtypes: tuple[torch.dtype, ...]
    m: int
    n: int
    k: int
    ranks: tuple[int, ...]
    dropout: bool
    weight_layout: str
    """"row" [N,K] as nn.Linear keeps it, "col" its transpose as Conv1D does, else "strided"."""
    activations: tuple[str, ...] = ()
    """Those of the branches that have one other than "identity"."""
    branch_bias: bool = False
    """Whether some branch has a bias."""

    @property
    def op(self) -> str:
        """The op's name."""
        return "delta_linear"

    @property
    def rank(self) -> int:
        """Total rank."""
        return sum(self.ranks)

    @property
    def title(self) -> str:
        """One line for people."""
        return (
            f"delta_linear M={self.m} N={self.n} K={self.k} ranks={list(self.ranks)} "
            f"{self.dtype} on {self.device}{' with dropout' if self.dropout else ''}"
            f"{''.join(' ' + name for name in self.activations)}"
        )

    @classmethod
    def of(
        cls,
        x: Tensor,
        weight: Tensor,
        a: Sequence[Tensor],
        branch_bias: Sequence[Tensor | None],
        dropout: Sequence[float],
        activation: Sequence[str],
    ) -> DeltaLinearCall:
        """The call of these tensors; x ``[..., K]``."""
        # Once a call: lists inside tuple() are faster than generators, is_cpu than device.type.
        n, k = weight.shape
        return cls(
            "cpu" if x.is_cpu else x.device.type,
            x.dtype,
            tuple([t.dtype for t in a]),
            x.numel() // k if k else 0,
            n,
            k,
            tuple([t.shape[0] for t in a]),
            any(dropout),
            weight_layout(weight),
            tuple([name for name in activation if name != "identity"]),
            any([t is not None for t in branch_bias]),
        )


def weight_layout(weight: Tensor) -> str:
    """``"row"``, ``"col"`` or ``"strided"``; see :class:`DeltaLinearCall`."""
    rows, columns = weight.stride()
    if columns == 1:
        return "row"
    return "col" if rows == 1 else "strided"


class BottleneckCall(NamedTuple):
    """All that a backend may look at to accept or refuse a ``bottleneck``. Hashable."""

    device: str
    dtype: torch.dtype
    parameter_dtypes: tuple[torch.dtype, ...]
    """Of down and, where there is one, of the norm."""
    m: int
    k: int
    rank: int
    activation: str
    norm: str
    """"layer", "rms" or "none"."""

    @property
    def op(self) -> str:
        """The op's name."""
        return "bottleneck"

    @property
    def title(self) -> str:
        """One line for people."""
        norm = "" if self.norm == "none" else f" after a {self.norm} norm"
        return (
            f"bottleneck M={self.m} K={self.k} R={self.rank} {self.activation}{norm} "
            f"{self.dtype} on {self.device}"
        )


class NormBiasCall(NamedTuple):
    """All that a backend may look at to accept or refuse a ``norm_bias``. Hashable."""

    device: str
    dtype: torch.dtype
    parameter_dtypes: tuple[torch.dtype, ...]
    """Of gamma and bias, as far as they are there."""
    m: int
    k: int
    norm: str
    """"layer" or "rms"."""

    @property
    def op(self) -> str:
        """The op's name."""
        return "norm_bias"

    @property
    def title(self) -> str:
        """One line for people."""
        return f"norm_bias {self.norm} M={self.m} K={self.k} {self.dtype} on {self.device}"


class CrossEntropyCall(NamedTuple):
    """All that a backend may look at to accept or refuse a ``cross_entropy``. Hashable."""

    device: str
    dtype: torch.dtype
    m: int
    v: int

    @property
    def op(self) -> str:
        """The op's name."""
        return "cross_entropy"

    @property
    def title(self) -> str:
        """One line for people."""
        return f"cross_entropy M={self.m} V={self.v} {self.dtype} on {self.device}"

    @classmethod
    def of(cls, logits: Tensor) -> CrossEntropyCall:
        """The call of these logits ``[M, V]``."""
        device = "cpu" if logits.is_cpu else logits.device.type
        return cls(device, logits.dtype, *logits.shape)


class GatedCall(NamedTuple):
    """All that a backend may look at to accept or refuse a ``gated``. Hashable."""

    device: str
    dtype: torch.dtype
    m: int
    k: int
    activation: str

    @property
    def op(self) -> str:
        """The op's name."""
        return "gated"

    @property
    def title(self) -> str:
        """One line for people."""
        return f"gated {self.activation} M={self.m} K={self.k} {self.dtype} on {self.device}"


class RotaryCall(NamedTuple):
    """All that a backend may look at to accept or refuse a ``rotary``. Hashable."""

    device: str
    dtype: torch.dtype
    table_dtype: torch.dtype
    """Of cos and sin: that of x, or float32."""
    b: int
    h: int
    l: int  # noqa: E741  # the shape is [B, H, L, D]
    d: int

    @property
    def op(self) -> str:
        """The op's name."""
        return "rotary"

    @property
    def title(self) -> str:
        """One line for people."""
        return f"rotary B={self.b} H={self.h} L={self.l} D={self.d} {self.dtype} on {self.device}"


class AttentionCall(NamedTuple):
    """All that a backend may look at to accept or refuse an ``attention``. Hashable."""

    device: str
    dtype: torch.dtype
    b: int
    h: int
    h_kv: int
    """Heads of keys and values, each read by ``h / h_kv`` heads of queries."""
    l_q: int
    l_kv: int
    d: int
    masked: bool
    causal: bool

    @property
    def op(self) -> str:
        """The op's name."""
        return "attention"

    @property
    def title(self) -> str:
        """One line for people."""
        heads = f"{self.h}" if self.h == self.h_kv else f"{self.h}/{self.h_kv}"
        length = f"{self.l_q}" if self.l_q == self.l_kv else f"{self.l_q}/{self.l_kv}"
        return (
            f"attention B={self.b} H={heads} L={length} D={self.d}"
            f"{' causal' if self.causal else ''}{' masked' if self.masked else ''} "
            f"{self.dtype} on {self.device}"
        )

    @classmethod
    def of(cls, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> AttentionCall:
        """The call of these tensors; q ``[B, H, Lq, D]``, k ``[B, Hkv, Lk, D]``."""
        b, h, l_q, d = q.shape
        device = "cpu" if q.is_cpu else q.device.type
        return cls(device, q.dtype, b, h, k.shape[1], l_q, k.shape[2], d, mask is not None, causal)


class PrefixAttentionCall(NamedTuple):
    """All that a backend may look at to accept or refuse a ``prefix_attention``. Hashable."""

    device: str
    dtype: torch.dtype
    prefix_dtype: torch.dtype
    b: int
    h: int
    h_kv: int
    """Heads of keys and values, each read by ``h / h_kv`` heads of queries."""
    l_q: int
    l_kv: int
    """Keys of a sequence."""
    prefix: int
    """Keys that all queries of the batch see besides."""
    d: int
    masked: bool
    causal: bool

    @property
    def op(self) -> str:
        """The op's name."""
        return "prefix_attention"

    @property
    def title(self) -> str:
        """One line for people."""
        heads = f"{self.h}" if self.h == self.h_kv else f"{self.h}/{self.h_kv}"
        length = f"{self.l_q}" if self.l_q == self.l_kv else f"{self.l_q}/{self.l_kv}"
        return (
            f"prefix_attention B={self.b} H={heads} L={length} P={self.prefix} D={self.d}"
            f"{' causal' if self.causal else ''}{' masked' if self.masked else ''} "
            f"{self.dtype} on {self.device}"
        )

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, prefix_k: Tensor, mask: Tensor | None, causal: bool
    ) -> PrefixAttentionCall:
        """The call of these tensors; prefix_k ``[Hkv, P, D]``."""
        b, h, l_q, d = q.shape
        return cls(
            "cpu" if q.is_cpu else q.device.type,
            q.dtype,
            prefix_k.dtype,
            b,
            h,
            k.shape[1],
            l_q,
            k.shape[2],
            prefix_k.shape[1],
            d,
            mask is not None,
            causal,
        )


Call: TypeAlias = (
    DeltaLinearCall
    | BottleneckCall
    | NormBiasCall
    | CrossEntropyCall
    | GatedCall
    | RotaryCall
    | AttentionCall
    | PrefixAttentionCall
)
"""A call of any op: ``call.op`` names it."""


class Backend(Protocol):
    """An implementation of ``delta_linear``. Tensors come flattened: x ``[M, K]``, y ``[M, N]``."""

    name: str

    def unavailable(self) -> str | None:
        """Why nothing runs here at all, and the remedy; None when it is ready."""

    def unsupported(self, call: Call) -> str | None:
        """Why this call cannot run, in words; None when it can."""

    def outrun(self, call: Call) -> str | None:
        """Why "auto" leaves this call to torch, which is faster; None where it is not."""

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        branch_bias: Sequence[Tensor | None],
        scaling: Sequence[float],
        dropout: Sequence[float],
        activation: Sequence[str],
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """``(y [M, N], S [M, ΣR] float32)``; see :mod:`deltaops.reference.delta_linear`.

        The lists have one entry for each branch; ``branch_bias`` has None where there is none.
        """

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor | None,
        weight: Tensor,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        s: Tensor,
        scaling: Sequence[float],
        dropout: Sequence[float],
        activation: Sequence[str],
        seed: Tensor | None,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """The wanted gradients, in the order x, bias, a…, b…, branch_bias…."""


class DeltaLinearPlan(Protocol):
    """A ``delta_linear`` whose shapes, strides and settings are known: only tensors are missing.

    Those of the branches come in one sequence, a… b… branch_bias…, of which the last may be None;
    the backward pass does not read the branches' biases, and may get None for all.
    """

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operands: Sequence[Tensor | None],
        seed: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`Backend.forward`; S only where ``keep`` asks for it."""

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor | None,
        weight: Tensor,
        operands: Sequence[Tensor | None],
        s: Tensor,
        seed: Tensor | None,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """As :meth:`Backend.backward`."""


class GroupMember(NamedTuple):
    """One of several ``delta_linear`` of the same x."""

    plan: DeltaLinearPlan
    weight: Tensor
    bias: Tensor | None
    operands: Sequence[Tensor | None]
    """As :class:`DeltaLinearPlan` has them."""
    seed: Tensor | None


class GroupingPlan(DeltaLinearPlan, Protocol):
    """One whose backend runs several layers of the same x in one pass over it.

    The plans of all members are of the same class.
    """

    def forward_group(
        self, x: Tensor, members: Sequence[GroupMember], keep: bool
    ) -> list[tuple[Tensor, Tensor | None]]:
        """What each member's ``forward`` gives, to the bit."""

    def backward_group(
        self,
        grad_y: Sequence[Tensor],
        x: Tensor | None,
        members: Sequence[GroupMember],
        s: Sequence[Tensor],
        needs: Sequence[Sequence[bool]],
    ) -> list[list[Tensor]]:
        """What each member's ``backward`` gives, but for the gradient of x: all members want it or
        none does, and the first one gets the sum."""


class PreparingBackend(Backend, Protocol):
    """One that can do part of a ``delta_linear`` ahead. A plan keeps none of the tensors."""

    def prepare(
        self,
        weight: Tensor,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        branch_bias: Sequence[Tensor | None],
        scaling: Sequence[float],
        dropout: Sequence[float],
        activation: Sequence[str],
    ) -> DeltaLinearPlan:
        """The plan of all calls with tensors of these dtypes, shapes and strides."""


class AdapterBackend(Backend, Protocol):
    """One that also has ``bottleneck`` and ``norm_bias``. x comes flattened, ``[M, K]``."""

    def bottleneck_forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        up: Tensor,
        up_bias: Tensor | None,
        scaling: float,
        eps: float,
        activation: str,
        norm: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(y [M, K], h [M, R] float32, stats)``; see :mod:`deltaops.reference.bottleneck`."""

    def bottleneck_backward(
        self,
        grad_y: Tensor,
        x: Tensor | None,
        h: Tensor,
        stats: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
        activation: str,
        norm: str,
        residual_is_x: bool,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """The wanted gradients: x, gamma, beta, down, down_bias, up, up_bias."""

    def norm_bias_forward(
        self, x: Tensor, gamma: Tensor | None, bias: Tensor | None, eps: float, norm: str
    ) -> tuple[Tensor, Tensor]:
        """``(y [M, K], stats [M, 2] float32)``; see :mod:`deltaops.reference.norm_bias`."""

    def norm_bias_backward(
        self,
        grad_y: Tensor,
        x: Tensor | None,
        stats: Tensor,
        gamma: Tensor | None,
        dtype: torch.dtype,
        norm: str,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """The wanted gradients: x, then gamma and bias in ``dtype``."""


class CrossEntropyBackend(Backend, Protocol):
    """One that also has ``cross_entropy``: logits ``[M, V]``, target ``[M]`` int64."""

    def cross_entropy_forward(
        self, logits: Tensor, target: Tensor, ignore_index: int, mean: bool
    ) -> tuple[Tensor, Tensor]:
        """``(loss, state [M, 2])``; see :mod:`deltaops.reference.cross_entropy`."""

    def cross_entropy_backward(
        self,
        grad_loss: Tensor,
        logits: Tensor,
        target: Tensor,
        state: Tensor,
        ignore_index: int,
        mean: bool,
    ) -> Tensor:
        """``grad_logits [M, V]``."""


class GatedBackend(Backend, Protocol):
    """One that also has ``gated``. gate and up come flattened, ``[M, K]``."""

    def gated_forward(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """``y [M, K]``; see :mod:`deltaops.reference.gated`."""

    def gated_backward(
        self,
        grad_y: Tensor,
        gate: Tensor,
        up: Tensor | None,
        activation: str,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """The wanted gradients: gate, up."""


class RotaryBackend(Backend, Protocol):
    """One that also has ``rotary``: x ``[B, H, L, D]``, cos and sin ``[B or 1, L, D]``.

    ``tokens_first``: the memory of the result is ``[B, L, H, D]``, else ``[B, H, L, D]``.
    """

    def rotary_forward(self, x: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool) -> Tensor:
        """``y [B, H, L, D]``; see :mod:`deltaops.reference.rotary`."""

    def rotary_backward(
        self, grad_y: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool
    ) -> Tensor:
        """``grad_x [B, H, L, D]``."""


class AttentionBackend(Backend, Protocol):
    """One that also has ``attention``: q ``[B, H, Lq, D]``, k and v ``[B, Hkv, Lk, D]``, any
    strides; mask ``[B, H, Lq, Lk]`` bool, of any strides too, True where a query sees a key.

    The memory of y and of the gradients is ``[B, L, H, D]``.
    """

    def attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """``(y [B, H, Lq, D], lse [B, H, Lq])``; see :mod:`deltaops.reference.attention`."""

    def attention_backward(
        self,
        grad_y: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        y: Tensor,
        lse: Tensor,
        mask: Tensor | None,
        scale: float,
        causal: bool,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """The wanted gradients: q, k, v."""


class PrefixAttentionBackend(Backend, Protocol):
    """One that also has ``prefix_attention``: as :class:`AttentionBackend`, with prefix_k and
    prefix_v ``[Hkv, P, D]`` of one dtype, any strides. Their gradients are contiguous.
    """

    def prefix_attention_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        mask: Tensor | None,
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """``(y, lse)``; see :mod:`deltaops.reference.prefix_attention`."""

    def prefix_attention_backward(
        self,
        grad_y: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        y: Tensor,
        lse: Tensor,
        mask: Tensor | None,
        scale: float,
        causal: bool,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """The wanted gradients: q, k, v, prefix_k, prefix_v."""
