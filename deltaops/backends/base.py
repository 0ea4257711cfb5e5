"""What a backend is: protocols of the ops, ``delta_linear`` for each and the others for some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from deltaops.reference.quantized import QuantizedWeight

from .calls import Call


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
        adapter: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(y [M, N], S [M, ΣR] float32)``; see :mod:`deltaops.reference.delta_linear`.

        The lists have one entry for each branch; ``branch_bias`` has None where there is none.
        ``adapter``: int32 ``[M]``, the one branch of each row, −1 for none; only a backend that
        takes ``call.routed`` gets it. S is 0 where a branch is not the row's.
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
        adapter: Tensor | None = None,
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
        adapter: Tensor | None = None,
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
        adapter: Tensor | None = None,
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
    adapter: Tensor | None
    """As :class:`Backend` has it."""
    s: Tensor | None = None
    """``[M, ΣR]`` float32, where it was made with x."""


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


class GivenPlan(DeltaLinearPlan, Protocol):
    """One that takes an S that was made with x."""

    def forward_given(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operands: Sequence[Tensor | None],
        s: Tensor,
    ) -> Tensor:
        """``y [M, N]`` of S ``[M, ΣR]`` float32, which gets the branches' biases."""


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


@runtime_checkable
class PlanningBackend(Backend, Protocol):
    """One that has several ways for a call and chooses by what was measured."""

    def planned(self, call: Call) -> str | None:
        """The way that it takes and why, in words; None where there is one only."""


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
        """``(y [M, K], stats [M, 2] float32)``, the latter ``[0, 2]`` without a norm; see
        :mod:`deltaops.reference.norm_bias`."""

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
    """One that also has ``gated``. gate and up come flattened, ``[M, K]``; up is None where the
    call is ``alone``."""

    def gated_forward(self, gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
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


class ProducingBackend(AdapterBackend, GatedBackend, Protocol):
    """One that makes S = s · drop(y) Aᵀ of the layers that read y in the pass that makes y. Their
    plans are its own, :class:`GivenPlan` and :class:`GroupingPlan`."""

    def may_produce(self, call: Call, device: torch.device) -> bool:
        """Whether :meth:`produces` may say yes. Asked in every call, before who reads y is known:
        it must cost next to nothing."""

    def produces(self, call: Call, readers: Sequence[GroupMember]) -> bool:
        """Whether it does, for all of ``readers``, and is known to be faster so. Asked before
        seeds are drawn."""

    def norm_and_s(
        self, x: Tensor, gamma: Tensor | None, eps: float, readers: Sequence[GroupMember]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """As :meth:`AdapterBackend.norm_bias_forward` of an RMSNorm without a bias, and S
        ``[M, ΣR]`` float32 of each reader."""

    def gated_and_s(
        self, gate: Tensor, up: Tensor, readers: Sequence[GroupMember]
    ) -> tuple[Tensor, list[Tensor]]:
        """As :meth:`GatedBackend.gated_forward` of "silu", and S of each reader."""


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


class RotaryAttentionBackend(AttentionBackend, RotaryBackend, Protocol):
    """One that turns q and k by cos and sin ``[B or 1, L, D]`` on the way into ``attention``: the
    gradients are those of what it was given, and Lq = Lk = L."""

    def rotary_attention_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """As ``attention_forward``."""

    def rotary_attention_backward(
        self,
        grad_y: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        y: Tensor,
        lse: Tensor,
        mask: Tensor | None,
        scale: float,
        causal: bool,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """As ``attention_backward``."""


class PrefixAttentionBackend(Backend, Protocol):
    """One that also has ``prefix_attention``: as :class:`AttentionBackend`, with prefix_k and
    prefix_v ``[Hkv, P, D]`` of one dtype, any strides. Their gradients are contiguous. ``bias`` is
    ``[B, H, Lq, Lk or P + Lk]`` of any strides, floating point, or None.
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
        bias: Tensor | None = None,
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
        bias: Tensor | None = None,
    ) -> list[Tensor]:
        """The wanted gradients: q, k, v, prefix_k, prefix_v."""


class DoraNormBackend(Protocol):
    """One that also has ``dora_norm``: weight ``[N, K]``, a ``[R, K]``, b ``[N, R]``, any strides.

    No gradient goes through it.
    """

    def dora_norm(self, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """``norms [N]``; see :mod:`deltaops.reference.dora_norm`."""


class PromptEmbeddingBackend(Protocol):
    """One that also has ``prompt_embedding``: prompt ``[P, D]``, ids ``[B, T]`` int64 or int32,
    table ``[V, D]``, any strides."""

    def prompt_embedding_forward(self, prompt: Tensor, ids: Tensor, table: Tensor) -> Tensor:
        """``y [B, P + T, D]``, contiguous; see :mod:`deltaops.reference.prompt_embedding`."""

    def prompt_embedding_backward(self, grad_y: Tensor, length: int, dtype: torch.dtype) -> Tensor:
        """``grad_prompt [P, D]`` in ``dtype``, contiguous; ``length`` is P."""


@runtime_checkable
class QuantizedPlan(DeltaLinearPlan, Protocol):
    """One whose backend reads quantised weights itself."""

    def fuses(self, m: int, weight: QuantizedWeight) -> bool:
        """Whether passes of M rows go by :meth:`forward_quantized` and :meth:`backward_quantized`,
        which do not need the weight made."""

    def forward_quantized(
        self,
        x: Tensor,
        weight: QuantizedWeight,
        bias: Tensor | None,
        operands: Sequence[Tensor | None],
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`DeltaLinearPlan.forward` of the weight that is meant."""

    def backward_quantized(
        self,
        grad_y: Tensor,
        x: Tensor | None,
        weight: QuantizedWeight,
        operands: Sequence[Tensor | None],
        s: Tensor,
        seed: Tensor | None,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """As :meth:`DeltaLinearPlan.backward` of the weight that is meant."""

    def dequantize(self, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        """W ``[N, K]``; the bits of :func:`deltaops.reference.quantized.dequantize`."""
