"""The specification of ``rotary``: against transformers' own, and its backward against autograd."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from deltaops.reference import rotary as reference
from deltaops.testing import ROTARY_CASES, RotaryCase


@pytest.mark.parametrize("case", ROTARY_CASES, ids=str)
def test_it_is_the_embedding_of_llama_and_its_gradient(case: RotaryCase) -> None:
    x, cos, sin = case.tensors(torch.float64)
    grad_y = case.grad_y(torch.float64)
    x.requires_grad_()
    want, _ = apply_rotary_pos_emb(x, x, cos, sin)
    (want_grad,) = torch.autograd.grad(want, x, grad_y)
    with torch.no_grad():
        got = reference.forward(x, cos, sin, False)
        grad = reference.backward(grad_y, cos, sin, False)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, want_grad, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    x, cos, sin = RotaryCase(2, 2, 3, 6).tensors(torch.float64)
    assert torch.autograd.gradcheck(
        lambda t: reference.forward(t, cos, sin, True), x.requires_grad_()
    )


def test_backward_turns_back() -> None:
    x, cos, sin = RotaryCase(2, 3, 5, 8).tensors(torch.float64)
    cos, sin = (torch.cat((t[..., :4], t[..., :4]), -1) for t in (cos, sin))  # as in a model
    there = reference.forward(x, cos, sin, False)
    torch.testing.assert_close(reference.backward(there, cos, sin, False), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_are_rounded_once(dtype: torch.dtype) -> None:
    x, cos, sin = RotaryCase(2, 4, 9, 64).tensors(dtype)
    once = reference.forward(x, cos, sin, False)
    want, _ = apply_rotary_pos_emb(x.float(), x.float(), cos.float(), sin.float())
    assert torch.equal(once, want.to(dtype))
    twice, _ = apply_rotary_pos_emb(x, x, cos, sin)
    assert not torch.equal(once, twice)  # eager torch rounds the products, so there is a choice
    assert reference.backward(x, cos, sin, False).dtype == dtype


@pytest.mark.parametrize("tokens_first", [False, True])
def test_memory_is_as_asked(tokens_first: bool) -> None:
    x, cos, sin = RotaryCase(2, 3, 5, 8, "merged").tensors(torch.float32)
    for t in (
        reference.forward(x, cos, sin, tokens_first),
        reference.backward(x, cos, sin, tokens_first),
    ):
        assert (t.transpose(1, 2) if tokens_first else t).is_contiguous()
