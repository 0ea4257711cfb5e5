"""Prefixes merged into torch's attention, in Triton's interpreter; run by interpreted.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rows import guarded
from torch import Tensor

from deltaops.backends.triton import TritonBackend, library_attention
from deltaops.backends.triton.library_attention import Library
from deltaops.reference import prefix_attention as reference
from deltaops.testing import AttentionCase, PrefixAttentionCase, assert_accurate

FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
ALL = (True,) * 5

CASES = (
    # (case, dtype, wanted): a prefix in one tile and in several, in every layout of the library's
    (PrefixAttentionCase(1, AttentionCase(2, 4, 37, 24, h_kv=2, causal=True)), FULL, ALL),
    (PrefixAttentionCase(70, AttentionCase(1, 2, 35, 40, h_kv=1, causal=True)), BRAIN, ALL),
    (
        PrefixAttentionCase(
            20, AttentionCase(1, 2, 19, 80, h_kv=1, l_kv=33, layout="dense"), wide=True, sliced=True
        ),
        HALF,
        ALL,
    ),
    # not even the last tile is full; parts of the gradients
    (PrefixAttentionCase(5, AttentionCase(16, 2, 1, 8, l_kv=7)), FULL, (0, 0, 0, 1, 1)),
    (
        PrefixAttentionCase(
            40, AttentionCase(1, 4, 33, 16, h_kv=2, layout="merged", scale=0.5, causal=True)
        ),
        FULL,
        (1, 0, 1, 0, 1),
    ),
    (PrefixAttentionCase(70, AttentionCase(1, 2, 20, 16, causal=True)), FULL, (0, 1, 0, 1, 0)),
)


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, scale=scale
    )
    return y, lse.contiguous()


def _backward(
    grad_y: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    groups = q.shape[1] // k.shape[1]
    each = [t.repeat_interleave(groups, 1) for t in (k, v)]
    grad_q, *grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_y, q, *each, y, lse, 0.0, causal, scale=scale
    )
    grad_k, grad_v = (g.unflatten(1, (-1, groups)).sum(2) for g in grads)
    return grad_q, grad_k, grad_v


LIBRARY = Library("attention on a CPU", _forward, _backward)
"""The ops that a GPU's stand for; of the heads' keys it wants one each."""


def check(number: int, as_modelled: Callable[[Any, str], Any]) -> None:
    """Forward and every gradient against float64, twice, into poisoned memory."""
    case, dtype, needs = CASES[number]
    run, t, grad_y = TritonBackend(), case.tensors(dtype), case.grad_y(dtype)

    def results(forward: Any, backward: Any, t: Any, grad_y: Tensor) -> list[Tensor]:
        y, lse = forward(*t.forward_arguments())
        return [y, lse, *backward(*t.backward_arguments(grad_y, y, lse), needs)]

    kernels = run.prefix_attention_forward, run.prefix_attention_backward
    plain = reference.forward, reference.backward
    with library_attention.forced(LIBRARY), guarded():
        found = as_modelled(lambda: results(*kernels, t, grad_y), str(case))
        again = results(*kernels, t, grad_y)
    oracle = results(*plain, t.to(torch.float64), grad_y.double())
    for i, (got, same, want, low) in enumerate(
        zip(found, again, oracle, results(*plain, t, grad_y), strict=True)
    ):
        # of half types torch has an lse of 20 bits on a CPU: less than a float32 prefix is due
        assert_accurate(got.to(dtype), want, low.to(dtype), f"merged {case}: result {i}")
        assert torch.equal(got, same), f"merged {case}: result {i} changed its bits"
    for got in (found[0], *found[2 : 2 + sum(needs[:3])]):
        assert got.transpose(1, 2).is_contiguous(), f"merged {case}: not by tokens"
