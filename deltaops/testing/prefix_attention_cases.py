"""The shapes and settings that every backend of ``prefix_attention`` is held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_cases import AttentionCase, AttentionTensors


@dataclass(frozen=True)
class PrefixAttentionTensors:
    """The arguments of one call."""

    rest: AttentionTensors
    prefix_k: Tensor
    prefix_v: Tensor
    bias: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Those that have a gradient."""
        return self.rest.q, self.rest.k, self.rest.v, self.prefix_k, self.prefix_v

    def to(self, dtype: torch.dtype) -> PrefixAttentionTensors:
        """The same values in another dtype, the prefix too; strides are kept."""
        prefix = self.prefix_k.to(dtype), self.prefix_v.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return PrefixAttentionTensors(self.rest.to(dtype), *prefix, bias)

    @property
    def more(self) -> dict[str, Tensor]:
        """Further arguments of both, by name."""
        return {} if self.bias is None else {"bias": self.bias}

    def forward_arguments(self) -> tuple[object, ...]:
        """For ``backend.prefix_attention_forward(*…, **more)``."""
        return *self.inputs, self.rest.mask, self.rest.scale, self.rest.causal

    def backward_arguments(self, grad_y: Tensor, y: Tensor, lse: Tensor) -> tuple[object, ...]:
        """For ``backend.prefix_attention_backward(*…, needs, **more)``."""
        rest = self.rest
        return grad_y, *self.inputs, y, lse, rest.mask, rest.scale, rest.causal


@dataclass(frozen=True)
class PrefixAttentionCase:
    """One row of the table; ``str`` is its test id."""

    prefix: int
    rest: AttentionCase
    wide: bool = False
    """Whether the prefix is in float32 whatever the rest is in."""
    sliced: bool = False
    """Whether it is two slices of one parameter ``[P, 2, Hkv, D]``, as PEFT keeps it."""
    bias: str = ""
    """"heads" [1,H,Lq,Lk], as T5 has it, its keys apart; "whole", that of P + Lk; "queries"
    [B,1,Lq,1] in float32; or ""."""

    def __str__(self) -> str:
        marks = f"{'wide' if self.wide else ''}{'sliced' if self.sliced else ''}"
        return f"{self.prefix}{marks}+{self.rest}{f'-bias{self.bias}' if self.bias else ''}"

    def tensors(self, dtype: torch.dtype, *, seed: int = 0) -> PrefixAttentionTensors:
        """The same for every dtype up to rounding."""
        rest = self.rest.tensors(dtype, seed=seed)
        generator = torch.Generator().manual_seed(seed + 40)
        shape = (self.prefix, 2, self.rest.h_kv or self.rest.h, self.rest.d)
        both = torch.randn(shape, generator=generator, dtype=torch.float64)
        narrow = self.wide and dtype.itemsize < torch.float32.itemsize
        both = both.to(torch.float32 if narrow else dtype)
        prefix = [t.transpose(0, 1) for t in both.unbind(1)]
        if not self.sliced:
            prefix = [t.contiguous() for t in prefix]
        return PrefixAttentionTensors(rest, prefix[0], prefix[1], self._bias(dtype, seed + 50))

    def _bias(self, dtype: torch.dtype, seed: int) -> Tensor | None:
        if not self.bias:
            return None
        generator = torch.Generator().manual_seed(seed)
        b, h, l_q = self.rest.b, self.rest.h, self.rest.l_q
        l_kv = l_q if self.rest.l_kv < 0 else self.rest.l_kv
        if self.bias == "queries":
            drawn = torch.randn((b, 1, l_q, 1), generator=generator, dtype=torch.float64)
            return drawn.to(torch.promote_types(dtype, torch.float32)).expand(b, h, l_q, l_kv)
        keys = l_kv + self.prefix * (self.bias == "whole")
        drawn = torch.randn((l_q, keys, h), generator=generator, dtype=torch.float64).to(dtype)
        return drawn.permute(2, 0, 1)[None].expand(b, h, l_q, keys)

    def grad_y(self, dtype: torch.dtype, *, seed: int = 1) -> Tensor:
        """A random output gradient ``[B, H, Lq, D]``, in the layout of q."""
        return self.rest.grad_y(dtype, seed=seed)


PREFIX_ATTENTION_CASES = (
    PrefixAttentionCase(16, AttentionCase(2, 4, 96, 64, causal=True)),
    PrefixAttentionCase(5, AttentionCase(2, 8, 1, 64, h_kv=2, l_kv=77), wide=True),
    PrefixAttentionCase(64, AttentionCase(1, 6, 17, 80, h_kv=3, layout="merged", causal=True)),
    PrefixAttentionCase(10, AttentionCase(3, 4, 29, 16, h_kv=2, mask="rows"), sliced=True),
    PrefixAttentionCase(3, AttentionCase(2, 5, 19, 6, h_kv=1, layout="dense", mask="each")),
    PrefixAttentionCase(100, AttentionCase(2, 2, 45, 24, mask="shared", causal=True), wide=True),
    PrefixAttentionCase(130, AttentionCase(1, 2, 130, 96, h_kv=1, l_kv=515, mask="each", scale=1)),
    # the gradient of one key is few numbers: enough rows that no single rounding decides
    PrefixAttentionCase(1, AttentionCase(2, 3, 31, 33, layout="columns", scale=0.5), sliced=True),
    PrefixAttentionCase(0, AttentionCase(2, 3, 13, 8, mask="rows")),
    PrefixAttentionCase(4, AttentionCase(2, 2, 3, 8, l_kv=0)),
    PrefixAttentionCase(4, AttentionCase(0, 2, 5, 8)),
    PrefixAttentionCase(4, AttentionCase(2, 2, 0, 8, causal=True), wide=True),
    # wide heads whose rows nothing divides
    PrefixAttentionCase(9, AttentionCase(1, 3, 19, 67, h_kv=1, causal=True), wide=True),
)
BIASED_PREFIX_CASES = (
    PrefixAttentionCase(12, AttentionCase(2, 4, 45, 16, l_kv=150, mask="rows"), bias="heads"),
    PrefixAttentionCase(7, AttentionCase(2, 4, 33, 24, h_kv=2, causal=True), bias="queries"),
    PrefixAttentionCase(130, AttentionCase(2, 2, 19, 9, mask="each"), bias="whole", wide=True),
)
"""With a bias, which Triton does not take."""
