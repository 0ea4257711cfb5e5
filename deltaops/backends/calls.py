"""What a backend is asked: one value for each op, with all that decides who runs it, no tensor.

``of`` makes one from the arguments of a call; dispatch compares them and remembers the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

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
    routed: bool = False
    """Whether each row has one of the branches or none, instead of all."""

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
            f"{' with an adapter for each row' if self.routed else ''}"
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
        routed: bool = False,
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
            routed,
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
    """"none", "layer" or "rms"."""

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
    alone: bool = False
    """Without ``up``: the activation, and no product."""

    @property
    def op(self) -> str:
        """The op's name."""
        return "gated"

    @property
    def title(self) -> str:
        """One line for people."""
        alone = " alone" if self.alone else ""
        return f"gated {self.activation}{alone} M={self.m} K={self.k} {self.dtype} on {self.device}"


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
    biased: bool = False

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
            f"{' causal' if self.causal else ''}{' masked' if self.masked else ''}"
            f"{' biased' if self.biased else ''} {self.dtype} on {self.device}"
        )

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        prefix_k: Tensor,
        mask: Tensor | None,
        causal: bool,
        bias: Tensor | None = None,
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
            bias is not None,
        )


class DoraNormCall(NamedTuple):
    """All that a backend may look at to accept or refuse a ``dora_norm``. Hashable."""

    device: str
    dtype: torch.dtype
    """Of the weight."""
    adapter_dtype: torch.dtype
    n: int
    k: int
    rank: int

    @property
    def op(self) -> str:
        """The op's name."""
        return "dora_norm"

    @property
    def title(self) -> str:
        """One line for people."""
        return f"dora_norm N={self.n} K={self.k} R={self.rank} {self.dtype} on {self.device}"


class PromptEmbeddingCall(NamedTuple):
    """All that a backend may look at to accept or refuse a ``prompt_embedding``. Hashable."""

    device: str
    dtype: torch.dtype
    """Of the table."""
    prompt_dtype: torch.dtype
    b: int
    prompt: int
    tokens: int
    d: int

    @property
    def op(self) -> str:
        """The op's name."""
        return "prompt_embedding"

    @property
    def title(self) -> str:
        """One line for people."""
        return (
            f"prompt_embedding B={self.b} P={self.prompt} T={self.tokens} D={self.d} "
            f"{self.dtype} on {self.device}"
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
    | DoraNormCall
    | PromptEmbeddingCall
)
"""A call of any op: ``call.op`` names it."""
