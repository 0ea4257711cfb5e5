"""The op ``attention``: against torch's own, its registered twin, what it keeps, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from deltaops.backends import AttentionCall, registered
from deltaops.dispatch import explain_call
from deltaops.errors import (
    ConfigError,
    DeviceError,
    DtypeError,
    GradientError,
    NoBackendError,
    ShapeError,
)
from deltaops.ops import attention, rotary
from deltaops.testing import AttentionCase

SETTINGS = {
    "plain": AttentionCase(2, 3, 7, 8),
    "causal": AttentionCase(2, 3, 7, 8, causal=True),
    "masked": AttentionCase(2, 3, 7, 8, mask="shared"),
    "shared-heads": AttentionCase(2, 6, 7, 8, h_kv=2, causal=True),
    "keys-ahead": AttentionCase(2, 4, 5, 8, h_kv=2, l_kv=9, mask="rows", layout="merged"),
    "dense": AttentionCase(2, 3, 7, 8, layout="dense"),
    "columns": AttentionCase(2, 3, 7, 8, layout="columns", scale=0.4),
}
settings = pytest.mark.parametrize("case", SETTINGS.values(), ids=SETTINGS)
both = pytest.mark.parametrize("registered_op", [False, True], ids=["eager", "registered"])
anyone = pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
BACKENDS = [("reference", torch.float64), ("cpu", torch.float32), ("cpu", torch.bfloat16)]


def leaves_of(case: AttentionCase, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v that want gradients, and the settings."""
    given = case.tensors(dtype)
    leaves = [t.requires_grad_() for t in (given.q, given.k, given.v)]
    return leaves, {"mask": given.mask, "causal": given.causal, "scale": given.scale}


def torchs(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    return scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True
    )


def positional(leaves: list[Tensor], given: dict[str, Any], backend: str) -> tuple[Any, ...]:
    """The arguments of the registered op."""
    return (*leaves, given["mask"], given["scale"], given["causal"], backend)


@anyone
@settings
def test_equals_torchs(case: AttentionCase, backend: str) -> None:
    leaves, given = leaves_of(case, torch.float32)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    got, want = attention(*leaves, **given, backend=backend), torchs(*exact, **given)
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(got.square().sum(), leaves)
    wanted = torch.autograd.grad(want.square().sum(), exact)
    for mine, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 5, 5), (1, 3, 5, 5), (1, 1, 1, 5), (2, 3, 5, 1)], ids=str)
def test_masks_are_broadcast_and_not_copied(shape: tuple[int, ...]) -> None:
    (q, k, v), _ = leaves_of(AttentionCase(2, 3, 5, 8), torch.float32)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.data_ptr()) or t, lambda t: t
    ):
        got = attention(q, k, v, mask=mask, backend="cpu")
    torch.testing.assert_close(got, torchs(q, k, v, mask, False, None), rtol=1e-5, atol=1e-6)
    assert mask.data_ptr() in saved


@anyone
@settings
def test_results_lie_as_projections_read_them(case: AttentionCase, backend: str) -> None:
    leaves, given = leaves_of(case, torch.float32)
    y = attention(*leaves, **given, backend=backend)
    assert y.transpose(1, 2).is_contiguous()
    assert y.transpose(1, 2).contiguous().data_ptr() == y.data_ptr()
    assert not y._is_view()
    if backend != "auto":  # torch has its own order
        for grad in torch.autograd.grad(y.sum(), leaves):
            assert grad.transpose(1, 2).is_contiguous()


@anyone
def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient(backend: str) -> None:
    (q, k, v), given = leaves_of(SETTINGS["masked"], torch.float32)
    blind = ~given["mask"].any(-1)
    assert blind.any()
    y = attention(q, k, v, **given, backend=backend)
    assert torch.equal(y[blind], torch.zeros_like(y[blind]))
    grad_y = torch.where(blind[..., None], 1.0, 0.0).expand_as(y)
    for grad in torch.autograd.grad(y, (q, k, v), grad_y):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradcheck(backend: str) -> None:
    leaves, given = leaves_of(AttentionCase(1, 4, 3, 5, h_kv=2, mask="each"), torch.float64)
    assert torch.autograd.gradcheck(lambda *t: attention(*t, **given, backend=backend), leaves)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_the_wanted_gradients(wanted: tuple[int, ...]) -> None:
    leaves, given = leaves_of(SETTINGS["shared-heads"], torch.float32)
    given["backend"] = "cpu"
    every = torch.autograd.grad(attention(*leaves, **given).square().sum(), leaves)
    some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves)]
    asked = [t for t in some if t.requires_grad]
    grads = torch.autograd.grad(attention(*some, **given).square().sum(), asked)
    assert all(torch.equal(mine, every[i]) for mine, i in zip(grads, wanted, strict=True))


@both
def test_keeps_no_scores(registered_op: bool) -> None:
    leaves, given = leaves_of(SETTINGS["masked"], torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        if registered_op:
            y, _ = torch.ops.deltaops.attention(*positional(leaves, given, "cpu"))
        else:
            y = attention(*leaves, **given, backend="cpu")
    known = {t.data_ptr() for t in (*leaves, y, given["mask"])}
    more = [t for t in saved if t.data_ptr() not in known]
    assert [(t.shape, t.dtype) for t in more] == [(y.shape[:3], torch.float32)]
    got = torch.autograd.grad(y.sum(), leaves)
    want = torch.autograd.grad(attention(*leaves, **given, backend="cpu").sum(), leaves)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@both
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_result_may_be_changed_in_place_where_no_gradient_needs_it(
    backend: str, registered_op: bool
) -> None:
    leaves, given = leaves_of(SETTINGS["causal"], torch.float32)
    with torch.no_grad():
        want = 2 * attention(*leaves, **given, backend=backend)
        if registered_op:
            y, _ = torch.ops.deltaops.attention(*positional(leaves, given, backend))
        else:
            y = attention(*leaves, **given, backend=backend)
        assert torch.equal(y.mul_(2), want)
    y = attention(*leaves, **given, backend=backend).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@anyone
def test_no_grad_and_inference_mode(backend: str) -> None:
    leaves, given = leaves_of(SETTINGS["causal"], torch.float32)
    given["backend"] = backend
    want = attention(*leaves, **given)
    assert want.requires_grad
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            y = attention(*leaves, **given)
        assert torch.equal(y, want)
        assert not y.requires_grad


@anyone
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(reentrant: bool, backend: str) -> None:
    leaves, given = leaves_of(SETTINGS["causal"], torch.float32)
    given["backend"] = backend

    def run(*t: Tensor) -> Tensor:
        return attention(*t, **given)

    y = checkpoint(run, *leaves, use_reentrant=reentrant)
    y.square().sum().backward()
    want = torch.autograd.grad(attention(*leaves, **given).square().sum(), leaves)
    assert all(torch.equal(t.grad, g) for t, g in zip(leaves, want, strict=True))


@settings
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_registered_op_passes_opcheck(
    backend: str, dtype: torch.dtype, case: AttentionCase
) -> None:
    leaves, given = leaves_of(case, dtype)
    opcheck(torch.ops.deltaops.attention, positional(leaves, given, backend))
    with torch.no_grad():
        arguments = positional([t.detach() for t in leaves], given, backend)
        y, lse = torch.ops.deltaops.attention(*arguments)
    q, k, v, mask, scale, causal, _ = arguments
    for needs in ([True] * 3, [False, True, False]):
        given_back = (y, q, k, v, y, lse, mask, scale, causal, needs, backend)
        opcheck(torch.ops.deltaops.attention_backward, given_back)


@anyone
@settings
def test_eager_and_compiled_agree(case: AttentionCase, backend: str) -> None:
    torch._dynamo.reset()  # the same lambda for all: it counts how often that is compiled
    leaves, given = leaves_of(case, torch.float32)
    given["backend"] = backend
    compiled = torch.compile(lambda *t: attention(*t, **given).square(), fullgraph=True)
    want, got = attention(*leaves, **given).square(), compiled(*leaves)
    torch.testing.assert_close(got, want)
    assert got.stride() == want.stride()
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves)
    )


def test_one_compilation_serves_every_length() -> None:
    compiled = torch.compile(
        lambda *t: attention(*t, causal=True, backend="cpu").square(), fullgraph=True, dynamic=True
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for b, h, length in ((2, 3, 5), (3, 3, 7), (2, 4, 9)):
            leaves, _ = leaves_of(AttentionCase(b, h, length, 8), torch.float32)
            want = attention(*leaves, causal=True, backend="cpu").square()
            got = compiled(*leaves)
            assert got.stride() == want.stride()
            grads = (torch.autograd.grad(t.sum(), leaves) for t in (got, want))
            torch.testing.assert_close((got, *next(grads)), (want, *next(grads)))


@anyone
@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 3, 0, 8), (1, 1, 1, 1)], ids=str)
def test_small_and_empty(shape: tuple[int, int, int, int], backend: str) -> None:
    leaves, _ = leaves_of(AttentionCase(*shape), torch.float32)
    y = attention(*leaves, backend=backend)
    assert y.shape == shape
    y.sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in leaves)


@anyone
def test_without_keys_nothing_is_seen(backend: str) -> None:
    leaves, _ = leaves_of(AttentionCase(2, 3, 5, 8, l_kv=0), torch.float32)
    y = attention(*leaves, backend=backend)
    assert torch.equal(y, torch.zeros(2, 3, 5, 8))
    assert torch.equal(torch.autograd.grad(y.sum(), leaves)[0], torch.zeros(2, 3, 5, 8))


@anyone
def test_autocast_changes_nothing(backend: str) -> None:
    (q, k, v), given = leaves_of(SETTINGS["causal"], torch.float32)
    given["backend"] = backend
    with torch.autocast("cpu", torch.bfloat16):
        want = attention(q, k, v, **given)
        assert want.dtype == torch.float32
        narrow = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **given)
        assert narrow.dtype == torch.bfloat16
    assert torch.equal(attention(q, k, v, **given), want)


def test_transforms_run_the_reference() -> None:
    (q, k, v), given = leaves_of(AttentionCase(6, 4, 5, 8, h_kv=2, mask="shared"), torch.float32)
    q, k, v = (t.detach() for t in (q, k, v))
    mask = given["mask"]

    def split(t: Tensor) -> Tensor:
        return t.view(3, 2, *t.shape[1:])

    each = torch.vmap(lambda q, k, v, mask: attention(q, k, v, mask=mask))(
        *(split(t) for t in (q, k, v, mask[:, :1]))
    )
    torch.testing.assert_close(each.flatten(0, 1), attention(q, k, v, mask=mask))
    got = torch.func.grad(lambda t: attention(t, k, v, mask=mask).square().sum())(q)
    want = torch.func.grad(lambda t: torchs(t, k, v, mask, False, None).square().sum())(q)
    torch.testing.assert_close(got, want)
    with pytest.raises(NoBackendError, match=r"attention: under torch\.func transforms"):
        torch.func.grad(lambda t: attention(t, k, v, strict=True).sum())(q)


def test_second_order_is_refused() -> None:
    leaves, given = leaves_of(SETTINGS["causal"], torch.float32)
    y = attention(*leaves, **given, backend="cpu")
    (grad,) = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    y, lse = torch.ops.deltaops.attention(*positional(leaves, given, "reference"))
    assert not lse.requires_grad
    (grad,) = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(GradientError, match="first order"):
        grad.sum().backward()


Q, K, M = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.ones(2, 1, 5, 5, dtype=torch.bool)
SHAPE, DTYPE, DEVICE = ShapeError, DtypeError, DeviceError
REFUSED = {
    "three-dimensions": (SHAPE, r"q must be \[B, H, Lq, D\].*got \[4, 5, 8\]", (Q[0], K, K), {}),
    "no-columns": (SHAPE, "D ≥ 1", (Q[..., :0], K[..., :0], K[..., :0]), {}),
    "batch": (SHAPE, r"here \[2, Hkv, Lk, 8\], got \[1, 2, 5, 8\]", (Q, K[:1], K[:1]), {}),
    "width": (SHAPE, r"got \[2, 2, 5, 4\]", (Q, K[..., :4], K[..., :4]), {}),
    "heads": (SHAPE, "multiple of those of k, got 4 and 3", (Q, Q[:, :3], Q[:, :3]), {}),
    "no-heads": (SHAPE, "got 4 and 0", (Q, K[:, :0], K[:, :0]), {}),
    "values": (SHAPE, r"v must be \[2, 2, 5, 8\], as k is", (Q, K, K[:, :, :4]), {}),
    "causal": (SHAPE, "as many queries as keys, got 4 and 5", (Q[:, :, :4], K, K),
               {"causal": True}),
    "mask": (SHAPE, r"here \[2 or 1, 4 or 1, 5 or 1, 5 or 1\], got \[2, 2, 5, 5\]", (Q, K, K),
             {"mask": M.expand(2, 2, 5, 5)}),
    "flat-mask": (SHAPE, r"got \[5, 5\]", (Q, K, K), {"mask": M[0, 0]}),
    "numbers": (DTYPE, r"mask must be torch\.bool.*got torch\.float32", (Q, K, K),
                {"mask": M.float()}),
    "integers": (DTYPE, "q must be floating point", (Q.long(), K, K), {}),
    "k-dtype": (DTYPE, r"k must be torch\.float32, as q is, got torch\.bfloat16",
                (Q, K.bfloat16(), K), {}),
    "v-dtype": (DTYPE, r"v must be torch\.float32", (Q, K, K.double()), {}),
    "k-device": (DEVICE, "k must be on the device of q, cpu, got meta", (Q, K.to("meta"), K), {}),
    "mask-device": (DEVICE, "mask must be on the device of q", (Q, K, K), {"mask": M.to("meta")}),
    "scale": (ConfigError, "scale must be finite, got inf", (Q, K, K), {"scale": float("inf")}),
    "backend": (NoBackendError, "must be one of", (Q, K, K), {"backend": "cpuu"}),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "given", "named"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(
    error: type[Exception], message: str, given: tuple[Tensor, ...], named: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        attention(*given, **named)


def test_dispatch_says_why() -> None:
    wide = Q.double(), K.double(), K.double()
    with pytest.raises(NoBackendError, match=r"attention: .*\n.*\n.*not torch\.float64"):
        attention(*wide, backend="cpu")
    with pytest.raises(NoBackendError, match="strict=True"):
        attention(*wide, strict=True)
    assert attention(Q, K, K, strict=True).shape == Q.shape
    call = AttentionCall.of(Q, K, M, True)._replace(l_q=48, l_kv=48)
    want = "attention B=2 H=4/2 L=48 D=8 causal masked torch.float32 on cpu → cpu"
    assert str(explain_call(call)).startswith(want)
    assert explain_call(call._replace(dtype=torch.float16)).chosen == "reference"
    reason = registered()["triton"].unsupported(call._replace(device="cuda"))
    assert reason == "has no kernel for attention yet"


def test_torchs_own_runs_where_it_is_faster_and_the_explanation_says_so() -> None:
    call = AttentionCall.of(Q, K, None, False)
    told = explain_call(call)
    assert told.chosen == "reference"
    assert "scaled_dot_product_attention is faster below 48 queries, here 5" in told.reason
    assert explain_call(call, strict=True).chosen == explain_call(call, "cpu").chosen == "cpu"
    assert explain_call(call._replace(l_q=48)).chosen == "cpu"
    narrow = call._replace(dtype=torch.bfloat16)
    assert "below 48 keys" in explain_call(narrow).reason
    assert explain_call(narrow._replace(l_kv=48)).chosen == "cpu"
    leaf = Q.clone().requires_grad_()
    y, strict = attention(leaf, K, K), attention(leaf, K, K, strict=True)
    assert "AttentionFunction" not in str(y.grad_fn)
    assert "AttentionFunction" in str(strict.grad_fn)
    torch.testing.assert_close(y, strict)
    both = {"mask": M.tril(), "causal": True}  # torch takes one of them
    torch.testing.assert_close(attention(Q, K, K, **both), attention(Q, K, K, causal=True))


def angles_of(leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
    _, _, length, width = leaves[0].shape
    both = torch.randn(2, 1, length, width, generator=torch.Generator().manual_seed(4))
    cos, sin = both.to(leaves[0].dtype)
    return cos, sin


@anyone
@pytest.mark.parametrize("name", ["plain", "causal", "shared-heads", "columns"])
def test_tables_turn_queries_and_keys_first(name: str, backend: str) -> None:
    leaves, given = leaves_of(SETTINGS[name], torch.float32)
    tables = angles_of(leaves)
    given["backend"] = backend
    q, k, v = leaves
    got = attention(q, k, v, tables=tables, **given)
    want = attention(*[rotary(t, *tables, backend=backend) for t in (q, k)], v, **given)
    torch.testing.assert_close(got, want)
    grads = (torch.autograd.grad(y.square().sum(), leaves) for y in (got, want))
    torch.testing.assert_close(*grads)


def test_turned_ones_are_not_kept() -> None:
    leaves, given = leaves_of(SETTINGS["causal"], torch.float32)
    tables = angles_of(leaves)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = attention(*leaves, tables=tables, **given, backend="cpu")
    known = {t.data_ptr() for t in (*leaves, *tables, y)}
    assert [t.shape for t in saved if t.data_ptr() not in known] == [y.shape[:3]]
    assert not any([fn and fn.name().startswith("Rotary") for fn, _ in y.grad_fn.next_functions])


def test_tables_compile_and_transform_as_two_ops() -> None:
    leaves, given = leaves_of(SETTINGS["causal"], torch.float32)
    tables = angles_of(leaves)
    want = attention(*leaves, tables=tables, **given)
    compiled = torch.compile(lambda *t: attention(*t, tables=tables, **given), backend="eager")
    torch.testing.assert_close(compiled(*leaves), want)
    q, k, v = (t.detach() for t in leaves)
    one = torch.func.vmap(lambda q: attention(q[None], k[:1], v[:1], tables=tables, **given)[0])(q)
    torch.testing.assert_close(one[:1], want[:1].detach())


def test_tables_of_other_tokens_are_refused() -> None:
    (q, k, v), _ = leaves_of(SETTINGS["keys-ahead"], torch.float32)
    with pytest.raises(ShapeError, match=r"cos must be \[B or 1, L, D\], here \[2 or 1, 9, 8\]"):
        attention(q, k, v, tables=angles_of([q]), backend="cpu")
