"""The specification of ``attention``: against torch's own and autograd's gradients of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from deltaops.reference import attention as reference
from deltaops.testing import ATTENTION_CASES, AttentionCase

ALL = [True] * 3
cases = pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)


@cases
def test_it_is_torchs_attention_and_its_gradients(case: AttentionCase) -> None:
    given: Any = case.tensors(torch.float64)
    leaves = [t.requires_grad_() for t in (given.q, given.k, given.v)]
    mask = given.mask
    if given.causal:  # torch takes one or the other
        earlier = torch.ones(case.l_q, case.l_q, dtype=torch.bool).tril()
        mask = earlier if mask is None else mask & earlier
    want = scaled_dot_product_attention(*leaves, mask, scale=given.scale, enable_gqa=True)
    grad_y = case.grad_y(torch.float64)
    want_grads = torch.autograd.grad(want, leaves, grad_y)
    with torch.no_grad():
        y, lse = reference.forward(*given.forward_arguments())
        grads = reference.backward(*given.backward_arguments(grad_y, y, lse), ALL)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-12)
    for mine, exact in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    given: Any = AttentionCase(2, 4, 3, 5, h_kv=2, mask="each").tensors(torch.float64)
    leaves = [t.requires_grad_() for t in (given.q, given.k, given.v)]
    assert torch.autograd.gradcheck(
        lambda *qkv: reference.forward(*qkv, given.mask, given.scale, False)[0], leaves
    )


def test_lse_is_the_logarithm_of_the_sum_over_what_is_seen() -> None:
    given: Any = AttentionCase(2, 3, 7, 4, mask="each").tensors(torch.float64)
    _, lse = reference.forward(*given.forward_arguments())
    scores = (given.scale * given.q @ given.k.mT).exp() * given.mask
    want = scores.sum(-1)
    assert (want == 0).any()
    torch.testing.assert_close(lse, torch.where(want > 0, want.log(), torch.inf))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_are_rounded_once(dtype: torch.dtype) -> None:
    given: Any = AttentionCase(2, 4, 9, 64).tensors(dtype)
    y, lse = reference.forward(*given.forward_arguments())
    wide, wide_lse = reference.forward(*given.to(torch.float32).forward_arguments())
    assert torch.equal(y, wide.to(dtype))
    assert torch.equal(lse, wide_lse)
    grads = reference.backward(*given.backward_arguments(y, y, lse), ALL)
    assert {g.dtype for g in grads} == {dtype}


@cases
def test_memory_is_that_of_tokens_and_no_result_is_a_view(case: AttentionCase) -> None:
    given: Any = case.tensors(torch.float32)
    y, lse = reference.forward(*given.forward_arguments())
    grads = reference.backward(*given.backward_arguments(y, y, lse), ALL)
    for t in (y, *grads):
        assert t.transpose(1, 2).is_contiguous()
        assert not t._is_view()


@pytest.mark.parametrize("needs", [(True, False, True), (False, True, False)], ids=str)
def test_only_what_is_wanted(needs: tuple[bool, ...]) -> None:
    given: Any = AttentionCase(2, 4, 9, 8, h_kv=2).tensors(torch.float32)
    y, lse = reference.forward(*given.forward_arguments())
    every = reference.backward(*given.backward_arguments(y, y, lse), ALL)
    some = reference.backward(*given.backward_arguments(y, y, lse), needs)
    wanted = [g for g, need in zip(every, needs, strict=True) if need]
    assert all(torch.equal(*pair) for pair in zip(some, wanted, strict=True))
