"""A LoRA layer's forward in one launch on the emulated grid: S made by blocks beside those of y."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaops.testing import assert_accurate

from . import emulated, hopper
from .emulated import Bordered
from .hopper import ProjectArgs, matrix

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SCALING = 0.75
ORDERS = pytest.mark.parametrize("order", range(3), ids=["ascending", "descending", "shuffled"])


@dataclass
class Layer:
    """x, W, A, B and a bias, and the outputs, amid NaN."""

    x: Bordered
    weight: Bordered
    a: Bordered
    b: Bordered
    bias: Bordered | None
    s: Bordered | None
    narrow: Bordered
    out: Bordered

    def operands(self) -> list[Bordered]:
        return [one for one in vars(self).values() if one is not None]

    def args(self, blocks: int, flags: Tensor) -> ProjectArgs:
        tensors = [None if one is None else one.t for one in vars(self).values()]
        return hopper.project_args(*tensors, SCALING, blocks, flags, None)  # type: ignore[arg-type]


def layer(
    m: int, k: int, n: int, r: int, dtype: torch.dtype = BF16, bias: bool = True
) -> Layer:
    return Layer(
        *(matrix(m, k, dtype, 1), matrix(n, k, dtype, 2), matrix(r, k, dtype, 3)),
        *(matrix(n, r, dtype, 4), matrix(1, n, dtype, 5) if bias else None),
        *(Bordered.empty(m, r, F32, 3), Bordered.empty(m, r, dtype, -r % 8)),
        Bordered.empty(m, n, dtype, -n % 8),
    )


def call(one: Layer, blocks: int = 1, **gpu: Any) -> int:
    """The status; primitives may touch the operands alone, and nothing around them changes."""
    flags = hopper.flags_of(one.x.t.shape[0])
    with emulated.grid(**({"capability": 90} | gpu)) as lib:
        for operand in one.operands():
            operand.allow()
        args = one.args(blocks, flags)
        status = int(lib.deltaops_cuda_hopper_project_gemm(ctypes.byref(args)))
    assert all(operand.intact() for operand in one.operands())
    return status


def check(one: Layer, **gpu: Any) -> None:
    assert call(one, **gpu) == 0, emulated.error()
    assert one.s is not None
    s = SCALING * (one.x.t.double() @ one.a.t.double().t())
    assert torch.allclose(one.s.t.double(), s, rtol=1e-5, atol=1e-4)
    assert torch.equal(one.narrow.t, one.s.t.to(one.out.t.dtype))
    y = one.x.t.double() @ one.weight.t.double().t()
    y += one.narrow.t.double() @ one.b.t.double().t()
    y += 0.0 if one.bias is None else one.bias.t.double()
    assert_accurate(one.out.t, y, y.to(one.out.t.dtype), "y")


@ORDERS
@pytest.mark.parametrize(
    ("m", "k", "n", "r", "blocks", "sms"),
    [
        (130, 72, 264, 24, 2, 4),  # a cluster of each kind
        (300, 200, 72, 8, 2, 4),  # an odd number of rows of tiles
        (129, 136, 137, 64, 1, 2),  # the least there may be, no cluster
        (40, 65, 300, 1, 1, 3),
    ],
)
def test_y_and_s(m: int, k: int, n: int, r: int, blocks: int, sms: int, order: int) -> None:
    check(layer(m, k, n, r), blocks=blocks, multiprocessors=sms, order=order)
