"""The op ``prefix_attention``: against torch's own on copies, its registered twin, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from deltaops.backends import PrefixAttentionCall
from deltaops.backends.triton import TritonBackend
from deltaops.dispatch import explain_call
from deltaops.errors import (
    ConfigError,
    DeviceError,
    DtypeError,
    GradientError,
    NoBackendError,
    ShapeError,
)
from deltaops.ops import attention, prefix_attention
from deltaops.testing import AttentionCase, PrefixAttentionCase

SETTINGS = {
    "plain": PrefixAttentionCase(4, AttentionCase(2, 3, 7, 8)),
    "causal": PrefixAttentionCase(4, AttentionCase(2, 6, 7, 8, h_kv=2, causal=True)),
    "masked": PrefixAttentionCase(3, AttentionCase(2, 3, 7, 8, mask="shared"), sliced=True),
    "biased": PrefixAttentionCase(
        3, AttentionCase(2, 6, 7, 8, h_kv=2, causal=True, mask="rows"), bias="heads"
    ),
    "cache": PrefixAttentionCase(5, AttentionCase(2, 4, 1, 8, h_kv=2, l_kv=9, mask="rows")),
}
settings = pytest.mark.parametrize("case", SETTINGS.values(), ids=SETTINGS)
anyone = pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])


def leaves_of(
    case: PrefixAttentionCase, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v and the prefix, which want gradients, and the settings."""
    given = case.tensors(dtype)
    leaves = [t.requires_grad_() for t in given.inputs]
    rest = given.rest
    return leaves, {
        "mask": rest.mask, "causal": rest.causal, "scale": rest.scale, "bias": given.bias,
    }  # fmt: skip


def torchs(leaves: list[Tensor], given: dict[str, Any]) -> Tensor:
    """As PEFT has it: copies for each sequence, before its own, and a mask that grows."""
    q, k, v, *prefix = leaves
    keys, values = (
        torch.cat([shared.expand(q.shape[0], -1, -1, -1), own], 2)
        for shared, own in zip(prefix, (k, v), strict=True)
    )
    seen = torch.ones(*q.shape[:3], k.shape[2], dtype=torch.bool)
    if given["causal"]:
        seen = seen.tril()
    if given["mask"] is not None:
        seen = seen & given["mask"]
    seen = torch.cat([seen.new_ones(*seen.shape[:3], prefix[0].shape[1]), seen], 3)
    if (bias := given["bias"]) is not None:
        added = torch.zeros(seen.shape, dtype=q.dtype)
        added[..., seen.shape[3] - max(bias.shape[3], k.shape[2]) :] += bias
        seen = added.masked_fill(~seen, -torch.inf)
    return scaled_dot_product_attention(
        q, keys, values, seen, scale=given["scale"], enable_gqa=True
    )


def positional(leaves: list[Tensor], given: dict[str, Any], backend: str) -> tuple[Any, ...]:
    """The arguments of the registered op."""
    return (*leaves, given["mask"], given["scale"], given["causal"], given["bias"], backend)


@anyone
@settings
def test_equals_torchs(case: PrefixAttentionCase, backend: str) -> None:
    leaves, given = leaves_of(case)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    got, want = prefix_attention(*leaves, **given, backend=backend), torchs(exact, given)
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)
    assert got.transpose(1, 2).is_contiguous()
    assert not got._is_view()
    grads = torch.autograd.grad(got.square().sum(), leaves)
    wanted = torch.autograd.grad(want.square().sum(), exact)
    for mine, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-4, atol=1e-5)


@anyone
def test_a_query_that_sees_no_key_sees_the_prefix(backend: str) -> None:
    leaves, given = leaves_of(SETTINGS["masked"])
    blind = ~given["mask"].any(-1)
    assert blind.any()
    y = prefix_attention(*leaves, **given, backend=backend)
    q, _, _, prefix_k, prefix_v = leaves
    alone = [t.expand(q.shape[0], -1, -1, -1) for t in (prefix_k, prefix_v)]
    want = attention(q, *alone, scale=given["scale"], backend="reference")
    torch.testing.assert_close(y[blind], want[blind], rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(y.square().sum(), leaves)
    assert all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("shape", [(2, 1, 5, 5), (1, 1, 1, 5), (2, 3, 5, 1)], ids=str)
@anyone
def test_masks_are_broadcast(shape: tuple[int, ...], backend: str) -> None:
    leaves, given = leaves_of(PrefixAttentionCase(3, AttentionCase(2, 3, 5, 8)))
    given["mask"] = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    got = prefix_attention(*leaves, **given, backend=backend)
    torch.testing.assert_close(got, torchs(leaves, given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 1, 1, 5), (1, 3, 5, 8), (1, 1, 5, 1)], ids=str)
@anyone
def test_biases_are_broadcast_and_frozen(shape: tuple[int, ...], backend: str) -> None:
    leaves, given = leaves_of(PrefixAttentionCase(3, AttentionCase(2, 3, 5, 8)))
    given["bias"] = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    got = prefix_attention(*leaves, **given, backend=backend)
    torch.testing.assert_close(got, torchs(leaves, given), rtol=1e-5, atol=1e-6)
    given["bias"].requires_grad_()
    with pytest.raises(GradientError, match="bias must not require a gradient"):
        prefix_attention(*leaves, **given, backend=backend)
    with torch.no_grad():
        assert torch.equal(prefix_attention(*leaves, **given, backend=backend), got)


@anyone
def test_a_single_key_has_no_stride(backend: str) -> None:
    """Of heads that lie last, as T5's are in its bias."""
    leaves, given = leaves_of(PrefixAttentionCase(3, AttentionCase(2, 4, 5, 8, l_kv=1)))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn((2, 5, 1, 4), generator=generator).permute(0, 3, 1, 2)
    given["bias"], given["mask"] = drawn, drawn > 0
    assert given["mask"].stride(3) == given["bias"].stride(3) == 4
    y = prefix_attention(*leaves, **given, backend=backend)
    torch.testing.assert_close(y, torchs(leaves, given), rtol=1e-5, atol=1e-6)
    q, k, v, *_ = leaves
    y = attention(q, k, v, mask=given["mask"], backend=backend)
    torch.testing.assert_close(y, v * given["mask"], rtol=1e-5, atol=1e-6)


@anyone
def test_a_bias_of_no_key_is_not_that_of_the_prefix(backend: str) -> None:
    leaves, given = leaves_of(PrefixAttentionCase(1, AttentionCase(2, 4, 5, 8, l_kv=0)))
    want = prefix_attention(*leaves, **given, backend=backend)
    given["bias"] = torch.full((1, 1, 1, 1), -torch.inf)
    assert torch.equal(prefix_attention(*leaves, **given, backend=backend), want)


@anyone
def test_a_row_of_the_least_finite_numbers_is_a_mean(backend: str) -> None:
    leaves, given = leaves_of(PrefixAttentionCase(3, AttentionCase(2, 4, 5, 8)))
    given["bias"] = torch.full((1, 1, 5, 8), torch.finfo(torch.float32).min)
    y = prefix_attention(*leaves, **given, backend=backend)
    torch.testing.assert_close(y, torchs(leaves, given), rtol=1e-5, atol=1e-6)


def test_a_wide_bias_is_not_rounded_where_torch_runs() -> None:
    case = PrefixAttentionCase(3, AttentionCase(2, 4, 5, 8))
    given, bias = case.tensors(torch.bfloat16), 100 + torch.rand(1, 4, 5, 5)
    found = [
        prefix_attention(*given.inputs, bias=bias, backend=backend)
        for backend in ("auto", "reference")
    ]
    assert found[0].dtype is torch.bfloat16
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-3)


def test_with_a_cache_token_by_token_is_all_at_once() -> None:
    (q, k, v, *prefix), _ = leaves_of(PrefixAttentionCase(3, AttentionCase(2, 4, 6, 8)))
    whole = prefix_attention(q, k, v, *prefix, causal=True, backend="cpu")
    for i in range(6):
        seen = k[:, :, : i + 1], v[:, :, : i + 1]
        y = prefix_attention(q[:, :, i : i + 1], *seen, *prefix, backend="cpu")
        torch.testing.assert_close(y, whole[:, :, i : i + 1], rtol=1e-5, atol=1e-6)
    ahead = torch.ones(6, 6, dtype=torch.bool).tril()[None, None, 4:]
    y = prefix_attention(q[:, :, 4:], k, v, *prefix, mask=ahead, backend="cpu")
    torch.testing.assert_close(y, whole[:, :, 4:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradcheck(backend: str) -> None:
    case = PrefixAttentionCase(2, AttentionCase(2, 2, 2, 3, h_kv=1, mask="each"))
    leaves, given = leaves_of(case, torch.float64)
    run = lambda *t: prefix_attention(*t, **given, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("registered_op", [False, True], ids=["eager", "registered"])
def test_keeps_no_copy_of_the_prefix_and_no_scores(registered_op: bool) -> None:
    leaves, given = leaves_of(SETTINGS["masked"])
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        if registered_op:
            y, _ = torch.ops.deltaops.prefix_attention(*positional(leaves, given, "cpu"))
        else:
            y = prefix_attention(*leaves, **given, backend="cpu")
    known = {t.data_ptr() for t in (*leaves, y, given["mask"])}
    more = [t for t in saved if t.data_ptr() not in known]
    assert [(t.shape, t.dtype) for t in more] == [(y.shape[:3], torch.float32)]
    got = torch.autograd.grad(y.sum(), leaves)
    want = torch.autograd.grad(prefix_attention(*leaves, **given, backend="cpu").sum(), leaves)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@anyone
def test_the_prefix_alone_is_trained(backend: str) -> None:
    """As in the first layer of a frozen model: the rest wants no gradient."""
    leaves, given = leaves_of(SETTINGS["causal"])
    every = torch.autograd.grad(
        prefix_attention(*leaves, **given, backend=backend).square().sum(), leaves
    )
    frozen = [t.detach() for t in leaves[:3]]
    y = prefix_attention(*frozen, *leaves[3:], **given, backend=backend)
    grads = torch.autograd.grad(y.square().sum(), leaves[3:])
    torch.testing.assert_close(grads, every[3:], rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(reentrant: bool) -> None:
    leaves, given = leaves_of(SETTINGS["causal"])
    run = lambda *t: prefix_attention(*t, **given, backend="cpu")  # noqa: E731
    checkpoint(run, *leaves, use_reentrant=reentrant).square().sum().backward()
    want = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    assert all(torch.equal(t.grad, g) for t, g in zip(leaves, want, strict=True))


@pytest.mark.parametrize(
    ("backend", "dtype", "case"),
    [
        ("reference", torch.float64, "causal"),
        ("cpu", torch.float32, "masked"),
        ("cpu", torch.float32, "biased"),
        ("cpu", torch.bfloat16, "causal"),
    ],
    ids=str,
)
def test_registered_op_passes_opcheck(backend: str, dtype: torch.dtype, case: str) -> None:
    leaves, given = leaves_of(SETTINGS[case], dtype)
    opcheck(torch.ops.deltaops.prefix_attention, positional(leaves, given, backend))
    with torch.no_grad():
        arguments = positional([t.detach() for t in leaves], given, backend)
        y, lse = torch.ops.deltaops.prefix_attention(*arguments)
    *inputs, mask, scale, causal, bias, _ = arguments
    for needs in ([True] * 5, [False, True, False, True, False]):
        given_back = (y, *inputs, y, lse, mask, scale, causal, bias, needs, backend)
        opcheck(torch.ops.deltaops.prefix_attention_backward, given_back)


def test_eager_and_compiled_agree() -> None:
    torch._dynamo.reset()
    leaves, given = leaves_of(SETTINGS["masked"])
    given["backend"] = "cpu"
    compiled = torch.compile(lambda *t: prefix_attention(*t, **given).square(), fullgraph=True)
    want, got = prefix_attention(*leaves, **given).square(), compiled(*leaves)
    torch.testing.assert_close(got, want)
    assert got.stride() == want.stride()
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves)
    )


@anyone
def test_autocast_changes_nothing_and_the_prefix_keeps_its_dtype(backend: str) -> None:
    case = PrefixAttentionCase(4, SETTINGS["causal"].rest, wide=True)
    leaves, given = leaves_of(case, torch.bfloat16)
    given["backend"] = backend
    want = prefix_attention(*leaves, **given)
    with torch.autocast("cpu", torch.bfloat16):
        got = prefix_attention(*leaves, **given)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)
    grads = torch.autograd.grad(got.float().square().sum(), leaves)
    assert [g.dtype for g in grads] == [torch.bfloat16] * 3 + [torch.float32] * 2


def test_transforms_run_the_reference() -> None:
    leaves, _ = leaves_of(SETTINGS["causal"])
    q, k, v, *prefix = (t.detach() for t in leaves)
    each = torch.vmap(lambda q, k, v: prefix_attention(q[None], k[None], v[None], *prefix))(q, k, v)
    torch.testing.assert_close(each[:, 0], prefix_attention(q, k, v, *prefix))
    grad = torch.func.grad(lambda t: prefix_attention(q, k, v, t, prefix[1]).square().sum())
    got = grad(prefix[0])
    y = prefix_attention(q, k, v, leaves[3], prefix[1])
    torch.testing.assert_close(got, torch.autograd.grad(y.square().sum(), leaves[3])[0])
    with pytest.raises(NoBackendError, match=r"prefix_attention: under torch\.func transforms"):
        torch.func.grad(lambda t: prefix_attention(q, k, v, t, t, strict=True).sum())(prefix[0])


def test_second_order_is_refused() -> None:
    leaves, given = leaves_of(SETTINGS["causal"])
    y = prefix_attention(*leaves, **given, backend="cpu")
    (grad,) = torch.autograd.grad(y.square().sum(), leaves[3], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    y, lse = torch.ops.deltaops.prefix_attention(*positional(leaves, given, "reference"))
    assert not lse.requires_grad
    (grad,) = torch.autograd.grad(y.square().sum(), leaves[3], create_graph=True)
    with pytest.raises(GradientError, match="first order"):
        grad.sum().backward()


def test_who_runs_it_and_why_the_others_do_not() -> None:
    leaves, _ = leaves_of(PrefixAttentionCase(16, AttentionCase(2, 4, 64, 8, causal=True)))
    q, k, _, prefix_k, _ = leaves
    call = PrefixAttentionCall.of(q, k, prefix_k, None, True)
    assert "prefix_attention B=2 H=4 L=64 P=16 D=8 causal" in str(explain_call(call))
    assert explain_call(call).chosen == "cpu"
    refused = explain_call(call._replace(prefix_dtype=torch.float16), "cpu")
    assert "takes a float32 or bfloat16 prefix, not torch.float16" in str(refused)
    on_gpu, triton = call._replace(device="cuda"), TritonBackend()
    assert triton.unsupported(on_gpu) is None
    assert "runs on a GPU" in str(triton.unsupported(call))
    assert "heads of up to 64 elements" in str(triton.unsupported(on_gpu._replace(d=65)))
    assert "no bias" in str(triton.unsupported(on_gpu._replace(biased=True)))
    halves = on_gpu._replace(dtype=torch.float16, prefix_dtype=torch.bfloat16)
    assert "not of torch.bfloat16" in str(triton.unsupported(halves))
    assert "at most 65535 heads" in str(triton.unsupported(on_gpu._replace(b=20000)))
    if not torch.cuda.is_available():
        gpu = explain_call(on_gpu)
        assert gpu.chosen == "reference"
        assert "torch finds no GPU" in gpu.reason


Q, K, P = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 3, 8)
REFUSED = {
    "batch": (ShapeError, r"prefix_k must be \[Hkv, P, D\], here \[2, P, 8\], got \[2, 2, 3, 8\]",
              (Q, K, K, P.expand(2, 2, 3, 8), P), {}),
    "heads": (ShapeError, r"got \[1, 3, 8\]", (Q, K, K, P[:1], P[:1]), {}),
    "width": (ShapeError, r"got \[2, 3, 4\]", (Q, K, K, P[..., :4], P[..., :4]), {}),
    "values": (ShapeError, r"prefix_v must be \[2, 3, 8\], as prefix_k", (Q, K, K, P, P[:, :1]),
               {}),
    "wide": (DtypeError, "no wider than torch.float32 with q in torch.float32, got torch.float64",
             (Q, K, K, P.double(), P.double()), {}),
    "integers": (DtypeError, "prefix_k must be floating point", (Q, K, K, P.long(), P.long()), {}),
    "dtypes": (DtypeError, "prefix_v must be torch.float32, as prefix_k is",
               (Q, K, K, P, P.bfloat16()), {}),
    "device": (DeviceError, "prefix_v must be on the device of q", (Q, K, K, P, P.to("meta")), {}),
    "keys": (ShapeError, "prefix_attention: v must be", (Q, K, K[:, :, :4], P, P), {}),
    "causal": (ShapeError, "prefix_attention: causal wants as many queries as keys",
               (Q[:, :, :4], K, K, P, P), {"causal": True}),
    "mask": (ShapeError, r"mask must be \[B, H, Lq, Lk\], here \[2 or 1, 4 or 1, 5 or 1, 5 or 1\]",
             (Q, K, K, P, P), {"mask": torch.ones(1, 1, 5, 8, dtype=torch.bool)}),
    "bias": (ShapeError, r"bias must be .* here \[2 or 1, 4 or 1, 5 or 1, 5, 8 or 1\], got \[1, 6,",
             (Q, K, K, P, P), {"bias": torch.ones(1, 6, 5, 5)}),
    "bias's columns": (ShapeError, r"got \[1, 1, 5, 3\]", (Q, K, K, P, P),
                       {"bias": torch.ones(1, 1, 5, 3)}),
    "bias's dtype": (DtypeError, "bias must be torch.float32, as q is", (Q, K, K, P, P),
                     {"bias": torch.ones(1, 1, 5, 5).double()}),
    "scale": (ConfigError, "prefix_attention: scale must be finite", (Q, K, K, P, P),
              {"scale": float("nan")}),
    "backend": (NoBackendError, "must be one of", (Q, K, K, P, P), {"backend": "cpuu"}),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "given", "named"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(
    error: type[Exception], message: str, given: tuple[Tensor, ...], named: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        prefix_attention(*given, **named)
