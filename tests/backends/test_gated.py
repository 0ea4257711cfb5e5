"""Every backend of ``gated`` that is ready here, against the float64 reference and torch."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from deltaops.backends import GatedBackend, GatedCall, registered
from deltaops.reference import gated as reference
from deltaops.reference.activation import ACTIVATIONS
from deltaops.testing import GATED_CASES, GatedCase, assert_accurate

ON_CPU = GatedCall("cpu", torch.float32, 1, 1, "silu")
BACKENDS = [
    name
    for name, backend in registered().items()
    if name != "reference" and not backend.unsupported(ON_CPU) and not backend.unavailable()
]
FLOATS = (torch.float32, torch.bfloat16)
TORCHS = {
    "identity": lambda h: h,
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": lambda h: gelu(h, approximate="tanh"),
    "silu": silu,
}
NAN, INFINITY = float("nan"), float("inf")
every = pytest.mark.parametrize("backend", BACKENDS)
cases = pytest.mark.parametrize("case", GATED_CASES, ids=str)
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


def named(backend: str) -> GatedBackend:
    return cast(GatedBackend, registered()[backend])


def test_the_native_core_is_here() -> None:
    assert "cpu" in BACKENDS, registered()["cpu"].unavailable()


@every
@cases
@dtypes
def test_forward_and_gradients_match_fp64_reference(
    backend: str, case: GatedCase, dtype: torch.dtype
) -> None:
    gate, up = case.tensors(dtype)
    grad_y, needs, run = case.grad_y(dtype), [True, True], named(backend)
    got = [
        run.gated_forward(gate, up, case.activation),
        *run.gated_backward(grad_y, gate, up, case.activation, needs),
    ]
    wide = gate.double(), up.double()
    oracle = [
        reference.forward(*wide, case.activation),
        *reference.backward(grad_y.double(), *wide, case.activation, needs),
    ]
    low = [
        reference.forward(gate, up, case.activation),
        *reference.backward(grad_y, gate, up, case.activation, needs),
    ]
    for name, *results in zip(("y", "grad_gate", "grad_up"), got, oracle, low, strict=True):
        assert_accurate(*results, name)


@every
@activations
@dtypes
def test_rounded_once(backend: str, activation: str, dtype: torch.dtype) -> None:
    """Element by element: as near as half a unit in the last place, and float's own errors."""
    gate, up = GatedCase(37, 111, spread=3.0).tensors(dtype)
    got = named(backend).gated_forward(gate, up, activation).double()
    want = reference.forward(gate.double(), up.double(), activation)
    half, few = 2.0 ** (-8 if dtype == torch.bfloat16 else -24), 3e-6
    torch.testing.assert_close(got, want, rtol=half + few, atol=1e-7)


@every
@cases
@dtypes
def test_same_bits_again_for_any_team_inputs_unchanged_all_written(
    backend: str, case: GatedCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, up = case.tensors(dtype)
    grad_y, run = case.grad_y(dtype), named(backend)
    before, original = (gate.clone(), up.clone(), grad_y.clone()), torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        return original(*args, **kwargs).fill_(NAN)

    monkeypatch.setattr(torch, "empty", poisoned)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            grads = run.gated_backward(grad_y, gate, up, case.activation, [True, True])
            results.append([run.gated_forward(gate, up, case.activation), *grads])
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*results, strict=True):
        assert not first.isnan().any()
        assert all(torch.equal(first, other) for other in others)
    assert all(torch.equal(*pair) for pair in zip(before, (gate, up, grad_y), strict=True))


@every
@dtypes
@pytest.mark.parametrize("layout", ["merged", "columns", "expanded"])
def test_strides_change_no_bit(backend: str, layout: str, dtype: torch.dtype) -> None:
    case, run = (
        GatedCase(19, 37, layout="merged" if layout == "expanded" else layout),
        named(backend),
    )
    gate, up = case.tensors(dtype)
    grad_y = case.grad_y(dtype)
    if layout == "expanded":  # as the gradient of a sum comes: rows of stride 0
        gate, grad_y = gate[:1].expand(19, 37), grad_y[:1, :1].expand(19, 37)
    dense = gate.contiguous(), up.contiguous()
    assert torch.equal(run.gated_forward(gate, up, "silu"), run.gated_forward(*dense, "silu"))
    strided = run.gated_backward(grad_y, gate, up, "silu", [True, True])
    plain = run.gated_backward(grad_y.contiguous(), *dense, "silu", [True, True])
    assert all(torch.equal(*pair) for pair in zip(strided, plain, strict=True))


def test_halves_of_a_merged_projection_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up = GatedCase(19, 37, layout="merged").tensors(torch.float32)

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("copied")

    monkeypatch.setattr(Tensor, "contiguous", refuse)
    run = named("cpu")
    y = run.gated_forward(gate, up, "silu")
    assert len(run.gated_backward(y, gate, up, "silu", [True, True])) == 2


@every
@activations
@dtypes
@pytest.mark.parametrize("k", [1, 37, 600])
def test_an_activation_alone_is_one_times_it(
    backend: str, activation: str, dtype: torch.dtype, k: int
) -> None:
    gate, up = GatedCase(19, k, layout="merged").tensors(dtype)
    run, ones = named(backend), torch.ones_like(up)
    if run.unsupported(ON_CPU._replace(alone=True)):
        pytest.skip("it has none, and says so")
    y = run.gated_forward(gate, None, activation)
    assert torch.equal(y, run.gated_forward(gate, ones, activation))
    assert_accurate(
        y,
        reference.forward(gate.double(), None, activation),
        reference.forward(gate, None, activation),
        "y",
    )
    grad_y = GatedCase(19, k).grad_y(dtype)
    (got,) = run.gated_backward(grad_y, gate, None, activation, [True, False])
    assert torch.equal(got, run.gated_backward(grad_y, gate, ones, activation, [True, False])[0])
    (want,) = reference.backward(grad_y.double(), gate.double(), None, activation, [True, False])
    (low,) = reference.backward(grad_y, gate, None, activation, [True, False])
    assert_accurate(got, want, low, "grad_gate")


@every
@dtypes
@pytest.mark.parametrize("wanted", range(2), ids=["gate", "up"])
def test_each_gradient_alone(backend: str, wanted: int, dtype: torch.dtype) -> None:
    case, run = GatedCase(50, 337, "gelu"), named(backend)
    gate, up = case.tensors(dtype)
    grad_y = case.grad_y(dtype)
    everything = run.gated_backward(grad_y, gate, up, "gelu", [True, True])
    saved = up if wanted == 0 else None  # up is kept for the gradient of gate alone
    (got,) = run.gated_backward(grad_y, gate, saved, "gelu", [wanted == 0, wanted == 1])
    assert torch.equal(got, everything[wanted])
    assert run.gated_backward(grad_y, gate, None, "gelu", [False, False]) == []


def gelu_as_written(h: Tensor) -> Tensor:
    """torch's own gives NaN for infinity where it runs AVX-512 code, and infinity elsewhere."""
    return h * (1 + torch.erf(h / 2**0.5)) / 2


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@activations
@dtypes
@pytest.mark.parametrize("width", [1, 40], ids=["tail", "vectors"])
def test_extreme_values_give_what_torch_gives(
    backend: str, activation: str, dtype: torch.dtype, width: int
) -> None:
    extreme = [INFINITY, -INFINITY, NAN, 0.0, -0.0, 1e4, -1e4, 1e18, -1e18, 89.0, -89.0, 130.0]
    gate = torch.tensor(extreme, dtype=dtype)[:, None].expand(-1, width).contiguous()
    up = torch.full_like(gate, 0.75)
    leaves = gate.float().requires_grad_(), up.float().requires_grad_()
    exact = activation == "gelu" and backend != "reference"
    y = (gelu_as_written if exact else TORCHS[activation])(leaves[0]) * leaves[1]
    want = [y.detach(), *torch.autograd.grad(y.sum(), leaves)]
    run = named(backend)
    got = [
        run.gated_forward(gate, up, activation),
        *run.gated_backward(torch.ones_like(gate), gate, up, activation, [True, True]),
    ]
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(
            mine, theirs.to(dtype), equal_nan=True, rtol=1e-6 if dtype == torch.float32 else 2**-8,
            atol=1e-30,
        )  # fmt: skip
    assert got[0][1].isnan().all() == (activation not in ("identity", "relu"))


@every
def test_not_a_number_stays_where_it_is(backend: str) -> None:
    gate, up = GatedCase(20, 33).tensors(torch.float32)
    gate[3, 5], up[7, 2] = NAN, NAN
    run = named(backend)
    y = run.gated_forward(gate, up, "silu")
    grad_gate, grad_up = run.gated_backward(torch.ones(20, 33), gate, up, "silu", [True, True])
    assert y.isnan().nonzero().tolist() == [[3, 5], [7, 2]]
    assert grad_gate.isnan().nonzero().tolist() == [[3, 5], [7, 2]]
    assert grad_up.isnan().nonzero().tolist() == [[3, 5]]


@every
def test_algebra(backend: str) -> None:
    gate, up = GatedCase(23, 45).tensors(torch.float32)
    run = named(backend)
    y = run.gated_forward(gate, up, "silu")
    assert torch.equal(run.gated_forward(gate, 2 * up, "silu"), 2 * y)
    assert not run.gated_forward(gate, torch.zeros_like(up), "silu").any()
    assert torch.equal(run.gated_forward(gate, up, "identity"), gate * up)
