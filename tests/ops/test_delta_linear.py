"""The public op: gradients, the registered twin, randomness, and every refusal."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck
from torch.nn.functional import linear, silu
from torch.utils.checkpoint import checkpoint

import deltaops
from deltaops.backends import registered
from deltaops.dispatch import select
from deltaops.errors import (
    ConfigError,
    DeviceError,
    DtypeError,
    GradientError,
    NoBackendError,
    ShapeError,
)
from deltaops.ops import Branch, delta_linear
from deltaops.ops.plans import PLANS
from deltaops.reference.activation import ACTIVATIONS
from deltaops.testing import DeltaLinearCase, assert_accurate

CASE = DeltaLinearCase(6, 7, 12, (3, 2), dropout=(0.3, 0.0))
STACK = DeltaLinearCase(
    6, 7, 12, (3, 2, 4), dropout=(0.3, 0.0, 0.0),
    activation=("identity", "relu", "silu"), branch_bias=(False, True, True),
)  # fmt: skip
"""LoRA with dropout, a relu adapter and a silu adapter, on one layer."""


def leaves(dtype: torch.dtype, case: DeltaLinearCase = CASE) -> list[Tensor]:
    t = case.tensors(dtype)
    tensors = [t.x, t.bias, *t.a, *t.b, *t.branch_bias]
    return [u.detach().clone().requires_grad_() for u in tensors if u is not None]


def call_stack(
    weight: Tensor, x: Tensor, bias: Tensor, *rest: Tensor, dropout: float = 0.3, backend: str
) -> Tensor:
    a0, a1, a2, b0, b1, b2, c1, c2 = rest
    branches = [
        Branch(a0, b0, 2.0, dropout),
        Branch(a1, b1, 1.0, 0.0, "relu", c1),
        Branch(a2, b2, 0.7, activation="silu", bias=c2),
    ]
    return delta_linear(x, weight, bias, branches, backend=backend)


def call(
    weight: Tensor, x: Tensor, bias: Tensor, *ab: Tensor, dropout: float = 0.3, backend: str
) -> Tensor:
    half = len(ab) // 2
    branches = [Branch(ab[i], ab[half + i], 2.0 - i, dropout * (i == 0)) for i in range(half)]
    return delta_linear(x, weight, bias, branches, backend=backend)


@pytest.mark.parametrize(
    ("case", "run"), [(CASE, call), (STACK, call_stack)], ids=["lora", "stack"]
)
def test_gradcheck(case: DeltaLinearCase, run: Callable[..., Tensor]) -> None:
    weight = case.tensors(torch.float64).weight

    def seeded(*inputs: Tensor) -> Tensor:
        torch.manual_seed(3)
        return run(weight, *inputs, backend="reference")

    assert torch.autograd.gradcheck(seeded, leaves(torch.float64, case))


def test_a_stack_is_as_accurate_as_its_layers_in_eager_torch() -> None:
    def eager(weight: Tensor, x: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        a0, a1, a2, b0, b1, b2, c1, c2 = rest
        y = linear(x, weight, bias) + 2.0 * linear(linear(x, a0), b0)
        return y + linear(linear(x, a1, c1).relu(), b1) + 0.7 * linear(silu(linear(x, a2, c2)), b2)

    def ours(weight: Tensor, *inputs: Tensor) -> Tensor:
        return call_stack(weight, *inputs, dropout=0.0, backend="cpu")

    weight, inputs, results = STACK.tensors(torch.float32).weight, leaves(torch.float32, STACK), []
    for run, dtype in ((ours, torch.float32), (eager, torch.float64), (eager, torch.float32)):
        y = run(weight.to(dtype), *(t.to(dtype) for t in inputs))
        results.append([y, *torch.autograd.grad(y, inputs, torch.ones_like(y))])
    for i, (got, oracle, baseline) in enumerate(zip(*results, strict=True)):
        assert_accurate(got, oracle, baseline, f"result {i}")


@pytest.mark.parametrize("frozen", [(4,), (5,), (2, 4, 5), (1, 3, 5)], ids=str)
@pytest.mark.parametrize("registered", [False, True], ids=["eager", "registered"])
def test_frozen_parts_get_no_gradient_and_change_no_other(
    frozen: tuple[int, ...], registered: bool
) -> None:
    case = DeltaLinearCase(6, 7, 12, (3,), activation=("gelu",), branch_bias=(True,))
    t, results = case.tensors(torch.float32), []
    for off in ((), frozen):
        x, bias, a, b, c = inputs = leaves(torch.float32, case)
        for i in off:
            inputs[i - 1].requires_grad_(False)
        if registered:
            y, _ = torch.ops.deltaops.delta_linear(
                x, t.weight, bias, [a], [b], [c], [True], [2.0], [0.0], ["gelu"], None, None, "cpu"
            )
        else:
            y = delta_linear(x, t.weight, bias, [Branch(a, b, 2.0, 0.0, "gelu", c)], backend="cpu")
        y.square().sum().backward()
        results.append([u.grad for u in inputs])
    for i, (whole, part) in enumerate(zip(*results, strict=True)):
        if i + 1 in frozen:
            assert part is None
        else:
            assert torch.equal(whole, part)


@pytest.mark.parametrize("adapter", [None, [1, 0, -1, 0, 0, 1]], ids=["all", "by-row"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float64), ("cpu", torch.float32)]
)
def test_registered_op_passes_opcheck(
    backend: str, dtype: torch.dtype, dropout: float, adapter: list[int] | None
) -> None:
    weight = CASE.tensors(dtype).weight
    x, bias, a0, a1, b0, b1 = leaves(dtype)
    c1 = torch.randn(2, dtype=dtype, requires_grad=True)
    seed = torch.tensor([5]) if dropout else None
    settings = [2.0, 1.0], [dropout, 0.0], ["identity", "gelu"], seed
    ids = None if adapter is None else torch.tensor(adapter)
    arguments = (x, weight, bias, [a0, a1], [b0, b1], [c1], [False, True], *settings, ids, backend)
    opcheck(torch.ops.deltaops.delta_linear, arguments)
    y, s = torch.ops.deltaops.delta_linear(*arguments)
    detached = [[t.detach() for t in pair] for pair in ([a0, a1], [b0, b1])]
    opcheck(
        torch.ops.deltaops.delta_linear_backward,
        (torch.ones_like(y), x.detach(), weight, *detached, s, *settings,
         [True, False, True, True, False, True, False, True], ids, backend),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(12,), (4, 12), (2, 3, 12), (0, 12), (2, 0, 12)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    _, bias, a, _, b, _ = leaves(torch.float32)
    weight = CASE.tensors(torch.float32).weight
    x = torch.randn(shape, requires_grad=True)
    y = delta_linear(x, weight, bias, [Branch(a, b)])
    assert y.shape == (*shape[:-1], 7)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


@pytest.mark.parametrize(
    ("case", "run"), [(CASE, call), (STACK, call_stack)], ids=["lora", "stack"]
)
def test_eager_and_compiled_agree(case: DeltaLinearCase, run: Callable[..., Tensor]) -> None:
    weight = case.tensors(torch.float32).weight

    def squared(*inputs: Tensor) -> Tensor:
        return run(weight, *inputs, dropout=0.0, backend="auto").square()

    inputs = leaves(torch.float32, case)
    compiled = torch.compile(squared, fullgraph=True)
    want, got = squared(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), inputs)
    )


def test_a_layer_without_branches_compiles() -> None:
    x, weight = torch.randn(6, 12, requires_grad=True), torch.randn(7, 12)
    y = torch.compile(lambda x: delta_linear(x, weight), fullgraph=True)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, linear(x, weight))
    torch.testing.assert_close(grad, weight.sum(0).expand(6, 12))


def test_compiles_with_dynamic_rows_and_dropout() -> None:
    weight = CASE.tensors(torch.float32).weight
    _x, *rest = leaves(torch.float32)
    compiled = torch.compile(
        lambda *t: call(weight, *t, backend="auto"), fullgraph=True, dynamic=True
    )
    for rows in (6, 9, 31):
        y = compiled(torch.randn(rows, 12), *rest)
        assert y.shape == (rows, 7)
        y.sum().backward()


def test_dropout_follows_torchs_generator() -> None:
    weight = CASE.tensors(torch.float32).weight
    inputs = leaves(torch.float32)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return call(weight, *inputs, backend="auto")

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_native_and_reference_drop_the_same_elements() -> None:
    weight = CASE.tensors(torch.float32).weight
    results = []
    for backend in ("cpu", "reference"):
        inputs = leaves(torch.float32)
        torch.manual_seed(4)
        call(weight, *inputs, backend=backend).square().sum().backward()
        results.append([t.grad for t in inputs])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_mask(reentrant: bool) -> None:
    weight = CASE.tensors(torch.float32).weight
    grads = []
    for wrapped in (False, True):
        inputs = leaves(torch.float32)
        torch.manual_seed(9)
        y = (
            checkpoint(
                lambda *t: call(weight, *t, backend="auto"), *inputs, use_reentrant=reentrant
            )
            if wrapped
            else call(weight, *inputs, backend="auto")
        )
        y.square().sum().backward()
        grads.append([t.grad for t in inputs])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("case", "run"), [(CASE, call), (STACK, call_stack)], ids=["lora", "stack"]
)
def test_autocast_gives_autocasts_dtype_and_fp32_gradients(
    case: DeltaLinearCase, run: Callable[..., Tensor]
) -> None:
    weight = case.tensors(torch.float32).weight
    inputs = leaves(torch.float32, case)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(weight, *inputs, dropout=0.0, backend="auto")
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saves_no_mask_and_x_only_for_grad_a(activation: str) -> None:
    weight = torch.randn(64, 96)
    x = torch.randn(128, 96, requires_grad=True)
    a, b = torch.randn(8, 96, requires_grad=True), torch.randn(64, 8, requires_grad=True)
    inner = torch.randn(8, requires_grad=True)

    def saved(train_a: bool) -> int:
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.data_ptr()] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            down = a if train_a else a.detach()
            delta_linear(x, weight, None, [Branch(down, b, 1.0, 0.1, activation, inner)])
        held = {t.data_ptr() for t in (x, weight, a, b)}
        assert (x.data_ptr() in sizes) == train_a
        return sum(size for pointer, size in sizes.items() if pointer not in held)

    beyond_x = 128 * 8 * 4 + 8  # S (or H, before an activation) in float32, and the seed
    assert saved(True) == saved(False) == beyond_x


def test_inference_mode_and_no_grad() -> None:
    weight, inputs = CASE.tensors(torch.float32).weight, leaves(torch.float32)
    want = call(weight, *inputs, dropout=0.0, backend="auto").detach()
    with torch.no_grad():
        assert torch.equal(call(weight, *inputs, dropout=0.0, backend="auto"), want)
    with torch.inference_mode():
        assert torch.equal(call(weight, *inputs, dropout=0.0, backend="auto"), want)


def test_vmap_agrees_with_a_loop() -> None:
    _, bias, a, _, b, _ = (t.detach() for t in leaves(torch.float32))
    weight, xs = CASE.tensors(torch.float32).weight, torch.randn(3, 5, 12)

    def one(x: Tensor) -> Tensor:
        return delta_linear(x, weight, bias, [Branch(a, b)])

    torch.testing.assert_close(torch.vmap(one)(xs), torch.stack([one(x) for x in xs]))
    with pytest.raises(NoBackendError, match="transforms"):
        torch.vmap(lambda x: delta_linear(x, weight, strict=True))(xs)


def test_second_order_is_refused() -> None:
    weight, inputs = CASE.tensors(torch.float32).weight, leaves(torch.float32)
    y = call(weight, *inputs, backend="auto").square().sum()
    (grad,) = torch.autograd.grad(y, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 7)
        self.linear.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 12)), nn.Parameter(torch.randn(7, 2))

    def forward(self, x: Tensor) -> Tensor:
        return delta_linear(x, self.linear.weight, self.linear.bias, [Branch(self.a, self.b)])


def test_models_that_use_it_copy_and_pickle() -> None:
    layer, x = Layer(), torch.randn(3, 12)
    want = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), want)


# ----------------------------------------------------------------------------------- bad input

X, W = torch.randn(4, 12), torch.randn(7, 12)
A, B = torch.randn(3, 12), torch.randn(7, 3)
REFUSED = {
    "x-width": (ShapeError, r"x must be \[\.\.\., 12\]", (torch.randn(4, 11), W)),
    "x-scalar": (ShapeError, "x must be", (torch.tensor(1.0), W)),
    "weight-3d": (ShapeError, r"weight must be \[N, K\]", (X, W[None])),
    "bias": (ShapeError, r"bias must be \[7\]", (X, W, torch.zeros(8))),
    "a-b-swapped": (ShapeError, "Did you swap a and b", (X, W, None, [Branch(B, A)])),
    "rank-0": (ShapeError, "R ≥ 1", (X, W, None, [Branch(A[:0], B[:, :0])])),
    "b-rank": (ShapeError, r"b must be \[7, 3\]", (X, W, None, [Branch(A, B[:, :2])])),
    "integers": (DtypeError, "floating point", (X.long(), W)),
    "weight-dtype": (DtypeError, "dtype of x", (X, W.double())),
    "bias-dtype": (DtypeError, "bias must have", (X, W, torch.zeros(7).double())),
    "adapter-dtypes": (DtypeError, "share a floating", (X, W, None, [Branch(A, B.double())])),
    "weight-device": (DeviceError, "meta", (X, W.to("meta"))),
    "a-device": (DeviceError, "branch 0: a", (X, W, None, [Branch(A.to("meta"), B)])),
    "dropout": (ConfigError, "probability", (X, W, None, [Branch(A, B, 1.0, 1.5)])),
    "activation": (
        ConfigError,
        "one of identity, relu",
        (X, W, None, [Branch(A, B, 1.0, 0.0, "tanh")]),
    ),
    "branch-bias": (ShapeError, r"bias must be \[3\]", (X, W, None, [Branch(A, B, bias=B[:, 0])])),
    "branch-bias-dtype": (
        DtypeError,
        "dtype of a",
        (X, W, None, [Branch(A, B, bias=A[:, 0].double())]),
    ),
    "branch-bias-device": (
        DeviceError,
        "branch 0: bias",
        (X, W, None, [Branch(A, B, bias=A[:, 0].to("meta"))]),
    ),
    "dropout-nan": (ConfigError, "probability", (X, W, None, [Branch(A, B, 1.0, float("nan"))])),
    "trainable-weight": (GradientError, "frozen", (X, W.clone().requires_grad_())),
}


@pytest.mark.parametrize(("error", "message", "arguments"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(
    error: type[Exception], message: str, arguments: tuple[object, ...]
) -> None:
    with pytest.raises(error, match=message):
        delta_linear(*arguments)


# ------------------------------------------------------------------------------------- dispatch


def test_a_named_backend_runs_or_raises_with_its_reason() -> None:
    with pytest.raises(NoBackendError, match=r"not torch\.float64"):
        delta_linear(X.double(), W.double(), backend="cpu")
    with pytest.raises(NoBackendError, match="must be one of auto, cpu"):
        delta_linear(X, W, backend="cpuu")


def test_strict_refuses_the_last_resort() -> None:
    assert delta_linear(X.double(), W.double()).dtype == torch.float64
    with pytest.raises(NoBackendError, match="strict=True"):
        delta_linear(X.double(), W.double(), strict=True)
    assert delta_linear(X, W, strict=True).shape == (4, 7)


def test_explain_gives_every_reason() -> None:
    fused = deltaops.explain(X, W, None, [Branch(A, B)])
    assert (fused.chosen, fused.fast) == ("cpu", True)
    eager = deltaops.explain(X.double(), W.double(), None, [])
    assert eager.chosen == "reference"
    assert not eager.fast
    assert "not torch.float64" in str(eager)
    assert "eager torch" in eager.reason


@pytest.mark.parametrize("branch", [
    Branch(A, B, activation="silu"), Branch(A, B, bias=A[:, 0].contiguous()),
], ids=["silu", "bias"])  # fmt: skip
def test_triton_takes_parallel_adapters_on_a_gpu(branch: Branch) -> None:
    on_gpu = deltaops.explain(X, W, None, [branch]).call._replace(device="cuda")
    assert registered()["triton"].unsupported(on_gpu) is None


def test_selection_is_cached_by_what_a_backend_may_look_at() -> None:
    select.cache_clear()
    PLANS.clear()
    delta_linear(X, W)
    delta_linear(X + 1, W)
    assert select.cache_info().misses == 1
