"""The op ``gated``: against eager torch, its registered twin, what it keeps, every refusal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn.functional import silu

from deltaops.backends import registered
from deltaops.dispatch import explain_call
from deltaops.errors import (
    ConfigError,
    DeviceError,
    DtypeError,
    GradientError,
    NoBackendError,
    ShapeError,
)
from deltaops.ops import gated
from deltaops.ops.gated_autograd import call_of
from deltaops.reference.activation import ACTIVATIONS
from deltaops.testing import GatedCase

activations = pytest.mark.parametrize("activation", ACTIVATIONS)


def trainable(case: GatedCase, dtype: torch.dtype) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in case.tensors(dtype)]


@pytest.mark.parametrize("layout", ["apart", "merged"])
def test_equals_eager_torch(layout: str) -> None:
    leaves = trainable(GatedCase(17, 65, layout=layout), torch.float32)
    got, want = gated(*leaves), silu(leaves[0]) * leaves[1]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), leaves),
        torch.autograd.grad(want.square().sum(), leaves),
    )


@activations
def test_gradcheck(activation: str) -> None:
    leaves = trainable(GatedCase(4, 5), torch.float64)
    assert torch.autograd.gradcheck(lambda *t: gated(*t, activation), leaves)
    assert torch.autograd.gradcheck(lambda t: gated(t, None, activation), leaves[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["cpu", "reference"])
def test_without_up_it_is_the_activation(dtype: torch.dtype) -> None:
    leaf = trainable(GatedCase(6, 12, layout="merged"), dtype)[0]
    want = silu(leaf)
    (grad,) = torch.autograd.grad(want.square().sum(), leaf)
    backend = "cpu" if dtype == torch.float32 else "reference"
    for y in (gated(leaf, None), torch.ops.deltaops.gated(leaf, None, "silu", backend)):
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), leaf)[0], grad)
    opcheck(torch.ops.deltaops.gated, (leaf, None, "silu", backend))
    torch.testing.assert_close(torch.vmap(lambda g: gated(g, None))(leaf), want)


def test_through_one_merged_projection() -> None:
    x, weight = torch.randn(2, 5, 16), torch.randn(2 * 24, 16) / 4
    results = []
    for product in (gated, lambda g, u: silu(g) * u):
        leaf = weight.clone().requires_grad_()
        y = product(*(x @ leaf.T).chunk(2, -1))
        assert y.shape == (2, 5, 24)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaf)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", [0, 1], ids=["gate", "up"])
@pytest.mark.parametrize("registered_op", [False, True], ids=["eager", "registered"])
def test_each_gradient_alone_keeps_what_it_reads(registered_op: bool, wanted: int) -> None:
    tensors = list(GatedCase(6, 12).tensors(torch.float32))
    want = torch.autograd.grad(
        gated(*(leaves := [t.clone().requires_grad_() for t in tensors])).sum(), leaves
    )
    tensors[wanted].requires_grad_()
    saved: set[int] = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.add(t.data_ptr()) or t, lambda t: t
    ):
        y = torch.ops.deltaops.gated(*tensors, "silu", "cpu") if registered_op else gated(*tensors)
    assert saved == {t.data_ptr() for t in tensors[: 2 - wanted]}
    (grad,) = torch.autograd.grad(y.sum(), tensors[wanted])
    assert torch.equal(grad, want[wanted])


def test_no_grad_and_inference_mode() -> None:
    leaves = trainable(GatedCase(5, 9), torch.float32)
    want = gated(*leaves)
    assert want.requires_grad
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            y = gated(*leaves)
        assert torch.equal(y, want)
        assert not y.requires_grad


@activations
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float64), ("cpu", torch.float32), ("cpu", torch.bfloat16)],
)
def test_registered_op_passes_opcheck(backend: str, dtype: torch.dtype, activation: str) -> None:
    gate, up = trainable(GatedCase(6, 12, layout="merged"), dtype)
    opcheck(torch.ops.deltaops.gated, (gate, up, activation, backend))
    arguments = torch.ones(6, 12, dtype=dtype), gate.detach()
    for saved, needs in ((up.detach(), [True, True]), (None, [False, True])):
        opcheck(torch.ops.deltaops.gated_backward, (*arguments, saved, activation, needs, backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["cpu", "reference"])
@pytest.mark.parametrize("layout", ["apart", "merged", "columns"])
def test_eager_and_compiled_agree(layout: str, dtype: torch.dtype) -> None:
    leaves = trainable(GatedCase(6, 12, layout=layout), dtype)
    compiled = torch.compile(lambda *t: gated(*t).square(), fullgraph=True)
    want, got = gated(*leaves).square(), compiled(*leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves)
    )


@pytest.mark.parametrize("shape", [(12,), (2, 3, 12), (0, 12), (2, 0, 12)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    gate, up = (torch.randn(shape, requires_grad=True) for _ in range(2))
    y = gated(gate, up)
    assert y.shape == shape
    torch.testing.assert_close(y, silu(gate) * up)
    y.sum().backward()
    assert gate.grad is not None
    assert up.grad is not None
    assert gate.grad.shape == up.grad.shape == shape


def test_autocast_changes_nothing() -> None:
    gate, up = GatedCase(5, 9).tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated(gate, up), gated(gate, up, backend="cpu"))
        assert gated(gate, up).dtype == torch.float32
        assert gated(gate.bfloat16(), up.bfloat16()).dtype == torch.bfloat16


def test_transforms_run_the_reference() -> None:
    gate, up = torch.randn(3, 5, 12), torch.randn(3, 5, 12)
    torch.testing.assert_close(torch.vmap(gated)(gate, up), gated(gate, up))
    got = torch.func.grad(lambda g: gated(g, up[0]).sum())(gate[0])
    torch.testing.assert_close(got, torch.func.grad(lambda g: (silu(g) * up[0]).sum())(gate[0]))
    with pytest.raises(NoBackendError, match=r"gated: under torch\.func transforms"):
        torch.vmap(lambda g, u: gated(g, u, strict=True))(gate, up)


def test_second_order_is_refused() -> None:
    leaves = trainable(GatedCase(5, 9), torch.float32)
    (grad,) = torch.autograd.grad(gated(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    y = torch.ops.deltaops.gated(*leaves, "silu", "cpu")
    (grad,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(GradientError, match="first order"):
        grad.sum().backward()


X = torch.randn(4, 12)
REFUSED = {
    "scalar": (ShapeError, r"gate must be \[\.\.\., K\]", (torch.tensor(1.0),) * 2, {}),
    "no-columns": (ShapeError, "K ≥ 1", (X[:, :0], X[:, :0]), {}),
    "up-width": (ShapeError, r"up must be \[4, 12\], as gate is, got \[4, 11\]", (X, X[:, 1:]), {}),
    "up-broadcast": (ShapeError, r"up must be \[4, 12\]", (X, X[:1]), {}),
    "integers": (DtypeError, "floating point", (X.long(), X.long()), {}),
    "dtypes": (DtypeError, r"share a dtype, got torch\.float32 and torch\.bfloat16",
               (X, X.bfloat16()), {}),
    "device": (DeviceError, "up must be on the device of gate, cpu, got meta",
               (X, X.to("meta")), {}),
    "activation": (ConfigError, "activation must be one of identity, relu, .*got 'swish'",
                   (X, X, "swish"), {}),
    "backend": (NoBackendError, "must be one of", (X, X), {"backend": "cpuu"}),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "given", "named"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(
    error: type[Exception], message: str, given: tuple[Tensor, ...], named: dict[str, object]
) -> None:
    with pytest.raises(error, match=message):
        gated(*given, **named)


def test_dispatch_says_why() -> None:
    wide = X.double()
    with pytest.raises(NoBackendError, match=r"gated: .*\n.*\n.*not torch\.float64"):
        gated(wide, wide, backend="cpu")
    with pytest.raises(NoBackendError, match="strict=True"):
        gated(wide, wide, strict=True)
    assert gated(X, X, strict=True).shape == (4, 12)
    call = call_of(X, X, "silu")
    assert str(explain_call(call)).startswith("gated silu M=4 K=12 torch.float32 on cpu → cpu")
    assert explain_call(call_of(X.half(), X.half(), "silu")).chosen == "reference"
    assert str(explain_call(call_of(X, None, "gelu"))).startswith("gated gelu alone M=4")
    on_gpu, triton = call._replace(device="cuda"), registered()["triton"]
    assert triton.unsupported(on_gpu) is None
    assert "not torch.float64" in str(triton.unsupported(on_gpu._replace(dtype=torch.float64)))
