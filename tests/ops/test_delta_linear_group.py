"""Layers of the same x, together: the bits of each alone, and one gradient of x."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaops.errors import GradientError, ShapeError
from deltaops.ops import Branch, Layer, delta_linear, delta_linear_group
from deltaops.testing import assert_accurate

Made = tuple[Tensor, list[Layer]]


def make(
    m: int,
    k: int,
    widths: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    ranks: Sequence[Sequence[int]] | None = None,
    dropout: float = 0.0,
    columns: bool = False,
    bias: bool = True,
) -> Made:
    """x and layers with trainable branches and bias, all leaves."""
    torch.manual_seed(1)
    x = torch.randn(m, k, dtype=torch.float64).to(dtype).requires_grad_()
    layers = []
    for i, n in enumerate(widths):
        weight = (torch.randn(n, k, dtype=torch.float64) / k**0.5).to(dtype)
        if columns:
            weight = weight.t().contiguous().t()
        branches = []
        for j, r in enumerate((4,) if ranks is None else ranks[i]):
            a = (torch.randn(r, k, dtype=torch.float64) / k**0.5).float().requires_grad_()
            b = torch.randn(n, r, dtype=torch.float64).float().requires_grad_()
            activation = ("identity", "relu", "silu")[j % 3]
            inner = torch.randn(r).requires_grad_() if j else None
            branches.append(Branch(a, b, 1.5 - 0.3 * i, dropout * (j == 0), activation, inner))
        own = torch.randn(n).to(dtype).requires_grad_() if bias else None
        layers.append(Layer(weight, own, branches))
    return x, layers


def leaves(made: Made) -> list[Tensor]:
    x, layers = made
    found = [x]
    for layer in layers:
        found += [] if layer.bias is None else [layer.bias]
        for r in layer.branches:
            found += [r.a, r.b, *([] if r.bias is None else [r.bias])]
    return found


def like(made: Made, dtype: torch.dtype) -> Made:
    """The same numbers in another dtype, as leaves of their own."""

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad)

    x, layers = made
    return cast(x), [  # type: ignore[return-value]  # what is there stays there
        Layer(
            layer.weight.to(dtype),
            cast(layer.bias),
            [r._replace(a=cast(r.a), b=cast(r.b), bias=cast(r.bias)) for r in layer.branches],
        )
        for layer in layers
    ]


def alone(x: Tensor, layers: Sequence[Layer], backend: str = "auto") -> list[Tensor]:
    return [delta_linear(x, *layer, backend=backend) for layer in layers]


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    torch.manual_seed(2)
    dy = [torch.randn(y.shape, dtype=torch.float64).to(y.dtype) for y in outputs]
    return list(torch.autograd.grad(outputs, inputs, dy))


SHAPES = {
    "odd": (7, 12, (5, 9, 3)),
    "one row": (1, 40, (33, 17)),
    "few rows": (6, 70, (64, 64, 64)),
    "blocks of rows and k": (401, 1100, (48, 130)),
    "no rows": (0, 12, (5, 9)),
    "no outputs": (7, 12, (5, 0, 3)),
    "conflicting rows": (40, 1024, (16, 40, 16)),
}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_have_the_bits_of_each_alone_and_gradients_are_accurate(
    shape: tuple[int, int, tuple[int, ...]], dtype: torch.dtype, threads: int
) -> None:
    ranks = [(3,), (16, 5), ()][: len(shape[2])]
    made = make(*shape, dtype, ranks=ranks)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = delta_linear_group(*made)
        again = delta_linear_group(*made)
        single = alone(*made)
        assert all(torch.equal(y, z) for y, z in zip(together, single, strict=True))
        got, repeat = gradients(together, leaves(made)), gradients(again, leaves(made))
        separate = gradients(single, leaves(made))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(g, h) for g, h in zip(got, repeat, strict=True))
    wide = like(made, torch.float64)
    oracle = gradients(alone(*wide, backend="reference"), leaves(wide))
    for i, (mine, theirs, truth) in enumerate(zip(got, separate, oracle, strict=True)):
        if i == 0:
            assert_accurate(mine, truth, theirs, "gradient of x")
        else:
            assert torch.equal(mine, theirs), i


@pytest.mark.parametrize("columns", [False, True], ids=["Linear", "Conv1D"])
def test_dropout_draws_what_the_layers_alone_draw(columns: bool) -> None:
    made = make(33, 64, (48, 20), ranks=[(4, 2), (8,)], dropout=0.3, columns=columns)
    results = []
    for run in (delta_linear_group, alone):
        torch.manual_seed(5)
        outputs = run(*made)
        state = torch.get_rng_state()
        results.append((outputs, gradients(outputs, leaves(made)), state))
    (ours, grads, state), (theirs, separate, after) = results
    assert torch.equal(state, after)
    assert all(torch.equal(y, z) for y, z in zip(ours, theirs, strict=True))
    torch.testing.assert_close(grads[0], separate[0])
    assert all(torch.equal(g, h) for g, h in zip(grads[1:], separate[1:], strict=True))


def test_packed_weights_give_the_same_bits() -> None:
    made = make(50, 300, (256, 320))  # large enough to be packed at the second use
    first = delta_linear_group(*made)
    grads = gradients(first, leaves(made))
    for _ in range(3):
        later = delta_linear_group(*made)
        assert all(torch.equal(y, z) for y, z in zip(later, first, strict=True))
        found = gradients(later, leaves(made))
        assert all(torch.equal(g, h) for g, h in zip(found, grads, strict=True))


def test_an_unused_output_costs_no_gradient() -> None:
    x, layers = make(9, 16, (8, 8, 8))
    outputs = delta_linear_group(x, layers)
    outputs[1].sum().backward()
    x_alone, layers_alone = make(9, 16, (8, 8, 8))
    delta_linear(x_alone, *layers_alone[1]).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, x_alone.grad)
    for i, layer in enumerate(layers):
        assert (layer.branches[0].a.grad is not None) == (i == 1)


@pytest.mark.parametrize("frozen", ["x", "a", "b", "bias"])
def test_frozen_parts_get_none_and_change_no_other(frozen: str) -> None:
    results = []
    for off in (False, True):
        x, layers = make(9, 16, (8, 12))
        parts = {"x": x, "a": layers[0].branches[0].a, "b": layers[1].branches[0].b,
                 "bias": layers[1].bias}  # fmt: skip
        part = parts[frozen]
        assert part is not None
        part.requires_grad_(not off)
        sum(y.square().sum() for y in delta_linear_group(x, layers)).backward()  # type: ignore[union-attr]  # no int: there are layers
        results.append((part, [t.grad for t in leaves((x, layers))]))
    (_, whole), (part, rest) = results
    assert part.grad is None
    for full, other in zip(whole, rest, strict=True):
        assert other is None or (full is not None and torch.equal(full, other))


def test_batches_of_tokens_keep_their_shape() -> None:
    x, layers = make(12, 16, (8, 20))
    flat = delta_linear_group(x, layers)
    deep = delta_linear_group(x.view(3, 4, 16), layers)
    for y, z in zip(flat, deep, strict=True):
        assert z.shape == (3, 4, y.shape[-1])
        assert torch.equal(z.flatten(0, 1), y)
        z.add_(1.0)  # a result, no view of one


def test_the_reference_and_the_compiler_take_layer_after_layer() -> None:
    x, layers = make(9, 16, (8, 12))
    ours = delta_linear_group(x, layers, backend="reference")
    assert all(torch.equal(y, z) for y, z in zip(ours, alone(x, layers, "reference"), strict=True))
    compiled = torch.compile(delta_linear_group, fullgraph=True, backend="aot_eager")
    for y, z in zip(compiled(x, layers), delta_linear_group(x, layers), strict=True):
        assert torch.equal(y, z)


def test_autocast_and_checkpointing() -> None:
    x, layers = make(9, 16, (8, 12))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = delta_linear_group(x, layers), alone(x, layers)
    assert all(y.dtype is torch.bfloat16 for y in ours)
    assert all(torch.equal(y, z) for y, z in zip(ours, theirs, strict=True))
    plain = gradients(delta_linear_group(x, layers), leaves((x, layers)))
    outputs = checkpoint(delta_linear_group, x, layers, use_reentrant=False)
    found = gradients(outputs, leaves((x, layers)))
    assert all(torch.equal(g, h) for g, h in zip(plain, found, strict=True))


def test_no_grad_and_one_layer_and_none() -> None:
    x, layers = make(9, 16, (8, 12))
    with torch.no_grad():
        for y, z in zip(delta_linear_group(x, layers), alone(x, layers), strict=True):
            assert torch.equal(y, z)
            assert not y.requires_grad
    (single,) = delta_linear_group(x, layers[:1])
    assert torch.equal(single, delta_linear(x, *layers[0]))
    assert delta_linear_group(x, []) == []


def test_bad_layers_are_refused_as_alone() -> None:
    x, layers = make(9, 16, (8, 12))
    with pytest.raises(ShapeError, match=r"x must be \[..., 16\]"):
        delta_linear_group(torch.randn(9, 15), layers)
    with pytest.raises(GradientError, match="weight is frozen"):
        delta_linear_group(
            x, [layers[0], layers[1]._replace(weight=nn.Parameter(layers[1].weight))]
        )
