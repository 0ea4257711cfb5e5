"""The op ``cross_entropy``: values and gradients against float64, every edge, every refusal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional

from deltaops.backends import CrossEntropyCall, registered
from deltaops.dispatch import explain_call
from deltaops.errors import (
    ConfigError,
    DeviceError,
    DtypeError,
    GradientError,
    NoBackendError,
    ShapeError,
)
from deltaops.ops import cross_entropy
from deltaops.reference import cross_entropy as reference
from deltaops.testing import assert_accurate

FLOATS = (torch.float32, torch.bfloat16)
SHAPES = ((1, 1), (3, 7), (5, 1000), (2, 32003), (33, 63), (9, 4097))
INFINITY, NAN = float("inf"), float("nan")


def case(m: int, v: int, dtype: torch.dtype, ignored: bool = True) -> tuple[Tensor, Tensor]:
    """Logits with the spread of a trained model's, and targets of which every third is ignored."""
    generator = torch.Generator().manual_seed(m + v)
    logits = (torch.randn(m, v, generator=generator) * 4 + 2).to(dtype)
    target = torch.randint(0, v, (m,), generator=generator)
    if ignored and m > 1:
        target[1::3] = -100
    return logits, target


def with_grad(
    logits: Tensor, target: Tensor, reduction: str, backend: str = "cpu", scale: float = 1.5
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = cross_entropy(leaf, target, reduction=reduction, backend=backend)
    (grad,) = torch.autograd.grad(loss * scale, leaf)
    return loss.detach(), grad


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_match_float64(
    shape: tuple[int, int], dtype: torch.dtype, reduction: str
) -> None:
    logits, target = case(*shape, dtype)
    results = [
        with_grad(logits, target, reduction),
        with_grad(logits.double(), target, reduction, "reference"),
        with_grad(logits, target, reduction, "reference"),
    ]
    for i, what in enumerate(("loss", "gradient")):
        assert_accurate(results[0][i], results[1][i], results[2][i], what)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_reference_is_torchs_loss(reduction: str) -> None:
    logits, target = case(7, 11, torch.float64)
    leaf = logits.requires_grad_()
    theirs = functional.cross_entropy(leaf, target, reduction=reduction)
    (grad,) = torch.autograd.grad(theirs * 1.5, leaf)
    torch.testing.assert_close(
        with_grad(logits, target, reduction, "reference"), (theirs.detach(), grad)
    )


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_a_common_offset_costs_no_digits(offset: float) -> None:
    logits, target = case(6, 500, torch.float32)
    logits = logits.round()  # so that the offset itself rounds nothing
    for got, want in zip(
        with_grad(logits + offset, target, "mean"), with_grad(logits, target, "mean"), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(reduction: str) -> None:
    logits, target = case(5, 6, torch.float64)
    for run in (
        lambda x: cross_entropy(x, target, reduction=reduction),
        lambda x: reference.forward(x, target, -100, reduction == "mean")[0],
    ):
        assert torch.autograd.gradcheck(run, (logits.requires_grad_(),))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["padded", "transposed", "expanded"])
def test_strided_rows(layout: str, dtype: torch.dtype) -> None:
    logits, target = case(6, 37, dtype)
    if layout == "padded":
        strided = torch.full((6, 40), NAN, dtype=dtype)[:, :37]
        strided.copy_(logits)
    elif layout == "transposed":
        strided = logits.T.contiguous().T
    else:
        strided = logits[:1].expand(6, 37)
    want = with_grad(strided.contiguous(), target, "mean")
    leaf = strided.detach().requires_grad_()
    loss = cross_entropy(leaf, target, backend="cpu")
    (grad,) = torch.autograd.grad(loss * 1.5, leaf)
    assert torch.equal(loss, want[0])
    assert torch.equal(grad, want[1])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_same_bits_again_and_for_any_team(dtype: torch.dtype) -> None:
    logits, target = case(65, 1031, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(with_grad(logits, target, "mean"))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_row_counts(backend: str) -> None:
    for logits in (torch.randn(4, 5), torch.randn(0, 5)):
        target = torch.full((len(logits),), -100)
        for reduction, want in (("mean", NAN), ("sum", 0.0)):
            loss, grad = with_grad(logits, target, reduction, backend)
            torch.testing.assert_close(loss, torch.tensor(want), equal_nan=True)
            assert torch.equal(grad, torch.zeros_like(logits))
            theirs = functional.cross_entropy(logits, target, reduction=reduction)
            torch.testing.assert_close(loss, theirs, equal_nan=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_ignored_rows_are_not_looked_at(ignore_index: int, backend: str) -> None:
    logits, target = case(5, 6, torch.float32, ignored=False)
    target[target == 3] = 2
    target[1], logits[1] = ignore_index, NAN
    leaf = logits.requires_grad_()
    loss = cross_entropy(leaf, target, ignore_index=ignore_index, backend=backend)
    loss.backward()
    kept = torch.tensor([0, 2, 3, 4])
    torch.testing.assert_close(loss, cross_entropy(logits[kept], target[kept], backend=backend))
    assert torch.equal(leaf.grad[1], torch.zeros(6))
    assert leaf.grad[kept].abs().sum() > 0


ROWS = {
    "nan": [1.0, NAN, 2.0],
    "plus": [1.0, INFINITY, 2.0],
    "plus-target": [INFINITY, 1.0, 2.0],
    "minus": [1.0, -INFINITY, 2.0],
    "minus-target": [-INFINITY, 1.0, 2.0],
    "all-minus": [-INFINITY] * 3,
    "all-plus": [INFINITY] * 3,
    "far-apart": [-3e38, 3e38, 0.0],
    "one-class": [5.0],
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("wide", [False, True], ids=["short", "long"])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_nan_and_infinity_as_torch_has_them(row: list[float], wide: bool, backend: str) -> None:
    first = torch.tensor(row)
    # a whole chunk of what is ruled out, before the row itself: nothing of it may stay
    before = torch.full((5000 if wide else 0,), -INFINITY)
    logits = torch.stack(
        [torch.cat([first, before, first]), torch.linspace(-1, 1, len(before) + 2 * len(row))]
    )
    target = torch.tensor([len(before) + len(row), 0])
    leaf = logits.clone().requires_grad_()
    theirs = functional.cross_entropy(leaf, target, reduction="sum")
    (grad,) = torch.autograd.grad(theirs * 1.5, leaf)
    ours = with_grad(logits, target, "sum", backend)
    torch.testing.assert_close(ours, (theirs.detach(), grad), equal_nan=True)


def test_the_first_chunk_may_be_ruled_out() -> None:
    logits, target = case(2, 9001, torch.float32, ignored=False)
    logits[:, :8192], target[:] = -INFINITY, 9000
    want = functional.cross_entropy(logits.double(), target)
    torch.testing.assert_close(
        cross_entropy(logits, target, backend="cpu").double(), want, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("v", [1, 7, 1000])
def test_everything_is_written_and_nothing_read_is_changed(
    v: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, target = case(5, v, dtype)
    copies = logits.clone(), target.clone()
    want = with_grad(logits, target, "mean")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(NAN))
    cpu = registered()["cpu"]
    loss, state = cpu.cross_entropy_forward(logits, target, -100, True)
    grad = cpu.cross_entropy_backward(torch.tensor(1.5), logits, target, state, -100, True)
    assert torch.isfinite(state).all()
    assert torch.equal(loss, want[0])
    assert torch.equal(grad, want[1])
    assert torch.equal(logits, copies[0])
    assert torch.equal(target, copies[1])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_beyond_logits_and_targets_eight_bytes_a_row_are_kept(dtype: torch.dtype) -> None:
    logits, target = case(64, 96, dtype)
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        cross_entropy(logits.requires_grad_(), target)
    assert {logits.data_ptr(), target.data_ptr()} < set(sizes)
    del sizes[logits.data_ptr()], sizes[target.data_ptr()]
    assert sum(sizes.values()) == 64 * 8


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float64), ("cpu", torch.float32)]
)
def test_registered_op_passes_opcheck(backend: str, dtype: torch.dtype, mean: bool) -> None:
    logits, target = case(5, 9, dtype)
    arguments = (logits.requires_grad_(), target, -100, mean, backend)
    opcheck(torch.ops.deltaops.cross_entropy, arguments)
    loss, state = torch.ops.deltaops.cross_entropy(*arguments)
    detached = (loss.detach(), logits.detach(), target, state.detach(), -100, mean, backend)
    opcheck(torch.ops.deltaops.cross_entropy_backward, detached)


def test_eager_and_compiled_agree() -> None:
    compiled = torch.compile(lambda x, t: cross_entropy(x * 2, t), fullgraph=True, dynamic=True)
    for m in (6, 9):
        logits, target = case(m, 40, torch.float32)
        leaf = logits.requires_grad_()
        want = cross_entropy(leaf * 2, target)
        got = compiled(leaf, target)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, leaf), torch.autograd.grad(want, leaf))


def test_no_grad_and_inference_mode() -> None:
    logits, target = case(5, 9, torch.float32)
    want = cross_entropy(logits, target)
    leaf = logits.requires_grad_()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            loss = cross_entropy(leaf, target)
        assert torch.equal(loss, want)
        assert not loss.requires_grad


def test_vmap_agrees_with_a_loop() -> None:
    logits, target = torch.randn(3, 5, 9), torch.randint(0, 9, (3, 5))
    want = torch.stack([cross_entropy(x, t) for x, t in zip(logits, target, strict=True)])
    torch.testing.assert_close(torch.vmap(cross_entropy)(logits, target), want)
    with pytest.raises(NoBackendError, match="transforms"):
        torch.vmap(lambda x, t: cross_entropy(x, t, strict=True))(logits, target)


def test_second_order_is_refused() -> None:
    logits, target = case(5, 9, torch.float32)
    leaf = logits.requires_grad_()
    (grad,) = torch.autograd.grad(cross_entropy(leaf, target).square(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    loss, _ = torch.ops.deltaops.cross_entropy(leaf, target, -100, True, "cpu")
    (grad,) = torch.autograd.grad(loss.square(), leaf, create_graph=True)
    with pytest.raises(GradientError, match="first order"):
        grad.sum().backward()


X, T = torch.randn(4, 12), torch.tensor([0, 3, 11, -100])
REFUSED = {
    "logits-3d": (ShapeError, r"logits must be \[M, V\]", (X[None], T), {}),
    "no-classes": (ShapeError, "V ≥ 1", (X[:, :0], T), {}),
    "target-rows": (ShapeError, r"target must be \[4\]", (X, T[:3]), {}),
    "target-2d": (ShapeError, r"target must be \[4\]", (X, T[:, None]), {}),
    "integers": (DtypeError, "floating point", (X.long(), T), {}),
    "target-int32": (DtypeError, r"torch\.int64", (X, T.int()), {}),
    "target-device": (DeviceError, "meta", (X, T.to("meta")), {}),
    "reduction": (ConfigError, "'mean' or 'sum'", (X, T), {"reduction": "none"}),
    "backend": (NoBackendError, "must be one of", (X, T), {"backend": "cpuu"}),
    "dtype": (NoBackendError, "not torch.float64", (X.double(), T), {"backend": "cpu"}),
    "strict": (NoBackendError, "cross_entropy: .*strict=True", (X.double(), T), {"strict": True}),
}


@pytest.mark.parametrize(
    ("error", "message", "arguments", "settings"), REFUSED.values(), ids=REFUSED
)
def test_bad_input_is_refused(
    error: type[Exception],
    message: str,
    arguments: tuple[Tensor, Tensor],
    settings: dict[str, object],
) -> None:
    with pytest.raises(error, match=message):
        cross_entropy(*arguments, **settings)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("wrong", [12, -1, 2**40, -(2**63)])
def test_a_target_that_is_no_class_is_named(wrong: int, backend: str) -> None:
    target = T.clone()
    target[2] = wrong
    with pytest.raises(
        ValueError, match=rf"target\[2\] must be a class from 0 to 11 .* got {wrong}"
    ):
        cross_entropy(X, target, backend=backend)


def test_who_runs_it_and_why_not() -> None:
    fused = explain_call(CrossEntropyCall.of(X))
    assert (fused.chosen, fused.fast) == ("cpu", True)
    assert str(fused).startswith("cross_entropy M=4 V=12 torch.float32 on cpu → cpu")
    assert explain_call(CrossEntropyCall.of(X.half())).chosen == "reference"
    on_gpu = explain_call(CrossEntropyCall("cuda", torch.float32, 4, 12))
    assert on_gpu.chosen == "reference"
    assert "triton: has no kernel for cross_entropy yet" in on_gpu.reason
