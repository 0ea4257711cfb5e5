"""Torch's fused attention of a GPU with its log-sum-exp, forward and backward.

Below scaled_dot_product_attention lie ops of FlashAttention-2 and of cuDNN, of which it chooses
one. They hand out the natural log-sum-exp of the scaled scores, float32 ``[B, H, Lq]``, and their
backward passes read it: a softmax over further keys can be merged into theirs. Both take fewer
heads of keys than of queries, and have gradients for those. Added to what torch asks of a call:

  cuDNN  heads of up to 128 elements. q, y and dy by tokens: torch keeps cuDNN's plans by the
         strides of q, k and v alone, and takes for granted that y lies in the order of q.
  flash  heads of more than 192 elements on data-centre GPUs only: others have no gradient of them,
         which torch looks at only while autograd records.

By default both backward passes add to dq with atomics: not the same bits every run. Under
torch.use_deterministic_algorithms(True) torch chooses flash, which then sums in a fixed order;
under warn_only=True it stays as it is. The forward passes repeat their bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend

from . import core, heads


class Library(NamedTuple):
    """One of torch's attentions."""

    title: str
    forward: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
    """q, k, v, causal, scale → y ``[B, H, Lq, D]``, lse ``[B, H, Lq]`` contiguous float32, both
    in memory of their own."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """grad_y, q, k, v, y, lse, causal, scale → the gradients of q, k, v."""


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten._scaled_dot_product_flash_attention.default(
        q, k, v, 0.0, causal, False, scale=scale
    )
    return found[0], found[1].contiguous()


def _flash_backward(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # no dropout: the state of the generator is not read, but wants to be there
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    found: tuple[Tensor, Tensor, Tensor] = (
        torch.ops.aten._scaled_dot_product_flash_attention_backward.default(
            grad_y, q, k, v, y, lse, None, None, q.shape[2], k.shape[2], 0.0, causal,
            state, torch.empty((), dtype=torch.uint64, device=q.device), scale=scale,
        )
    )  # fmt: skip
    return found


def _cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
        _in_order(q), k, v, None, True, 0.0, causal, False, scale=scale
    )
    return found[0], found[1].reshape(q.shape[:3])  # [B, H, Lq, 1] since torch 2.9


def _cudnn_backward(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_y, q, y = heads.arranged(grad_y), _in_order(q), heads.arranged(y)
    seed, offset = (torch.empty((), dtype=torch.int64, device=q.device) for _ in range(2))
    found: tuple[Tensor, Tensor, Tensor] = (
        torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default(
            grad_y, q, k, v, y, lse.unsqueeze(-1), seed, offset, None, None, None,
            q.shape[2], k.shape[2], 0.0, causal, scale=scale,
        )
    )  # fmt: skip
    return found


def _in_order(q: Tensor) -> Tensor:
    """q, or a copy, such that what torch makes like it lies by tokens."""
    return q if heads.is_by_tokens(torch.empty_like(q, device="meta")) else heads.arranged(q)


FLASH = Library("flash attention", _flash_forward, _flash_backward)
CUDNN = Library("cuDNN attention", _cudnn_forward, _cudnn_backward)


class Choice(NamedTuple):
    """Who attends to a sequence's own keys: torch's ``library``, or None; and why."""

    library: Library | None
    why: str


_forced: Library | None = None


@contextmanager
def forced(library: Library) -> Iterator[None]:
    """``library`` wherever :func:`choose` is asked, for tests: of what it takes they see to."""
    global _forced
    before, _forced = _forced, library
    try:
        yield
    finally:
        _forced = before


def choose(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Choice:
    """What torch would choose for these, as far as it has a log-sum-exp and the head of this file
    allows it. D of every tensor lies side by side; no mask."""
    if _forced is not None:
        return Choice(_forced, "as forced")
    if not q.is_cuda:
        return Choice(None, "Triton's interpreter shows the kernels")
    if torch.version.hip is not None:
        return Choice(None, "torch's attention on AMD was not looked at")
    if q.dtype == torch.float32:
        return Choice(None, "torch's flash and cuDNN attention take no float32")
    d = q.shape[3]
    if d % 8:
        return Choice(None, f"torch's would copy heads of {d} elements, which 8 does not divide")
    asked = SDPAParams(q, k, v, None, 0.0, causal, True)
    flash, cudnn = can_use_flash_attention(asked), can_use_cudnn_attention(asked)
    wide = core.capability(q) in core.kernels("configs").WIDE_ARCHITECTURES
    flash = flash and (d <= 192 or wide)
    picked = -1
    if flash or cudnn:  # else torch might raise
        picked = torch._fused_sdp_choice(
            q, k, v, None, 0.0, causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    if picked == SDPBackend.CUDNN_ATTENTION.value and d <= 128:
        return Choice(CUDNN, "as torch chooses")
    if picked in (SDPBackend.CUDNN_ATTENTION.value, SDPBackend.FLASH_ATTENTION.value) and flash:
        return Choice(FLASH, "as torch chooses")
    return Choice(None, "torch would take neither flash nor cuDNN attention")
