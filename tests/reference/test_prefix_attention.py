"""The specification of ``prefix_attention``: against torch's own on copies, and autograd's
gradients of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from deltaops.reference import attention
from deltaops.reference import prefix_attention as reference
from deltaops.testing import (
    BIASED_PREFIX_CASES,
    PREFIX_ATTENTION_CASES,
    AttentionCase,
    PrefixAttentionCase,
)

ALL = [True] * 5


@pytest.mark.parametrize("case", [*PREFIX_ATTENTION_CASES, *BIASED_PREFIX_CASES], ids=str)
def test_it_is_torchs_attention_over_copies_and_its_gradients(case: PrefixAttentionCase) -> None:
    given: Any = case.tensors(torch.float64)
    leaves = [t.requires_grad_() for t in given.inputs]
    q, k, v, prefix_k, prefix_v = leaves
    b, h, l_q, _ = q.shape
    seen = torch.ones(b, h, l_q, k.shape[2], dtype=torch.bool)
    if given.rest.mask is not None:
        seen &= given.rest.mask
    if given.rest.causal:
        seen &= torch.ones(l_q, l_q, dtype=torch.bool).tril()
    seen = torch.cat([torch.ones(b, h, l_q, case.prefix, dtype=torch.bool), seen], 3)
    if given.bias is not None:
        added = torch.zeros(seen.shape, dtype=torch.float64)
        added[..., seen.shape[3] - given.bias.shape[3] :] = given.bias
        seen = added.masked_fill(~seen, -torch.inf)
    keys, values = (
        torch.cat([shared[None].repeat(b, 1, 1, 1), own], 2)
        for shared, own in ((prefix_k, k), (prefix_v, v))
    )
    want = scaled_dot_product_attention(
        q, keys, values, seen, scale=given.rest.scale, enable_gqa=True
    )
    grad_y = case.grad_y(torch.float64)
    want_grads = torch.autograd.grad(want, leaves, grad_y)
    with torch.no_grad():
        y, lse = reference.forward(*given.forward_arguments(), **given.more)
        grads = reference.backward(*given.backward_arguments(grad_y, y, lse), ALL, **given.more)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-12)
    for mine, exact, leaf in zip(grads, want_grads, leaves, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-12)
        assert mine.dtype == leaf.dtype


def test_a_prefix_of_nothing_is_attention() -> None:
    given: Any = PrefixAttentionCase(0, AttentionCase(2, 4, 9, 8, h_kv=2, mask="each")).tensors(
        torch.bfloat16
    )
    y, lse = reference.forward(*given.forward_arguments())
    want, want_lse = attention.forward(*given.rest.forward_arguments())
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(lse, want_lse)


def test_only_what_is_wanted_and_each_in_its_dtype() -> None:
    given: Any = PrefixAttentionCase(3, AttentionCase(2, 4, 9, 8, h_kv=2), wide=True).tensors(
        torch.bfloat16
    )
    y, lse = reference.forward(*given.forward_arguments())
    assert y.transpose(1, 2).is_contiguous()
    every = reference.backward(*given.backward_arguments(y, y, lse), ALL)
    assert [g.dtype for g in every] == [torch.bfloat16] * 3 + [torch.float32] * 2
    needs = [False, True, False, False, True]
    some = reference.backward(*given.backward_arguments(y, y, lse), needs)
    wanted = [g for g, need in zip(every, needs, strict=True) if need]
    assert all(torch.equal(*pair) for pair in zip(some, wanted, strict=True))
