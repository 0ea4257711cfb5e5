"""Groups, DoRA's norms, quantised weights and prompts of the Triton backend on a real GPU, by the
public ops. `make gpu`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from deltaops.backends.triton import cuda, planner
from deltaops.ops import (
    Branch,
    Layer,
    QuantizedWeight,
    delta_linear,
    delta_linear_group,
    dora_norm,
    prompt_embedding,
    quantized_linear,
)
from deltaops.reference import dora_norm as dora_reference
from deltaops.reference import prompt_embedding as prompt_reference
from deltaops.reference.quantized import dequantize, quantize_int8, quantize_nf4
from deltaops.testing import assert_accurate, bound, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
]
DEVICE = "cuda"
FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
DTYPES = {"f32": (FULL, FULL), "f16": (HALF, HALF), "bf16": (BRAIN, BRAIN), "mixed": (BRAIN, FULL)}
dtypes = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
Types = tuple[torch.dtype, torch.dtype]


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device=DEVICE)).to(dtype)


def branch(
    n: int, k: int, rank: int, dtype: torch.dtype, dropout: float = 0.0, kind: str = "identity"
) -> Branch:
    a, b = normal(rank, k, dtype=dtype, scale=k**-0.5), normal(n, rank, dtype=dtype)
    inner = None if kind == "identity" else normal(rank, dtype=dtype)
    return Branch(a.requires_grad_(), b.requires_grad_(), 0.7, dropout, kind, inner)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("k", [256, 71])
@dtypes
def test_a_group_has_the_bits_of_its_layers(dtypes: Types, k: int, dropout: float) -> None:
    torch.manual_seed(0)
    x = normal(300, k, dtype=dtypes[0]).requires_grad_()
    layers = [
        Layer(
            normal(n, k, dtype=dtypes[0], scale=k**-0.5),
            None,
            [branch(n, k, rank, dtypes[1], dropout, kind)],
        )
        for n, rank, kind in ((256, 16, "identity"), (64, 5, "gelu"), (96, 64, "silu"))
    ]
    grads = [normal(300, len(layer.weight), dtype=dtypes[0]) for layer in layers]
    leaves = [t for layer in layers for r in layer.branches for t in (r.a, r.b)]
    torch.manual_seed(1)
    ys = delta_linear_group(x, layers, backend="triton")
    grad_x, *found = torch.autograd.grad(ys, [x, *leaves], grads)
    torch.manual_seed(1)
    alone = [delta_linear(x, *layer, backend="triton") for layer in layers]
    total = torch.zeros(x.shape, dtype=torch.float64, device=DEVICE)
    wanted: list[Tensor] = []
    for i, (y, grad) in enumerate(zip(alone, grads, strict=True)):
        part, *others = torch.autograd.grad(y, [x, *leaves[2 * i : 2 * i + 2]], grad)
        total += part
        wanted += others
    for got, want in zip([*ys, *found], [*alone, *wanted], strict=True):
        assert torch.equal(got, want)
    assert relative_error(grad_x, total) < 8 * bound(0.0, dtypes[0])


def of_cuda() -> tuple[Tensor, list[Layer], list[Tensor]]:
    """x, layers that the plan ``cuda`` takes, and gradients of their outputs."""
    if not cuda.runs_on(DEVICE, "cuda"):
        pytest.skip(cuda.state())
    torch.manual_seed(0)
    x = normal(300, 264, dtype=BRAIN).requires_grad_()
    layers = [
        Layer(
            normal(n, 264, dtype=BRAIN, scale=264**-0.5),
            normal(n, dtype=BRAIN) if n == 64 else None,
            [branch(n, 264, rank, BRAIN)],
        )
        for n, rank in ((256, 16), (64, 8), (104, 72))
    ]
    return x, layers, [normal(300, len(layer.weight), dtype=BRAIN) for layer in layers]


def test_a_group_by_the_cuda_plan_is_one_launch_each_way() -> None:
    x, layers, grads = of_cuda()
    found: list[list[Tensor]] = []
    for forced in ("cuda", "cuda", "torch"):
        with planner.forced(forced, forced):
            ys = delta_linear_group(x, layers, backend="triton")
            found.append([*ys, *torch.autograd.grad(ys, x, grads)])
    with planner.forced("cuda", "cuda"):
        alone = [delta_linear(x, *layer, backend="triton") for layer in layers]
    wide = x.detach().double()
    oracle = [
        wide @ w.double().t()
        + (0.0 if bias is None else bias.double())
        + 0.7 * (wide @ r.a.detach().double().t()) @ r.b.detach().double().t()
        for w, bias, (r,), *_ in layers
    ]
    total = sum(
        g.double() @ w.double() + 0.7 * (g.double() @ r.b.double()) @ r.a.double()
        for g, (w, _, (r,), *_) in zip(grads, layers, strict=True)
    )
    assert isinstance(total, Tensor)
    for got, again, low, want in zip(*found, [*oracle, total.detach()], strict=True):
        assert_accurate(got, want, low, "group")
        assert torch.equal(got, again)
    assert all(map(torch.equal, found[0], alone))


def test_a_group_s_grad_a_beside_its_dx() -> None:
    x, layers, grads = of_cuda()
    wanted = [x, *(t for layer in layers for t in (layer.branches[0].a, layer.branches[0].b))]
    found = []
    for forced in ("beside", "beside", "torch", None):
        kind = torch.float64 if forced is None else BRAIN
        leaves = [t.detach().to(kind).requires_grad_() for t in wanted]
        given = [
            layer._replace(
                weight=layer.weight.to(kind),
                bias=None if layer.bias is None else layer.bias.to(kind),
                branches=[layer.branches[0]._replace(a=a, b=b)],
            )
            for layer, a, b in zip(layers, leaves[1::2], leaves[2::2], strict=True)
        ]
        plans = nullcontext() if forced is None else planner.forced("torch", forced)
        with plans:
            backend = "reference" if forced is None else "triton"
            ys = delta_linear_group(leaves[0], given, backend=backend)
            found.append(torch.autograd.grad(ys, leaves, [g.to(kind) for g in grads]))
    for got, again, low, want in zip(*found, strict=True):
        assert_accurate(got, want, low, "group")
        assert torch.equal(got, again)


@pytest.mark.parametrize(("n", "k", "rank"), [(300, 2048, 16), (257, 71, 20), (64, 4096, 128)])
@dtypes
def test_dora_norm(dtypes: Types, n: int, k: int, rank: int) -> None:
    torch.manual_seed(0)
    weight, (a, b, *_) = normal(n, k, dtype=dtypes[0]), branch(n, k, rank, dtypes[1])
    found, again = (dora_norm(weight, a, b, 0.7, backend="triton") for _ in range(2))
    with torch.no_grad():
        oracle = dora_reference.forward(weight.double(), a.double(), b.double(), 0.7)
        low = dora_reference.forward(weight, a, b, 0.7)
    assert_accurate(found, oracle, low, "norms")
    assert torch.equal(found, again)


@pytest.mark.parametrize("kind", [quantize_int8, quantize_nf4])
# codes read in the product by either height of its tiles, W made for many rows, and for blocks
# that end within a row
@pytest.mark.parametrize(("m", "k"), [(5, 256), (300, 256), (1100, 256), (40, 70)])
@dtypes
def test_quantised_weights(
    dtypes: Types, m: int, k: int, kind: Callable[[Tensor], QuantizedWeight]
) -> None:
    torch.manual_seed(0)
    dtype, n = dtypes[0], 136
    weight = kind(normal(n, k, dtype=FULL, scale=k**-0.5))
    x, bias = normal(m, k, dtype=dtype).requires_grad_(), normal(n, dtype=dtype)
    r = branch(n, k, 20, dtypes[1])
    dense, grad_y = dequantize(weight, dtype), normal(m, n, dtype=dtype)

    def results(y: Tensor, x: Tensor, r: Branch, grad_y: Tensor) -> list[Tensor]:
        return [y, *torch.autograd.grad(y, [x, r.a, r.b], grad_y)]

    found, again = (
        results(quantized_linear(x, weight, bias, [r], backend="triton"), x, r, grad_y)
        for _ in range(2)
    )
    low = results(delta_linear(x, dense, bias, [r], backend="reference"), x, r, grad_y)
    x, dense, bias, a, b, grad_y = (t.detach().double() for t in (x, dense, bias, r.a, r.b, grad_y))
    r = r._replace(a=a.requires_grad_(), b=b.requires_grad_())
    y = delta_linear(x.requires_grad_(), dense, bias, [r], backend="reference")
    oracle = results(y, x, r, grad_y)
    for i, (got, same, want, eager) in enumerate(zip(found, again, oracle, low, strict=True)):
        assert_accurate(got, want, eager, f"result {i}")
        assert torch.equal(got, same)


@pytest.mark.parametrize(("b", "length", "tokens", "d"), [(3, 20, 50, 1050), (2, 3, 0, 17)])
@dtypes
def test_prompt_embedding(dtypes: Types, b: int, length: int, tokens: int, d: int) -> None:
    torch.manual_seed(0)
    table, prompt = normal(30, d, dtype=dtypes[0]), normal(length, d, dtype=dtypes[1])
    ids = torch.randint(30, (tokens, b), device=DEVICE).t()
    y = prompt_embedding(prompt.requires_grad_(), ids, table, backend="triton")
    with torch.no_grad():
        assert torch.equal(y, prompt_reference.forward(prompt, ids, table))
    grad_y = normal(*y.shape, dtype=dtypes[0])
    (grad,) = torch.autograd.grad(y, [prompt], grad_y)
    assert torch.equal(grad, prompt_reference.backward(grad_y, length, dtypes[1]))
    if tokens:
        wrong = ids.clone()
        wrong[1, 2] = 30
        lost = prompt_embedding(prompt, wrong, table, backend="triton").isnan()
        assert lost.all(2).nonzero().tolist() == [[1, length + 2]]
