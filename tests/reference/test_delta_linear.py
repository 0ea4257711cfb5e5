"""The specification itself: its written-out backward against autograd, and its algebra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaops.reference import delta_linear as reference
from deltaops.testing import DELTA_LINEAR_CASES, DeltaLinearCase

CASES = pytest.mark.parametrize("case", DELTA_LINEAR_CASES, ids=str)


@CASES
def test_backward_equals_autograd(case: DeltaLinearCase) -> None:
    t = case.tensors(torch.float64)
    leaves = [t.x, *([t.bias] if t.bias is not None else []), *t.a, *t.b]
    for leaf in leaves:
        leaf.requires_grad_()
    y, s = reference.forward(*t.forward_arguments())
    grad_y = case.grad_y(torch.float64)
    want = torch.autograd.grad(y, leaves, grad_y, materialize_grads=True)
    needs = [True, t.bias is not None] + [True] * (2 * len(t.a))
    with torch.no_grad():
        got = reference.backward(*t.backward_arguments(grad_y, s.detach()), needs)
    torch.testing.assert_close(got, list(want), rtol=1e-12, atol=1e-12)


@given(
    m=st.integers(0, 9), n=st.integers(1, 9), k=st.integers(1, 20), r=st.integers(1, 12),
    scaling=st.floats(-4, 4),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_branch_is_the_low_rank_product(m: int, n: int, k: int, r: int, scaling: float) -> None:
    t = DeltaLinearCase(m, n, k, (r,)).tensors(torch.float64)
    y, s = reference.forward(t.x, t.weight, t.bias, t.a, t.b, [scaling], [0.0], None)
    dense = t.x @ (t.weight + scaling * t.b[0] @ t.a[0]).T + t.bias
    torch.testing.assert_close(y, dense)
    torch.testing.assert_close(s, scaling * t.x @ t.a[0].T)


def test_scaling_zero_is_the_frozen_layer() -> None:
    t = DELTA_LINEAR_CASES[0].tensors(torch.float64)
    y, _ = reference.forward(t.x, t.weight, t.bias, t.a, t.b, [0.0], [0.0], None)
    assert torch.equal(y, torch.nn.functional.linear(t.x, t.weight, t.bias))


def test_a_dropped_nan_is_gone() -> None:
    t = DeltaLinearCase(4, 3, 5, (2,), dropout=(1.0,)).tensors(torch.float64)
    t.x[1, 2] = float("nan")
    zero = torch.zeros_like(t.weight)
    y, _ = reference.forward(t.x.nan_to_num(), zero, None, t.a, t.b, [1.0], [1.0], t.seed)
    assert not y.any()
