"""``prefix_attention`` in the native core: its attention, with a prefix."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import attention


def forward(
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
    """See :class:`deltaops.backends.base.PrefixAttentionBackend`."""
    return attention.forward(q, k, v, mask, scale, causal, (prefix_k, prefix_v), bias)


def backward(
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
    """See :class:`deltaops.backends.base.PrefixAttentionBackend`."""
    prefix = prefix_k, prefix_v
    return attention.backward(grad_y, q, k, v, y, lse, mask, scale, causal, needs, prefix, bias)
