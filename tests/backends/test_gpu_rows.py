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


def hold(run: Callable[[], list[Tensor]], oracle: list[Tensor], low: list[Tensor]) -> None:
    """``run()`` twice against ``oracle``, with the error of ``low``."""
    for i, (got, same, want, plain) in enumerate(zip(run(), run(), oracle, low, strict=True)):
        assert_accurate(got, want, plain, f"result {i}")
        assert torch.equal(got, same)


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


DRAWS = 16
"""Of a single rank, whose dbeta hangs on one number, the sum of dh: its error is a draw of chance,
and so is the reference's, which sets the bound. The same bound holds for many draws together."""


@pytest.mark.parametrize("case", ADAPTERS, ids=str)
@dtypes
def test_bottleneck(case: BottleneckCase, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    drawn = [bottleneck_results(case, dtypes, seed) for seed in range(DRAWS if case.r == 1 else 1)]
    for i, each in enumerate(zip(*(zip(*one, strict=True) for one in drawn), strict=True)):
        got, same, want, plain = (torch.stack(results) for results in zip(*each, strict=True))
        assert_accurate(got, want, plain, f"result {i}")
        assert torch.equal(got, same)


def bottleneck_results(
    case: BottleneckCase, dtypes: tuple[torch.dtype, torch.dtype], seed: int
) -> list[list[Tensor]]:
    """Ours twice, in float64, and the reference's own."""
    here = case.tensors(dtypes[0], parameter_dtype=dtypes[1], seed=2 * seed)
    own = here.residual is here.x
    given = {name: cuda(value) for name, value in vars(here).items()}
    t: BottleneckTensors = replace(here, **given)
    t = replace(t, residual=t.x) if own else t
    grad_y = cuda(case.grad_y(dtypes[0], seed=2 * seed + 1))
    wide, needs = t.to(torch.float64), t.needs()
    oracle, low = (bottleneck.forward(*u.forward_arguments()) for u in (wide, t))
    # one state for all: a ReLU flips where h rounds across 0, and that is not backward's error
    state = [s.float() for s in oracle[1:]]
    wide_state = grad_y.double(), *(s.double() for s in state)

    def run() -> list[Tensor]:
        backward = t.backward_arguments(grad_y, *state)
        forward = RUN.bottleneck_forward(*t.forward_arguments())
        return [*forward, *RUN.bottleneck_backward(*backward, needs)]

    return [
        run(),
        run(),
        [*oracle, *bottleneck.backward(*wide.backward_arguments(*wide_state), needs)],
        [*low, *bottleneck.backward(*t.backward_arguments(grad_y, *state), needs)],
    ]


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
