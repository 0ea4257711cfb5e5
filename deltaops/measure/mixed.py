"""A batch that mixes eight LoRA adapters, beside the same batch with one: what mixing costs.

Samples are shuffled: neighbouring rows have one adapter, neighbouring samples different ones. Rows
that are shuffled one by one are timed too: that is the worst order, and no goal's. So is a batch
whose rows all have one of the eight: what that costs is the routing's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from deltaops.ops import Branch, delta_linear
from deltaops.reference import delta_linear as reference
from deltaops.testing import assert_accurate

from .cases import DTYPES, RANK, SCALING
from .cell import MIXED, MIXED_ROWS, OURS, ROUTED, Cell
from .interleave import interleaved

ADAPTERS = 8
SHAPES = ((1024, 512, 512), (1024, 768, 768))


def measure_mixed(
    shape: tuple[int, int, int], dtype: str, *, rounds: int = 15, seconds: float = float("inf")
) -> Cell:
    """Hold the mixed batches to float64, then time forward and backward.

    Args:
        shape: M, N, K; M in eight samples.
        dtype: "f32" or "bf16"; adapters are float32.
        rounds: at most.
        seconds: for the timing, all peers together.
    Raises: AssertionError from the gate.
    """
    m, n, k = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator) * scale

    kind = DTYPES[dtype]
    x, weight, grad = (
        normal(m, k).to(kind).requires_grad_(), normal(n, k, scale=k**-0.5).to(kind),
        normal(m, n).to(kind),
    )  # fmt: skip
    bias = normal(n).to(kind)
    branches = [
        Branch(
            normal(RANK, k, scale=k**-0.5).requires_grad_(),
            normal(n, RANK, scale=RANK**-0.5).requires_grad_(),
            SCALING,
        )
        for _ in range(ADAPTERS)
    ]
    samples = torch.randperm(ADAPTERS, generator=generator)[torch.arange(m) * ADAPTERS // m]
    rows = samples[torch.randperm(m, generator=generator)]

    def run(used: list[Branch], adapter: Tensor | None) -> list[Tensor]:
        y = delta_linear(x, weight, bias, used, adapter)
        leaves = [x, *[r.a for r in used], *[r.b for r in used]]
        return [y, *torch.autograd.grad(y, leaves, grad)]

    peers: dict[str, Callable[[], list[Tensor]]] = {
        OURS: partial(run, branches[:1], None),
        ROUTED: partial(run, branches, torch.zeros_like(samples)),
        MIXED: partial(run, branches, samples),
        MIXED_ROWS: partial(run, branches, rows),
    }
    for name, adapter in ((MIXED, samples), (MIXED_ROWS, rows)):
        oracle, baseline = (
            _answer(x, weight, bias, branches, adapter, grad, wide) for wide in (True, False)
        )
        for i, (got, exact, usual) in enumerate(zip(peers[name](), oracle, baseline, strict=True)):
            assert_accurate(got, exact, usual, f"{name} {m}×{n}×{k} {dtype} result {i}")
    timed = interleaved(peers, rounds=rounds, seconds=seconds)
    return Cell("mixed", f"{m}×{n}×{k}", dtype, 0.0, timed, shape=shape, rank=RANK)


@torch.no_grad()
def _answer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    branches: list[Branch],
    adapter: Tensor,
    grad: Tensor,
    wide: bool,
) -> list[Tensor]:
    """y and the gradients of x, a… and b… by the reference, in float64 where ``wide``."""

    def cast(t: Tensor) -> Tensor:
        return t.double() if wide else t

    count = len(branches)
    a, b = [cast(r.a) for r in branches], [cast(r.b) for r in branches]
    settings = [SCALING] * count, [0.0] * count, ["identity"] * count, None
    x, weight = cast(x), cast(weight)
    y, s = reference.forward(
        x, weight, cast(bias), a, b, [None] * count, *settings, adapter=adapter
    )
    needs = [True, False, *[True] * (2 * count), *[False] * count]
    return [
        y,
        *reference.backward(cast(grad), x, weight, a, b, s, *settings, needs, adapter=adapter),
    ]
