"""A view whose memory has the signs the other way round (``z.conj().imag``) is what it says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deltaops import ops
from deltaops.ops import Branch, Layer

Op = Callable[..., Tensor]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flipped(t: Tensor) -> Tensor:
    """The same numbers, with their negatives in memory."""
    view = torch._neg_view(-t)
    assert view.is_neg()
    return view


A, B = numbers(3, 8, seed=8), numbers(8, 3, seed=9)
OPS: dict[str, tuple[Op, list[Tensor]]] = {
    "delta_linear": (
        lambda x, w, b: ops.delta_linear(x, w, b, [Branch(A, B)]),
        [numbers(5, 8), numbers(8, 8, seed=1), numbers(8, seed=2)],
    ),
    "branch": (
        lambda a, b: ops.delta_linear(numbers(5, 8), numbers(8, 8, seed=1), None, [Branch(a, b)]),
        [A, B],
    ),
    "delta_linear_group": (
        lambda x, w: ops.delta_linear_group(x, [Layer(w, None, [Branch(A, B)]), Layer(w)])[0],
        [numbers(5, 8), numbers(8, 8, seed=1)],
    ),
    "bottleneck": (lambda x, a, b: ops.bottleneck(x, a, b), [numbers(5, 8), A, B]),
    "norm_bias": (lambda x, g, b: ops.norm_bias(x, g, b), [numbers(5, 8), A[0], A[1]]),
    "gated": (lambda g, u: ops.gated(g, u, "silu"), [numbers(5, 8), numbers(5, 8, seed=1)]),
    "rotary": (
        lambda x, c, s: ops.rotary(x, c, s),
        [numbers(1, 2, 3, 8), numbers(1, 3, 8, seed=1), numbers(1, 3, 8, seed=2)],
    ),
    "attention": (
        lambda q, k, v: ops.attention(q, k, v, causal=True),
        [numbers(1, 2, 60, 8, seed=i) for i in range(3)],
    ),
    "prefix_attention": (
        lambda q, k, v, pk, pv: ops.prefix_attention(q, k, v, pk, pv),
        [*(numbers(1, 2, 9, 8, seed=i) for i in range(3)),
         *(numbers(2, 4, 8, seed=i) for i in (4, 5))],
    ),
    "cross_entropy": (
        lambda x: ops.cross_entropy(x, torch.tensor([1, 0, 3, 2, 7])),
        [numbers(5, 8)],
    ),
}  # fmt: skip
TRAINED = {"delta_linear": (0, 2), "branch": (0, 1), "delta_linear_group": (0,), "rotary": (0,)}
"""Which arguments have gradients, where not all do."""


@pytest.mark.parametrize("name", OPS)
def test_each_tensor_may_be_such_a_view(name: str) -> None:
    op, tensors = OPS[name]
    want = op(*tensors)
    for at in range(len(tensors)):
        given = [flipped(t) if i == at else t for i, t in enumerate(tensors)]
        assert torch.equal(op(*given), want), f"tensor {at}"


@pytest.mark.parametrize("name", OPS)
def test_so_may_the_gradient(name: str) -> None:
    op, tensors = OPS[name]
    trained = TRAINED.get(name, range(len(tensors)))
    leaves = [t.clone().requires_grad_(i in trained) for i, t in enumerate(tensors)]
    y = op(*leaves)
    grad = numbers(*y.shape, seed=7)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    want = torch.autograd.grad(y, wanted, grad, retain_graph=True)
    got = torch.autograd.grad(y, wanted, flipped(grad))
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)
