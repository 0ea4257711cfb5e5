"""``norm_bias``: kernels against float64 and torch, gradients, the registered twin, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn.functional import layer_norm, rms_norm

from deltaops.backends import NormBiasCall, registered
from deltaops.errors import ConfigError, DeviceError, DtypeError, NoBackendError, ShapeError
from deltaops.ops import norm_bias
from deltaops.reference import norm_bias as reference
from deltaops.testing import NORM_BIAS_CASES, NormBiasCase, assert_accurate

DTYPES = {
    "f32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-f32parameters": (torch.bfloat16, torch.float32),
}
cases = pytest.mark.parametrize("case", NORM_BIAS_CASES, ids=str)
norms = pytest.mark.parametrize("norm", ["layer", "rms", "none"])
native = registered()["cpu"]


def wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def named(norm: str) -> str | None:
    """As the op takes it."""
    return None if norm == "none" else norm


def trainable(case: NormBiasCase, dtype: torch.dtype) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in case.tensors(dtype) if t is not None]


@cases
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_forward_and_gradients_match_fp64_reference(
    case: NormBiasCase, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    x, gamma, bias = case.tensors(dtypes[0], parameter_dtype=dtypes[1])
    grad_y = case.grad_y(dtypes[0])
    needs = [True, case.gamma, case.bias]
    parameter = dtypes[1]

    def run(forward, backward, double: bool) -> list[Tensor]:  # type: ignore[no-untyped-def]
        pick = wide if double else (lambda t: t)
        y, stats = forward(pick(x), pick(gamma), pick(bias), 1e-5, case.norm)
        kind = torch.float64 if double else parameter
        grads = backward(pick(grad_y), pick(x), stats, pick(gamma), kind, case.norm, needs)
        return [y, stats, *grads]

    oracle = run(reference.forward, reference.backward, True)
    low = run(reference.forward, reference.backward, False)
    got = run(native.norm_bias_forward, native.norm_bias_backward, False)
    for i, (actual, want, baseline) in enumerate(zip(got, oracle, low, strict=True)):
        assert_accurate(actual, want, baseline, f"output {i}")


@cases
def test_same_bits_again_for_any_team_inputs_unchanged_all_written(
    case: NormBiasCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, gamma, bias = case.tensors(torch.float32)
    grad_y, before, original = case.grad_y(torch.float32), x.clone(), torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        return original(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 3):
            torch.set_num_threads(count)
            y, stats = native.norm_bias_forward(x, gamma, bias, 1e-5, case.norm)
            needs = [True, case.gamma, case.bias]
            grads = native.norm_bias_backward(
                grad_y, x, stats, gamma, torch.float32, case.norm, needs
            )
            results.append([y, stats, *grads])
    finally:
        torch.set_num_threads(threads)
    for first, second, third in zip(*results, strict=True):
        assert not first.isnan().any()
        assert torch.equal(first, second)
        assert torch.equal(first, third)
    assert torch.equal(x, before)


@norms
def test_gradcheck(norm: str) -> None:
    leaves = trainable(NormBiasCase(4, 5, norm), torch.float64)
    assert torch.autograd.gradcheck(
        lambda *t: norm_bias(*t, norm=named(norm), backend="reference"), leaves
    )


@norms
def test_equals_torchs_own_norm(norm: str) -> None:
    x, gamma, bias = trainable(NormBiasCase(17, 65, norm), torch.float32)
    if norm == "layer":
        want = layer_norm(x, (65,), gamma, bias)
    elif norm == "none":
        want = x * gamma + bias
    else:
        want = rms_norm(x, (65,), gamma, 1e-5) + bias
    got = norm_bias(x, gamma, bias, norm=named(norm))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), (x, gamma, bias)),
        torch.autograd.grad(want.square().sum(), (x, gamma, bias)),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("wanted", range(3))
def test_each_gradient_alone(wanted: int) -> None:
    x, gamma, bias = NormBiasCase(50, 37).tensors(torch.float32)
    grad_y, (_, stats) = (
        torch.randn(50, 37),
        native.norm_bias_forward(x, gamma, bias, 1e-5, "layer"),
    )
    arguments = (grad_y, x, stats, gamma, torch.float32, "layer")
    everything = native.norm_bias_backward(*arguments, [True] * 3)
    alone = [i == wanted for i in range(3)]
    saved = None if wanted == 2 else x  # BitFit in the first layer: x is not kept
    (got,) = native.norm_bias_backward(grad_y, saved, *arguments[2:], alone)
    assert torch.equal(got, everything[wanted])


@norms
@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float64), ("cpu", torch.float32)]
)
def test_registered_op_passes_opcheck(backend: str, dtype: torch.dtype, norm: str) -> None:
    x, gamma, bias = trainable(NormBiasCase(6, 12), dtype)
    opcheck(torch.ops.deltaops.norm_bias, (x, gamma, bias, 1e-5, norm, backend))
    with torch.no_grad():
        y, stats = torch.ops.deltaops.norm_bias(x, gamma, bias, 1e-5, norm, backend)
    opcheck(
        torch.ops.deltaops.norm_bias_backward,
        (torch.ones_like(y), x.detach(), stats, gamma.detach(), dtype, norm, [True, False, True],
         backend),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [False, True])
def test_eager_and_compiled_agree(dtype: torch.dtype, columns: bool) -> None:
    leaves = trainable(NormBiasCase(6, 12), dtype)
    if columns:  # x lies by columns: results lie by rows all the same, as the compiler was told
        leaves[0] = leaves[0].detach().t().contiguous().t().requires_grad_()
    compiled = torch.compile(lambda *t: norm_bias(*t).square(), fullgraph=True)
    want, got = norm_bias(*leaves).square(), compiled(*leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves)
    )


@pytest.mark.parametrize("shape", [(12,), (2, 3, 12), (2, 0, 12)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    y = norm_bias(x, torch.ones(12), torch.zeros(12))
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


def test_vmap_agrees_with_a_loop() -> None:
    gamma, bias, xs = torch.randn(12), torch.randn(12), torch.randn(3, 5, 12)
    want = torch.stack([norm_bias(x, gamma, bias) for x in xs])
    torch.testing.assert_close(torch.vmap(lambda x: norm_bias(x, gamma, bias))(xs), want)


def test_bitfit_alone_saves_statistics_and_no_x() -> None:
    saved: list[Tensor] = []
    bias = torch.zeros(96, requires_grad=True)
    x, gamma = torch.randn(128, 96), torch.ones(96)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        norm_bias(x, gamma, bias)
    pointers = {t.data_ptr() for t in saved}
    assert x.data_ptr() not in pointers
    assert sum(t.numel() * 4 for t in saved if t.data_ptr() != gamma.data_ptr()) == 8 * 128


def test_a_gain_keeps_x_for_its_own_gradient_alone() -> None:
    x, gain = torch.randn(128, 96, requires_grad=True), torch.rand(96)

    def kept(gain: Tensor) -> set[int]:
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            norm_bias(x, gain, norm=None)
        return {t.data_ptr() for t in saved if t.numel()}

    assert kept(gain) == {gain.data_ptr()}
    assert kept(gain.requires_grad_()) == {gain.data_ptr(), x.data_ptr()}


def test_not_a_number_stays_in_its_row() -> None:
    x, gamma, bias = NormBiasCase(20, 33).tensors(torch.float32)
    x[3, 5], x[7, 2] = float("nan"), float("inf")
    y = norm_bias(x, gamma, bias)
    assert y[[3, 7]].isnan().all()
    assert y[[i for i in range(20) if i not in (3, 7)]].isfinite().all()


X, G = torch.randn(4, 12), torch.ones(12)
REFUSED = {
    "x-scalar": (ShapeError, "x must be", (torch.tensor(1.0),), {}),
    "gamma": (ShapeError, r"gamma must be \[12\]", (X, G[:3]), {}),
    "bias": (ShapeError, r"bias must be \[12\]", (X, G, G[None]), {}),
    "integers": (DtypeError, "floating point", (X.long(),), {}),
    "dtypes": (DtypeError, "share a dtype", (X, G, G.double()), {}),
    "device": (DeviceError, "meta", (X, G.to("meta")), {}),
    "norm": (ConfigError, "norm must be", (X,), {"norm": "none"}),
}


@pytest.mark.parametrize(("error", "message", "given", "named"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(
    error: type[Exception], message: str, given: tuple[Tensor, ...], named: dict[str, object]
) -> None:
    with pytest.raises(error, match=message):
        norm_bias(*given, **named)


def test_dispatch_says_why() -> None:
    with pytest.raises(NoBackendError, match=r"norm_bias: .*\n.*\n.*not torch\.float64"):
        norm_bias(X.double(), backend="cpu")
    with pytest.raises(NoBackendError, match="strict=True"):
        norm_bias(X.double(), strict=True)
    assert norm_bias(X, strict=True).shape == (4, 12)
    on_gpu = NormBiasCall("cuda", torch.float32, (torch.float32,), 4, 12, "layer")
    triton = registered()["triton"]
    assert triton.unsupported(on_gpu) is None
    foreign = on_gpu._replace(parameter_dtypes=(torch.float64,))
    assert "not torch.float64" in str(triton.unsupported(foreign))
