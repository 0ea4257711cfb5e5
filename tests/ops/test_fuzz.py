"""No tensor crashes an op: what it takes is right, and what it refuses has a sentence."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaops import ops
from deltaops.errors import DeltaopsError

M, N, K, R = 6, 5, 8, 3
REFUSALS = (DeltaopsError, ValueError)
"""The native core's own sentences, about memory, come as ValueError."""


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def layer(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, **more: Any) -> Tensor:
    return ops.delta_linear(x, weight, bias, [ops.Branch(a, b, 2.0)], **more)


HEADS = {"q": draw(2, 4, 5, 8), "k": draw(2, 2, 5, 8), "v": draw(2, 2, 5, 8)}
PREFIX = {"prefix_k": draw(2, 3, 8), "prefix_v": draw(2, 3, 8)}
OPS: dict[str, tuple[Callable[..., Tensor], dict[str, Tensor]]] = {
    "delta_linear": (
        layer,
        {"x": draw(M, K), "weight": draw(N, K), "bias": draw(N), "a": draw(R, K), "b": draw(N, R)},
    ),
    "bottleneck": (ops.bottleneck, {"x": draw(M, K), "down": draw(R, K), "up": draw(K, R)}),
    "norm_bias": (ops.norm_bias, {"x": draw(M, K), "gamma": draw(K), "bias": draw(K)}),
    "gated": (ops.gated, {"gate": draw(M, K), "up": draw(M, K)}),
    "rotary": (ops.rotary, {"x": draw(2, 3, 5, 8), "cos": draw(1, 5, 8), "sin": draw(1, 5, 8)}),
    "cross_entropy": (ops.cross_entropy, {"logits": draw(M, K), "target": torch.arange(M)}),
    "attention": (ops.attention, HEADS),
    "prefix_attention": (ops.prefix_attention, HEADS | PREFIX),
}


def misaligned(t: Tensor) -> Tensor:
    raw = np.empty(t.numel() * t.element_size() + 1, np.uint8)[1:]
    memory = raw.view(t.numpy().dtype).reshape(t.shape)
    memory[...] = t.numpy()
    return torch.from_numpy(memory)


def read_only(t: Tensor) -> Tensor:
    memory = t.numpy().copy()
    memory.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own, that it does not know the flag
        return torch.from_numpy(memory)


HOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda t: t,
    "double": Tensor.double,
    "half": Tensor.half,
    "bfloat16": Tensor.bfloat16,
    "integers": Tensor.long,
    "complex": lambda t: t.to(torch.complex64),
    "transposed": lambda t: t.mT if t.dim() > 1 else t,
    "columns first": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "elements apart": lambda t: torch.stack([t, t], -1)[..., 0],
    "every second": lambda t: t[::2],
    "repeated": lambda t: t[:1].expand(t.shape),
    "misaligned": misaligned,
    "read-only": read_only,
    "empty": lambda t: t[:0],
    "deeper": lambda t: t[None],
    "flat": lambda t: t.reshape(-1),
    "a number": lambda t: t.flatten()[0],
}


ODD = st.one_of(st.just("as it is"), st.sampled_from(sorted(HOWS)))


@pytest.mark.parametrize("op", OPS)
def test_no_tensor_crashes_it(op: str) -> None:
    call, tensors = OPS[op]

    @settings(max_examples=25, deadline=None, database=None,
              suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
    @given(st.lists(ODD, min_size=len(tensors), max_size=len(tensors)))
    def check(hows: list[str]) -> None:
        odd = {n: HOWS[how](t) for how, (n, t) in zip(hows, tensors.items(), strict=True)}
        before = {name: t.clone() for name, t in odd.items()}
        with contextlib.suppress(*REFUSALS):
            y = call(**odd)
            torch.testing.assert_close(
                y, call(**odd, backend="reference"), rtol=2e-2, atol=2e-2, equal_nan=True
            )
        assert all(torch.equal(t, before[name]) for name, t in odd.items())

    check()


def test_a_prefix_whose_elements_lie_apart_is_read_whole() -> None:
    """The forward pass once read its copy after that was freed."""
    apart = {name: HOWS["elements apart"](t) for name, t in PREFIX.items()}
    expected = ops.prefix_attention(**HEADS, **PREFIX, backend="cpu")
    for _ in range(20):
        got = ops.prefix_attention(**HEADS, **apart, backend="cpu")
        assert torch.equal(got, expected)
