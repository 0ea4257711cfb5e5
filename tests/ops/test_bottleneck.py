"""``bottleneck``: kernels against float64, gradients, the registered twin, and every refusal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from deltaops.backends import BottleneckCall, registered
from deltaops.dispatch import explain_call
from deltaops.errors import ConfigError, DeviceError, DtypeError, NoBackendError, ShapeError
from deltaops.ops import bottleneck
from deltaops.reference import bottleneck as reference
from deltaops.reference.activation import ACTIVATIONS
from deltaops.testing import BOTTLENECK_CASES, BottleneckCase, BottleneckTensors, assert_accurate

DTYPES = {
    "f32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-f32parameters": (torch.bfloat16, torch.float32),
}
CASE = BottleneckCase(6, 12, 3, "gelu", "layer")
cases = pytest.mark.parametrize("case", BOTTLENECK_CASES, ids=str)
dtypes = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
native = registered()["cpu"]


def call(t: BottleneckTensors, backend: str = "auto") -> Tensor:
    return bottleneck(
        t.x, t.down, t.up, t.down_bias, t.up_bias,
        residual="x" if t.residual is t.x else t.residual, scaling=t.scaling,
        activation=t.activation, norm=None if t.norm == "none" else t.norm, gamma=t.gamma,
        beta=t.beta, eps=t.eps, backend=backend,
    )  # fmt: skip


def trainable(case: BottleneckCase, dtype: torch.dtype) -> tuple[BottleneckTensors, list[Tensor]]:
    """A case whose tensors all want gradients, and these tensors (the other residual last)."""
    t = case.tensors(dtype)
    leaf = {name: u.detach().clone().requires_grad_() for name, u in t.leaves().items()}
    other = t.residual
    if other is not None and other is not t.x:
        other = other.clone().requires_grad_()
    t = replace(t, **leaf, residual=leaf["x"] if t.residual is t.x else other)
    return t, [*leaf.values(), *([other] if case.residual == "other" and other is not None else [])]


@cases
@dtypes
def test_forward_and_gradients_match_fp64_reference(
    case: BottleneckCase, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    t = case.tensors(dtypes[0], parameter_dtype=dtypes[1])
    grad_y, wide, needs = case.grad_y(dtypes[0]), t.to(torch.float64), t.needs()
    oracle = reference.forward(*wide.forward_arguments())
    low = reference.forward(*t.forward_arguments())
    got = native.bottleneck_forward(*t.forward_arguments())
    for name, actual, want, baseline in zip(("y", "h", "stats"), got, oracle, low, strict=True):
        assert_accurate(actual, want, baseline, name)
    # one state for all: a ReLU flips where h rounds across 0, and that is not backward's error
    state = tuple(s.float() for s in oracle[1:])
    oracle_grads = reference.backward(
        *wide.backward_arguments(grad_y.double(), *(s.double() for s in state)), needs
    )
    low_grads = reference.backward(*t.backward_arguments(grad_y, *state), needs)
    got_grads = native.bottleneck_backward(*t.backward_arguments(grad_y, *state), needs)
    for name, actual, want, baseline in zip(
        t.leaves(), got_grads, oracle_grads, low_grads, strict=True
    ):
        assert_accurate(actual, want, baseline, f"grad of {name}")


@cases
def test_same_bits_again_for_any_team_inputs_unchanged_all_written(
    case: BottleneckCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    t, grad_y = case.tensors(torch.float32), case.grad_y(torch.float32)
    before = [u.clone() for u in t.leaves().values()]
    original = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        return original(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 3):
            torch.set_num_threads(count)
            out = native.bottleneck_forward(*t.forward_arguments())
            grads = native.bottleneck_backward(*t.backward_arguments(grad_y, *out[1:]), t.needs())
            results.append([*out, *grads])
    finally:
        torch.set_num_threads(threads)
    for first, second, third in zip(*results, strict=True):
        assert not first.isnan().any()
        assert torch.equal(first, second)
        assert torch.equal(first, third)
    for old, new in zip(before, t.leaves().values(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    ("norm", "wanted"),
    [*(("layer", i) for i in range(7)), *(("none", i) for i in (0, 3, 4, 5, 6))],
)
def test_each_gradient_alone(norm: str, wanted: int) -> None:
    t = BottleneckCase(50, 37, 9, "silu", norm).tensors(torch.float32)
    grad_y = torch.randn(50, 37)
    state = native.bottleneck_forward(*t.forward_arguments())[1:]
    arguments = list(t.backward_arguments(grad_y, *state))
    everything = native.bottleneck_backward(*arguments, t.needs())
    if wanted > 3 or (wanted == 0 and norm == "none"):
        arguments[1] = None  # x is not saved for these
    (got,) = native.bottleneck_backward(*arguments, [i == wanted for i in range(7)])
    assert torch.equal(got, everything[sum(t.needs()[:wanted])])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
@pytest.mark.parametrize("residual", ["x", "other", "none"])
def test_gradcheck(activation: str, norm: str, residual: str) -> None:
    t, leaves = trainable(BottleneckCase(4, 5, 3, activation, norm, residual), torch.float64)

    def run(*_: Tensor) -> Tensor:
        return call(t, "reference")

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values_take_torchs_place_or_the_limit(activation: str) -> None:
    inf, nan = float("inf"), float("nan")
    h = torch.tensor([[inf], [-inf], [nan], [0.0], [-2.5e4], [3e38]])
    one = torch.ones(1, 1)
    value = native.bottleneck_forward(
        h, None, None, None, one, None, one, None, 1.0, 1e-5, activation, "none"
    )[0]
    (slope,) = native.bottleneck_backward(
        torch.ones(6, 1), None, h, torch.empty(0, 2), None, None, one, one, 1.0, activation,
        "none", False, [True] + [False] * 6,
    )  # fmt: skip
    left = activation == "identity"
    want = [inf, -inf if left else 0.0, nan, 0.0, -2.5e4 if left else 0.0, 3e38]
    torch.testing.assert_close(value[:, 0], torch.tensor(want), equal_nan=True, rtol=0, atol=0)
    at_zero = {"identity": 1.0, "relu": 0.0}.get(activation, 0.5)
    at_nan = 1.0 if activation in ("identity", "relu") else nan  # as torch has it
    want = [1.0, float(left), at_nan, at_zero, float(left), 1.0]
    torch.testing.assert_close(slope[:, 0], torch.tensor(want), equal_nan=True, rtol=0, atol=1e-7)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_keep_their_digits_far_on_the_left(activation: str) -> None:
    h = torch.linspace(-9.0, 9.0, 4001)[:, None]
    one = torch.ones(1, 1)
    got = native.bottleneck_forward(
        h, None, None, None, one, None, one, None, 1.0, 1e-5, activation, "none"
    )[0].double()
    wide = h.double()
    gate = {
        "gelu": torch.erfc(-wide / 2**0.5) / 2,
        "gelu_tanh": torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)),
        "silu": torch.sigmoid(wide),
    }[activation]
    # h^3 rounds before the exponential of gelu_tanh makes its error a relative one
    rtol = 2e-5 if activation == "gelu_tanh" else 1e-6
    torch.testing.assert_close(got, wide * gate, rtol=rtol, atol=0)


def test_not_a_number_stays_in_its_row() -> None:
    t = BottleneckCase(20, 33, 4, "gelu", "layer").tensors(torch.float32)
    t.x[3, 5], t.x[7, 2] = float("nan"), float("inf")
    y = native.bottleneck_forward(*t.forward_arguments())[0]
    assert y[[3, 7]].isnan().all()
    assert y[[i for i in range(20) if i not in (3, 7)]].isfinite().all()


def test_algebra() -> None:
    t = BottleneckCase(9, 20, 4, bare=True).tensors(torch.float32)
    assert torch.equal(call(replace(t, scaling=0.0)), t.x)
    plain = call(replace(t, residual=None))
    torch.testing.assert_close(call(replace(t, residual=None, up=2 * t.up)), 2 * plain)
    torch.testing.assert_close(call(t), plain + t.x)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float64), ("cpu", torch.float32)]
)
@pytest.mark.parametrize(
    "case", [CASE, BottleneckCase(6, 12, 3, "relu", "none", "other", bare=True)], ids=str
)
def test_registered_op_passes_opcheck(
    case: BottleneckCase, backend: str, dtype: torch.dtype
) -> None:
    t, _ = trainable(case, dtype)
    own = case.residual == "x"
    arguments = list(t.forward_arguments())
    arguments[1] = None if own else arguments[1]
    opcheck(torch.ops.deltaops.bottleneck, (*arguments, own, backend))
    with torch.no_grad():
        _, h, stats = torch.ops.deltaops.bottleneck(*arguments, own, backend)
    grad = t.backward_arguments(case.grad_y(dtype), h, stats)
    detached = [u.detach() if isinstance(u, Tensor) else u for u in grad]
    opcheck(torch.ops.deltaops.bottleneck_backward, (*detached, t.needs(), backend))


@pytest.mark.parametrize("case", [CASE, replace(CASE, norm="none", residual="other")], ids=str)
def test_eager_and_compiled_agree(case: BottleneckCase) -> None:
    t, leaves = trainable(case, torch.float32)
    compiled = torch.compile(lambda: call(t).square(), fullgraph=True)
    want, got = call(t).square(), compiled()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves)
    )


@pytest.mark.parametrize("shape", [(12,), (4, 12), (2, 3, 12), (0, 12), (2, 0, 12)])
@pytest.mark.parametrize("other", [False, True])
def test_leading_dimensions(shape: tuple[int, ...], other: bool) -> None:
    t = CASE.tensors(torch.float32)
    x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
    y = call(replace(t, x=x, residual=residual if other else x))
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert (residual.grad is not None) == other


def test_vmap_agrees_with_a_loop() -> None:
    t, xs = CASE.tensors(torch.float32), torch.randn(3, 5, 12)

    def one(x: Tensor) -> Tensor:
        return call(replace(t, x=x, residual=x))

    torch.testing.assert_close(torch.vmap(one)(xs), torch.stack([one(x) for x in xs]))


def test_autocast_gives_autocasts_dtype_and_fp32_gradients() -> None:
    t, leaves = trainable(CASE, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(t)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(u.grad is not None and u.grad.dtype == torch.float32 for u in leaves)


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_saves_h_and_statistics_only(norm: str) -> None:
    t, leaves = trainable(BottleneckCase(128, 96, 8, "gelu", norm), torch.float32)
    sizes: dict[int, int] = {}

    def pack(u: Tensor) -> Tensor:
        sizes[u.data_ptr()] = u.numel() * u.element_size()
        return u

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda u: u):
        call(t)
    held = {u.data_ptr() for u in leaves}
    extra = sum(size for pointer, size in sizes.items() if pointer not in held)
    assert extra == 128 * (4 * 8 + (8 if norm == "layer" else 0))


def test_second_order_is_refused() -> None:
    t, leaves = trainable(CASE, torch.float32)
    (grad,) = torch.autograd.grad(call(t).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ----------------------------------------------------------------------------------- bad input

X, D, U = torch.randn(4, 12), torch.randn(3, 12), torch.randn(12, 3)
REFUSED = {
    "x-scalar": (ShapeError, "x must be", (torch.tensor(1.0), D, U), {}),
    "swapped": (ShapeError, "swap down and up", (X, U, D), {}),
    "up": (ShapeError, r"up must be \[12, 3\]", (X, D, U[:, :2]), {}),
    "down-bias": (ShapeError, "down_bias must be", (X, D, U, torch.zeros(4)), {}),
    "residual-shape": (ShapeError, "residual must be", (X, D, U), {"residual": X[:2]}),
    "residual-word": (ConfigError, "residual must be 'x'", (X, D, U), {"residual": "y"}),
    "residual-dtype": (DtypeError, "dtype of x", (X, D, U), {"residual": X.double()}),
    "integers": (DtypeError, "floating point", (X.long(), D, U), {}),
    "dtypes": (DtypeError, "dtype of down", (X, D, U.double()), {}),
    "device": (DeviceError, "meta", (X, D.to("meta"), U), {}),
    "activation": (ConfigError, "activation must be one of", (X, D, U), {"activation": "tanh"}),
    "norm": (ConfigError, "norm must be", (X, D, U), {"norm": "batch"}),
    "gamma-alone": (ConfigError, "norm is None", (X, D, U), {"gamma": torch.ones(12)}),
}


@pytest.mark.parametrize(("error", "message", "given", "named"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(
    error: type[Exception],
    message: str,
    given: tuple[Tensor, ...],
    named: dict[str, object],
) -> None:
    with pytest.raises(error, match=message):
        bottleneck(*given, **named)


def test_dispatch_says_why() -> None:
    with pytest.raises(NoBackendError, match=r"bottleneck: .*\n.*\n.*not torch\.float64"):
        bottleneck(X.double(), D.double(), U.double(), backend="cpu")
    with pytest.raises(NoBackendError, match="strict=True"):
        bottleneck(X.double(), D.double(), U.double(), strict=True)
    assert bottleneck(X, D, U, strict=True).shape == (4, 12)
    wanted = BottleneckCall("cpu", torch.float32, (torch.float32,), 4, 12, 3, "relu", "none")
    assert explain_call(wanted).chosen == "cpu"
    assert "bottleneck M=4 K=12 R=3 relu" in str(explain_call(wanted))
    on_gpu, triton = wanted._replace(device="cuda"), registered()["triton"]
    assert triton.unsupported(on_gpu) is None
    assert "not torch.float64" in str(triton.unsupported(on_gpu._replace(dtype=torch.float64)))
    assert triton.unsupported(on_gpu._replace(k=65535 * 32, rank=65535 * 16)) is None
    assert "at most 2097120 columns" in str(triton.unsupported(on_gpu._replace(k=65535 * 32 + 1)))
    assert "up to 1048560, not" in str(triton.unsupported(on_gpu._replace(rank=65535 * 16 + 1)))
