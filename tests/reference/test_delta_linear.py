"""The specification itself: its written-out backward against autograd, and its algebra."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from deltaops.reference import delta_linear as reference
from deltaops.reference.activation import ACTIVATIONS, activate, activate_slope
from deltaops.testing import DELTA_LINEAR_CASES, DeltaLinearCase

CASES = pytest.mark.parametrize("case", DELTA_LINEAR_CASES, ids=str)


@CASES
def test_backward_equals_autograd(case: DeltaLinearCase) -> None:
    t = case.tensors(torch.float64)
    leaves = [u for u in (t.x, t.bias, *t.a, *t.b, *t.branch_bias) if u is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    y, s = reference.forward(*t.forward_arguments())
    grad_y = case.grad_y(torch.float64)
    want = torch.autograd.grad(y, leaves, grad_y, materialize_grads=True)
    with torch.no_grad():
        got = reference.backward(*t.backward_arguments(grad_y, s.detach()), t.all_needed())
    torch.testing.assert_close(got, list(want), rtol=1e-12, atol=1e-12)


@given(
    m=st.integers(0, 9), n=st.integers(1, 9), k=st.integers(1, 20), r=st.integers(1, 12),
    scaling=st.floats(-4, 4),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_branch_is_the_low_rank_product(m: int, n: int, k: int, r: int, scaling: float) -> None:
    t = DeltaLinearCase(m, n, k, (r,)).tensors(torch.float64)
    y, s = reference.forward(*replace(t, scaling=[scaling]).forward_arguments())
    dense = t.x @ (t.weight + scaling * t.b[0] @ t.a[0]).T + t.bias
    torch.testing.assert_close(y, dense)
    torch.testing.assert_close(s, scaling * t.x @ t.a[0].T)


def test_scaling_zero_is_the_frozen_layer() -> None:
    t = DELTA_LINEAR_CASES[0].tensors(torch.float64)
    y, _ = reference.forward(*replace(t, scaling=[0.0]).forward_arguments())
    assert torch.equal(y, torch.nn.functional.linear(t.x, t.weight, t.bias))


def test_a_dropped_nan_is_gone() -> None:
    t = DeltaLinearCase(4, 3, 5, (2,), dropout=(1.0,)).tensors(torch.float64)
    t.x[1, 2] = float("nan")
    _, s = reference.forward(*t.forward_arguments())
    assert not s.any()


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_slopes_are_those_of_autograd(kind: str) -> None:
    edges = torch.tensor([-40.0, -0.0, 0.0, 40.0, float("nan")])
    h = torch.cat([torch.linspace(-9, 9, 301), edges]).double().requires_grad_()
    (want,) = torch.autograd.grad(activate(kind, h).sum(), h)
    torch.testing.assert_close(activate_slope(kind, h), want, equal_nan=True)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_parallel_adapter_is_two_linears_and_an_activation(kind: str) -> None:
    case = DeltaLinearCase(9, 7, 12, (5,), activation=(kind,), branch_bias=(True,))
    t = case.tensors(torch.float64)
    y, _ = reference.forward(*t.forward_arguments())
    inner = activate(kind, linear(t.x, t.a[0], t.branch_bias[0]))
    torch.testing.assert_close(y, linear(t.x, t.weight, t.bias) + 2.0 * linear(inner, t.b[0]))
