"""Adapters, norms, gated products and rotations of the Triton backend on a real GPU. `make gpu`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaops.backends.triton import TritonBackend
from deltaops.reference import bottleneck, gated, norm_bias, rotary
from deltaops.testing import (
    BOTTLENECK_CASES,
    GATED_CASES,
    NORM_BIAS_CASES,
    ROTARY_CASES,
    BottleneckCase,
    BottleneckTensors,
    GatedCase,
    NormBiasCase,
    RotaryCase,
    assert_accurate,
    relative_error,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
]
RUN = TritonBackend()
FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
NAN = float("nan")
DTYPES = {"f32": (FULL, FULL), "f16": (HALF, HALF), "bf16": (BRAIN, BRAIN), "mixed": (BRAIN, FULL)}
dtypes = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
# one program for its rows from 64 programs on; more ranks than a program has lanes
ADAPTERS = (
    *BOTTLENECK_CASES,
    BottleneckCase(1100, 256, 64, "gelu", "layer"),
    BottleneckCase(1100, 256, 16, "silu", "rms", "other"),
    BottleneckCase(1100, 130, 128, "relu", "layer"),
    BottleneckCase(200, 512, 200, "gelu", "layer"),
    # 32 rows a program
    BottleneckCase(4200, 256, 64, "gelu", "layer"),
    BottleneckCase(4200, 256, 128, "gelu", "layer"),
)


def hold(run: Callable[[], list[Tensor]], oracle: list[Tensor], *low: list[Tensor]) -> None:
    """``run()`` twice against ``oracle``, with the error of ``low``; of several, the largest."""
    for i, (got, same, want, *plain) in enumerate(zip(run(), run(), oracle, *low, strict=True)):
        baseline = max(plain, key=lambda t: relative_error(t, want))
        assert_accurate(got, want, baseline, f"result {i}")
        assert torch.equal(got, same)


ORDERS = 8
"""Of the columns, in which the reference sums up. Where all of a gradient hangs on one sum, as
dbeta does on dhᵀ 1 of a single rank, its error in one order is a single draw, which may be next to
nothing by luck."""


def in_order(t: Tensor | None, order: Tensor, dim: int) -> Tensor | None:
    return None if t is None else t.index_select(dim, order)


def reordered(t: BottleneckTensors, order: Tensor) -> BottleneckTensors:
    """The same adapter with its K columns in another order."""
    x, down = t.x.index_select(1, order), t.down.index_select(1, order)
    return replace(
        t,
        x=x,
        residual=x if t.residual is t.x else in_order(t.residual, order, 1),
        gamma=in_order(t.gamma, order, 0),
        beta=in_order(t.beta, order, 0),
        down=down,
        up=t.up.index_select(0, order),
        up_bias=in_order(t.up_bias, order, 0),
    )


def low_gradients(
    t: BottleneckTensors, grad_y: Tensor, state: list[Tensor], order: Tensor
) -> list[Tensor]:
    """The reference's, of the columns in ``order``, put back into their own."""
    moved, back, needs = reordered(t, order), order.argsort(), t.needs()
    given = moved.backward_arguments(grad_y.index_select(1, order), *state)
    dims = {"x": 1, "gamma": 0, "beta": 0, "down": 1, "up": 0, "up_bias": 0}
    grads = zip(t.leaves(), bottleneck.backward(*given, needs), strict=True)
    return [g.index_select(dims[name], back) if name in dims else g for name, g in grads]


def cuda(t: Any) -> Any:
    """The same values on the GPU, with the same strides, between NaN: ``Tensor.cuda`` would lay a
    view that is not dense side by side."""
    if not isinstance(t, Tensor):
        return t
    extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    room = torch.full((max(extent, 0) + 128,), NAN, dtype=t.dtype, device="cuda")
    there = room.as_strided(t.shape, t.stride(), 64).copy_(t)
    assert there.stride() == t.stride()
    return there


@pytest.mark.parametrize("case", ADAPTERS, ids=str)
@dtypes
def test_bottleneck(case: BottleneckCase, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    here = case.tensors(dtypes[0], parameter_dtype=dtypes[1])
    own = here.residual is here.x
    given = {name: cuda(value) for name, value in vars(here).items()}
    t: BottleneckTensors = replace(here, **given)
    t = replace(t, residual=t.x) if own else t
    wide, grad_y, needs = t.to(torch.float64), cuda(case.grad_y(dtypes[0])), t.needs()
    oracle, low = (bottleneck.forward(*u.forward_arguments()) for u in (wide, t))
    # one state for all: a ReLU flips where h rounds across 0, and that is not backward's error
    state = [s.float() for s in oracle[1:]]
    wide_state = grad_y.double(), *(s.double() for s in state)

    def run() -> list[Tensor]:
        backward = t.backward_arguments(grad_y, *state)
        forward = RUN.bottleneck_forward(*t.forward_arguments())
        return [*forward, *RUN.bottleneck_backward(*backward, needs)]

    drawn = torch.Generator().manual_seed(0)
    orders = [torch.randperm(case.k, generator=drawn) for _ in range(ORDERS - 1)]
    hold(
        run,
        [*oracle, *bottleneck.backward(*wide.backward_arguments(*wide_state), needs)],
        *(
            [*low, *low_gradients(t, grad_y, state, order.cuda())]
            for order in (torch.arange(case.k), *orders)
        ),
    )


@pytest.mark.parametrize(
    "case", [*NORM_BIAS_CASES, NormBiasCase(30, 9000), NormBiasCase(700, 4096, "rms")], ids=str
)
@dtypes
def test_norm_bias(case: NormBiasCase, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    tensors = case.tensors(dtypes[0], parameter_dtype=dtypes[1])
    given = [cuda(t) for t in (case.grad_y(dtypes[0]), *tensors)]
    needs = [True, case.gamma, case.bias]

    def results(forward: Any, backward: Any, kind: torch.dtype, *given: Any) -> list[Tensor]:
        grad, x, gamma, bias = given
        y, stats = forward(x, gamma, bias, 1e-5, case.norm)
        return [y, stats, *backward(grad, x, stats, gamma, kind, case.norm, needs)]

    plain = norm_bias.forward, norm_bias.backward
    wide = [None if t is None else t.double() for t in given]
    hold(
        lambda: results(RUN.norm_bias_forward, RUN.norm_bias_backward, dtypes[1], *given),
        results(*plain, torch.float64, *wide),
        results(*plain, dtypes[1], *given),
    )


@pytest.mark.parametrize("case", GATED_CASES, ids=str)
@pytest.mark.parametrize("dtype", [FULL, HALF, BRAIN], ids=str)
def test_gated(case: GatedCase, dtype: torch.dtype) -> None:
    gate, up = case.tensors(dtype)  # converted before it is cut: the halves keep their strides
    if dtype == HALF and case.spread > 2.0:
        pytest.skip("the reference's own products leave float16")
    given = [cuda(t) for t in (case.grad_y(dtype), gate, up)]

    def results(forward: Any, backward: Any, *given: Tensor) -> list[Tensor]:
        kind = case.activation
        return [forward(*given[1:], kind), *backward(*given, kind, [True, True])]

    plain = gated.forward, gated.backward
    hold(
        lambda: results(RUN.gated_forward, RUN.gated_backward, *given),
        results(*plain, *(t.double() for t in given)),
        results(*plain, *given),
    )


@pytest.mark.parametrize("case", ROTARY_CASES, ids=str)
@pytest.mark.parametrize("dtype", [FULL, HALF, BRAIN], ids=str)
def test_rotary(case: RotaryCase, dtype: torch.dtype) -> None:
    given = [cuda(t) for t in (*case.tensors(dtype), case.grad_y(dtype))]

    def results(forward: Any, backward: Any, *given: Tensor) -> list[Tensor]:
        x, cos, sin, grad_y = given
        ours = [forward(x, cos, sin, first) for first in (False, True)]
        return [*ours, backward(grad_y, cos, sin, True)]

    plain = rotary.forward, rotary.backward
    hold(
        lambda: results(RUN.rotary_forward, RUN.rotary_backward, *given),
        results(*plain, *(t.double() for t in given)),
        results(*plain, *given),
    )
