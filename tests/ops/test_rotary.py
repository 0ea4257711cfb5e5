"""The op ``rotary``: against transformers' Llama, its registered twin, what it keeps, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from deltaops.backends import registered
from deltaops.dispatch import explain_call
from deltaops.errors import (
    DeviceError,
    DtypeError,
    GradientError,
    NoBackendError,
    ShapeError,
)
from deltaops.ops import rotary
from deltaops.ops.rotary_autograd import call_of
from deltaops.testing import RotaryCase

LAYOUTS = ["attention", "merged", "dense", "columns"]
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def trainable(case: RotaryCase, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, cos, sin = case.tensors(dtype)
    return x.requires_grad_(), cos, sin


def llama(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y: Tensor = apply_rotary_pos_emb(x, x, cos, sin)[0]
    return y


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "each"])
@layouts
def test_equals_llama_for_queries_and_fewer_keys(layout: str, shared: bool) -> None:
    q, cos, sin = trainable(RotaryCase(2, 6, 9, 16, layout, shared), torch.float32)
    k, _, _ = RotaryCase(2, 2, 9, 16, layout, shared).tensors(torch.float32, seed=5)
    leaves = [q, k.requires_grad_()]
    got = [rotary(t, cos, sin) for t in leaves]
    want = [llama(t.double(), cos.double(), sin.double()) for t in leaves]
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(mine, exact.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(sum(t.square().sum() for t in got), leaves),
        torch.autograd.grad(sum(t.square().sum() for t in want), leaves),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["cpu", "reference"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (1, 3, 1, 8), (2, 1, 5, 8)], ids=str)
@pytest.mark.parametrize("layout", ["attention", "merged", "dense"])
def test_memory_is_ordered_as_eager_torchs(
    layout: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    x, cos, sin = trainable(RotaryCase(*shape, layout), dtype)
    want, got = llama(x, cos, sin), rotary(x, cos, sin)
    wide = [i for i, size in enumerate(shape) if size > 1]
    assert [got.stride(i) for i in wide] == [want.stride(i) for i in wide]
    # the gradient is laid out as x, whatever that of y is like: here as a sum's
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert [grad.stride(i) for i in wide] == [want.stride(i) for i in wide]


def test_gradcheck() -> None:
    x, cos, sin = trainable(RotaryCase(2, 2, 3, 6), torch.float64)
    assert torch.autograd.gradcheck(lambda t: rotary(t, cos, sin), x)


def test_between_a_projection_and_attention() -> None:
    x, weight = torch.randn(2, 5, 16), torch.randn(3 * 16, 16) / 4
    _, cos, sin = RotaryCase(2, 2, 5, 8).tensors(torch.float32)
    results = []
    for turn in (rotary, llama):
        leaf = weight.clone().requires_grad_()
        q, k, v = ((x @ w.T).view(2, 5, 2, 8).transpose(1, 2) for w in leaf.chunk(3))
        y = torch.nn.functional.scaled_dot_product_attention(
            turn(q, cos, sin), turn(k, cos, sin), v
        )
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaf)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("registered_op", [False, True], ids=["eager", "registered"])
def test_keeps_the_tables_alone(registered_op: bool) -> None:
    x, cos, sin = trainable(RotaryCase(2, 3, 5, 8), torch.float32)
    saved: set[int] = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.add(t.data_ptr()) or t, lambda t: t
    ):
        y = torch.ops.deltaops.rotary(x, cos, sin, "cpu") if registered_op else rotary(x, cos, sin)
    assert saved == {cos.data_ptr(), sin.data_ptr()}
    (grad,) = torch.autograd.grad(y.sum(), x)
    (want,) = torch.autograd.grad(rotary(x, cos, sin).sum(), x)
    assert torch.equal(grad, want)


@pytest.mark.parametrize("registered_op", [False, True], ids=["eager", "registered"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@layouts
def test_result_may_be_changed_in_place(layout: str, backend: str, registered_op: bool) -> None:
    x, cos, sin = trainable(RotaryCase(2, 3, 5, 8, layout), torch.float32)
    op = torch.ops.deltaops.rotary
    y = op(x, cos, sin, backend) if registered_op else rotary(x, cos, sin, backend=backend)
    (grad,) = torch.autograd.grad(y.mul_(2).sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(2 * llama(x, cos, sin).sum(), x)[0])


def test_no_grad_and_inference_mode() -> None:
    x, cos, sin = trainable(RotaryCase(2, 3, 5, 8), torch.float32)
    want = rotary(x, cos, sin)
    assert want.requires_grad
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            y = rotary(x, cos, sin)
            assert torch.equal(rotary(x, cos.clone().requires_grad_(), sin), want)
        assert torch.equal(y, want)
        assert not y.requires_grad


@layouts
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float64), ("cpu", torch.float32), ("cpu", torch.bfloat16)],
)
def test_registered_op_passes_opcheck(backend: str, dtype: torch.dtype, layout: str) -> None:
    x, cos, sin = trainable(RotaryCase(2, 3, 5, 8, layout, wide_tables=True), dtype)
    opcheck(torch.ops.deltaops.rotary, (x, cos, sin, backend))
    for tokens_first in (True, False):
        given = (x.detach(), cos, sin, tokens_first, backend)
        opcheck(torch.ops.deltaops.rotary_backward, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["cpu", "reference"])
@layouts
def test_eager_and_compiled_agree(layout: str, dtype: torch.dtype) -> None:
    x, cos, sin = trainable(RotaryCase(2, 3, 5, 8, layout), dtype)
    compiled = torch.compile(lambda *t: rotary(*t).square(), fullgraph=True)
    want, got = rotary(x, cos, sin).square(), compiled(x, cos, sin)
    torch.testing.assert_close(got, want)
    assert got.stride() == want.stride()
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), x)
    )


def test_one_compilation_serves_every_length() -> None:
    compiled = torch.compile(lambda *t: rotary(*t).square(), fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for b, h, l in ((2, 3, 5), (3, 3, 7), (2, 4, 9)):  # noqa: E741
            x, cos, sin = trainable(RotaryCase(b, h, l, 8), torch.float32)
            want, got = rotary(x, cos, sin).square(), compiled(x, cos, sin)
            assert got.stride() == want.stride()
            grads = (torch.autograd.grad(t.sum(), x) for t in (got, want))
            torch.testing.assert_close((got, *next(grads)), (want, *next(grads)))


@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 0, 5, 8), (2, 3, 0, 8), (1, 1, 1, 2)])
def test_small_and_empty(shape: tuple[int, int, int, int]) -> None:
    x, cos, sin = trainable(RotaryCase(*shape), torch.float32)
    y = rotary(x, cos, sin)
    assert y.shape == shape
    torch.testing.assert_close(y, llama(x, cos, sin))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


def test_autocast_changes_nothing() -> None:
    x, cos, sin = RotaryCase(2, 3, 5, 8).tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rotary(x, cos, sin), rotary(x, cos, sin, backend="cpu"))
        assert rotary(x, cos, sin).dtype == torch.float32
        assert rotary(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_transforms_run_the_reference() -> None:
    x, cos, sin = RotaryCase(6, 3, 5, 8).tensors(torch.float32)
    each = torch.vmap(rotary, in_dims=(0, None, None))(x.view(3, 2, 3, 5, 8), cos, sin)
    torch.testing.assert_close(each.flatten(0, 1), rotary(x, cos, sin))
    got = torch.func.grad(lambda t: rotary(t, cos, sin).square().sum())(x)
    torch.testing.assert_close(got, torch.func.grad(lambda t: llama(t, cos, sin).square().sum())(x))
    with pytest.raises(NoBackendError, match=r"rotary: under torch\.func transforms"):
        torch.func.grad(lambda t: rotary(t, cos, sin, strict=True).sum())(x)


def test_second_order_is_refused() -> None:
    x, cos, sin = trainable(RotaryCase(2, 3, 5, 8), torch.float32)
    y = rotary(x, cos, sin)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    y = torch.ops.deltaops.rotary(x, cos, sin, "cpu")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(GradientError, match="first order"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_tables_that_want_a_gradient_are_refused(name: str) -> None:
    x, cos, sin = RotaryCase(2, 3, 5, 8).tensors(torch.float32)
    (cos if name == "cos" else sin).requires_grad_()
    message = rf"no gradient, and {name} requires one\. Pass {name}\.detach\(\)"
    with pytest.raises(GradientError, match=message):
        rotary(x, cos, sin)
    with pytest.raises(GradientError, match=message):
        torch.ops.deltaops.rotary(x, cos, sin, "cpu")
    assert not rotary(x, cos.detach(), sin.detach()).requires_grad


X, C = torch.randn(2, 3, 5, 8), torch.randn(1, 5, 8)
SHAPE, DTYPE = ShapeError, DtypeError
REFUSED = {
    "three-dimensions": (SHAPE, r"x must be \[B, H, L, D\].*got \[3, 5, 8\]", (X[0], C, C), {}),
    "odd": (SHAPE, r"D even and at least 2, got \[2, 3, 5, 7\]", (X[..., 1:], C, C), {}),
    "no-columns": (SHAPE, "at least 2", (X[..., :0], C[..., :0], C[..., :0]), {}),
    "tokens": (SHAPE, r"here \[2 or 1, 5, 8\], got \[1, 4, 8\]", (X, C[:, 1:], C[:, 1:]), {}),
    "width": (SHAPE, r"got \[1, 5, 4\]", (X, C[..., :4], C[..., :4]), {}),
    "batch": (SHAPE, r"got \[3, 5, 8\]", (X, C.expand(3, -1, -1), C.expand(3, -1, -1)), {}),
    "heads": (SHAPE, r"got \[1, 1, 5, 8\]", (X, C[None], C[None]), {}),
    "sin": (SHAPE, r"sin must be \[1, 5, 8\], as cos is, got \[2, 5, 8\]",
            (X, C, C.expand(2, -1, -1)), {}),
    "integers": (DTYPE, "x must be floating point", (X.long(), C, C), {}),
    "wider": (DTYPE, r"cos must be torch\.float32, as x is, .*got torch\.float64",
              (X, C.double(), C.double()), {}),
    "narrower": (DTYPE, r"got torch\.bfloat16", (X, C.bfloat16(), C.bfloat16()), {}),
    "two-dtypes": (DTYPE, "cos and sin must share a dtype", (X.bfloat16(), C, C.bfloat16()), {}),
    "cos-device": (DeviceError, "cos must be on the device of x, cpu, got meta",
                   (X, C.to("meta"), C), {}),
    "sin-device": (DeviceError, "sin must be on the device of x", (X, C, C.to("meta")), {}),
    "backend": (NoBackendError, "must be one of", (X, C, C), {"backend": "cpuu"}),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "given", "named"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(
    error: type[Exception], message: str, given: tuple[Tensor, ...], named: dict[str, object]
) -> None:
    with pytest.raises(error, match=message):
        rotary(*given, **named)


def test_dispatch_says_why() -> None:
    wide = X.double(), C.double(), C.double()
    with pytest.raises(NoBackendError, match=r"rotary: .*\n.*\n.*not torch\.float64"):
        rotary(*wide, backend="cpu")
    with pytest.raises(NoBackendError, match="strict=True"):
        rotary(*wide, strict=True)
    assert rotary(X, C, C, strict=True).shape == X.shape
    call = call_of(X, C)
    assert str(explain_call(call)).startswith("rotary B=2 H=3 L=5 D=8 torch.float32 on cpu → cpu")
    assert explain_call(call_of(X.half(), C)).chosen == "reference"
    on_gpu, triton = call._replace(device="cuda"), registered()["triton"]
    assert triton.unsupported(on_gpu) is None
    assert "not torch.float64" in str(triton.unsupported(on_gpu._replace(dtype=torch.float64)))
    assert triton.unsupported(on_gpu._replace(h=65535 * 8)) is None
    assert "at most 524280 heads" in str(triton.unsupported(on_gpu._replace(h=65535 * 8 + 1)))
