"""The public op with an adapter for each row: one by one it gives the same, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import deltaops
from deltaops.errors import ConfigError, DeviceError, DtypeError, NoBackendError, ShapeError
from deltaops.ops import Branch, Layer, delta_linear, delta_linear_group
from deltaops.testing import DeltaLinearCase

RANKS = (1, 3, 8, 5)
IDS = torch.tensor([2, -1, 0, 3, 0, 2, 2, -1, 3, 0, 2])
"""Unsorted; nobody has branch 1."""
CASE = DeltaLinearCase(11, 7, 12, RANKS)


def leaves(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    t = CASE.tensors(dtype)
    tensors = [t.x, t.bias, *t.a, *t.b]
    return t.weight, [u.detach().clone().requires_grad_() for u in tensors if u is not None]


def branches(inputs: list[Tensor], dropout: float = 0.0) -> list[Branch]:
    a, b = inputs[2:6], inputs[6:]
    return [Branch(a[i], b[i], 2.0 / (1 + i), dropout * (i != 2)) for i in range(4)]


def run(weight: Tensor, inputs: list[Tensor], backend: str = "auto", **kwargs: object) -> Tensor:
    return delta_linear(
        inputs[0], weight, inputs[1], branches(inputs), adapter=IDS, backend=backend, **kwargs
    )


def test_gradcheck() -> None:
    t = DeltaLinearCase(4, 2, 9, (1, 2, 1), activation=("identity", "identity", "silu")).tensors(
        torch.float64
    )
    inputs = [u.clone().requires_grad_() for u in (t.x, *t.a, *t.b)]
    ids = torch.tensor([2, -1, 0, 2])

    def seeded(x: Tensor, *given: Tensor) -> Tensor:
        torch.manual_seed(3)
        a, b = given[:3], given[3:]
        rows = [Branch(a[i], b[i], 0.5, 0.3 * (i == 0), t.activation[i]) for i in range(3)]
        return delta_linear(x, t.weight, t.bias, rows, ids, backend="reference")

    assert torch.autograd.gradcheck(seeded, inputs)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float64), ("cpu", torch.float32)]
)
def test_the_same_as_one_by_one(backend: str, dtype: torch.dtype) -> None:
    weight, inputs = leaves(dtype)
    grad_y = CASE.grad_y(dtype)
    got = torch.autograd.grad(run(weight, inputs, backend), inputs, grad_y, allow_unused=True)
    weight, inputs = leaves(dtype)
    pieces = []
    for x, row in zip(inputs[0].split(1), IDS.tolist(), strict=True):
        own = branches(inputs)[row : row + 1] if row >= 0 else []
        pieces.append(delta_linear(x, weight, inputs[1], own, backend=backend))
    y = torch.cat(pieces)
    torch.testing.assert_close(run(weight, inputs, backend), y)
    want = torch.autograd.grad(y, inputs, grad_y, allow_unused=True)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_one_adapter_are_the_plain_call(dtype: torch.dtype) -> None:
    t = DeltaLinearCase(70, 33, 40, (5, 3), dropout=(0.3, 0.1)).tensors(dtype)
    first, second = (Branch(t.a[i], t.b[i], 1.5, t.dropout[i]) for i in range(2))
    results = []
    for own, adapter in (([first], None), ([first, second], torch.zeros(70, dtype=torch.int32))):
        torch.manual_seed(5)
        x = t.x.clone().requires_grad_()
        y = delta_linear(x, t.weight, t.bias, own, adapter=adapter)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), x)])
    torch.testing.assert_close(*results)


def test_dropout_drops_the_same_elements_in_both_backends() -> None:
    results = []
    for backend in ("cpu", "reference"):
        weight, inputs = leaves(torch.float32)
        torch.manual_seed(4)
        y = delta_linear(
            inputs[0], weight, None, branches(inputs, 0.4), adapter=IDS, backend=backend
        )
        used = [inputs[0], *inputs[2:]]
        results.append([y, *torch.autograd.grad(y.square().sum(), used)])
    torch.testing.assert_close(*results)


def test_leading_dimensions_and_numbers_of_both_widths() -> None:
    weight, inputs = leaves(torch.float32)
    x = torch.randn(2, 3, 12)
    want = delta_linear(x, weight, None, branches(inputs), adapter=IDS[:6].reshape(2, 3))
    strided = torch.stack([IDS[:6], IDS[:6]], 1).int()[:, 0].reshape(2, 3)
    flat = delta_linear(x.reshape(6, 12), weight, None, branches(inputs), adapter=strided.flatten())
    assert want.shape == (2, 3, 7)
    assert torch.equal(flat.reshape(2, 3, 7), want)


def test_eager_and_compiled_agree() -> None:
    weight, inputs = leaves(torch.float32)
    compiled = torch.compile(
        lambda ids, *given: delta_linear(
            given[0], weight, given[1], branches(list(given)), adapter=ids
        ).square(),
        fullgraph=True,
    )
    for ids in (IDS, IDS.flip(0)):
        got = compiled(ids, *inputs)
        want = delta_linear(inputs[0], weight, inputs[1], branches(inputs), adapter=ids).square()
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), inputs)
        )
    with pytest.raises(ConfigError, match="got 4"):
        compiled(torch.where(IDS == 3, 4, IDS), *inputs)


def test_vmap_agrees_with_a_loop() -> None:
    weight, inputs = leaves(torch.float32)
    inputs = [t.detach() for t in inputs]
    xs, ids = torch.randn(3, 11, 12), torch.stack([IDS, IDS.flip(0), IDS.roll(1)])

    def one(x: Tensor, adapter: Tensor) -> Tensor:
        return delta_linear(x, weight, None, branches(inputs), adapter=adapter)

    want = torch.stack([one(x, i) for x, i in zip(xs, ids, strict=True)])
    torch.testing.assert_close(torch.vmap(one)(xs, ids), want)


def test_autocast() -> None:
    weight, inputs = leaves(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(weight, inputs)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().sum(), inputs)
    assert all(g.dtype == torch.float32 for g in grads)


def test_a_group_gives_what_its_layers_give() -> None:
    """Each layer has its own numbers: an adapter may be on q and v, and not on k."""
    weight, inputs = leaves(torch.float32)
    every = branches(inputs)
    layers = [
        Layer(weight, inputs[1], every, IDS),
        Layer(torch.randn(9, 12)),
        Layer(weight, None, every[:2], torch.where(IDS > 1, -1, IDS)),
        Layer(weight, None, every[:1]),
    ]
    together = delta_linear_group(inputs[0], layers)
    alone = [delta_linear(inputs[0], *layer) for layer in layers]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)
    grads = [
        torch.autograd.grad(sum(y.square().sum() for y in ys), inputs) for ys in (together, alone)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("first", range(3))
def test_a_group_sums_over_rows_in_the_order_of_each_layer_alone(first: int) -> None:
    """Rows are cut by the number of branches, which is each layer's own."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    x, layers, trained = normal(700, 12).requires_grad_(), [], []
    for count in (3, 1, 2):
        rows = [
            Branch(normal(r, 12).requires_grad_(), normal(9, r).requires_grad_())
            for r in range(1, count + 1)
        ]
        ids = torch.randint(-1, count, (700,), generator=generator) if count > 1 else None
        layers.append(Layer(normal(9, 12), normal(9).requires_grad_(), rows, ids))
        trained.append([layers[-1].bias, *[t for row in rows for t in (row.a, row.b)]])
    order = [*range(first, 3), *range(first)]
    layers, inputs = [layers[i] for i in order], [t for i in order for t in trained[i]]
    grads = [
        torch.autograd.grad(sum(y.square().sum() for y in ys), [x, *inputs])
        for ys in (delta_linear_group(x, layers), [delta_linear(x, *one) for one in layers])
    ]
    torch.testing.assert_close(grads[0][0], grads[1][0])
    assert all(torch.equal(one, other) for one, other in zip(*(g[1:] for g in grads), strict=True))


X, W = torch.randn(4, 12), torch.randn(7, 12)
A, B = torch.randn(3, 12), torch.randn(7, 3)
REFUSED = {
    "float": (DtypeError, "int32 or int64", torch.zeros(4)),
    "bool": (DtypeError, "int32 or int64", torch.zeros(4, dtype=torch.bool)),
    "short": (ShapeError, r"must be \[4\].*got \[3\]", torch.zeros(3, dtype=torch.int64)),
    "matrix": (ShapeError, r"must be \[4\]", torch.zeros(4, 1, dtype=torch.int64)),
    "device": (DeviceError, "adapter must be on", torch.zeros(4, dtype=torch.int64, device="meta")),
    "above": (ConfigError, r"0 to 0, or -1 .*got 1\.", torch.tensor([0, 1, 0, 0])),
    "below": (ConfigError, r"got -2\.", torch.tensor([0, -1, -2, 0])),
    "above-32-bits": (ConfigError, "got 4294967296", torch.tensor([0, 0, 0, 2**32])),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("error", "message", "adapter"), REFUSED.values(), ids=REFUSED)
def test_bad_numbers_are_refused(
    error: type[Exception], message: str, adapter: Tensor, backend: str
) -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(error, match=message):
        delta_linear(x, W, None, [Branch(A, B)], adapter=adapter, backend=backend)
    assert torch.equal(x, X)


def test_explain_says_that_rows_have_adapters_of_their_own() -> None:
    told = deltaops.explain(X, W, None, [Branch(A, B)], adapter=torch.zeros(4, dtype=torch.int64))
    assert told.chosen == "cpu"
    assert re.search("with an adapter for each row", str(told))
    with pytest.raises(NoBackendError, match="an adapter for each row"):
        delta_linear(X.double(), W.double(), adapter=torch.full((4,), -1), strict=True)
