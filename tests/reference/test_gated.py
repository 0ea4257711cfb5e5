"""The specification of ``gated``: its written-out backward against autograd, and torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from deltaops.reference import gated as reference
from deltaops.reference.activation import ACTIVATIONS
from deltaops.testing import GATED_CASES, GatedCase


@pytest.mark.parametrize("case", GATED_CASES, ids=str)
def test_backward_equals_autograd(case: GatedCase) -> None:
    leaves = [t.detach().requires_grad_() for t in case.tensors(torch.float64)]
    grad_y = case.grad_y(torch.float64)
    want = torch.autograd.grad(reference.forward(*leaves, case.activation), leaves, grad_y)
    with torch.no_grad():
        got = reference.backward(grad_y, *leaves, case.activation, [True, True])
    torch.testing.assert_close(got, list(want), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str) -> None:
    leaves = [t.requires_grad_() for t in GatedCase(4, 5).tensors(torch.float64)]
    assert torch.autograd.gradcheck(lambda g, u: reference.forward(g, u, activation), leaves)


def test_it_is_the_product_in_llamas_mlp() -> None:
    gate, up = GatedCase(9, 31).tensors(torch.float32)
    assert torch.equal(reference.forward(gate, up, "silu"), silu(gate) * up)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_are_rounded_once(dtype: torch.dtype) -> None:
    gate, up = GatedCase(40, 50).tensors(dtype)
    once = reference.forward(gate, up, "silu")
    assert torch.equal(once, (silu(gate.float()) * up.float()).to(dtype))
    assert not torch.equal(once, silu(gate) * up)  # eager torch rounds twice, so there is a choice
    grads = reference.backward(GatedCase(40, 50).grad_y(dtype), gate, up, "silu", [True, True])
    assert [g.dtype for g in grads] == [dtype, dtype]


def test_up_is_read_for_the_gradient_of_gate_alone() -> None:
    gate, up = GatedCase(3, 4).tensors(torch.float64)
    everything = reference.backward(gate, gate, up, "gelu", [True, True])
    (grad_up,) = reference.backward(gate, gate, None, "gelu", [False, True])
    assert torch.equal(grad_up, everything[1])
    with pytest.raises(ValueError, match="needs up"):
        reference.backward(gate, gate, None, "gelu", [True, True])
