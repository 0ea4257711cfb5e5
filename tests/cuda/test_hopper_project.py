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


def layer(m: int, k: int, n: int, r: int, dtype: torch.dtype = BF16, bias: bool = True) -> Layer:
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
        emulated.allow(flags)
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


@pytest.mark.parametrize(
    ("m", "k", "n", "r", "blocks", "sms", "order"),
    [
        (130, 72, 264, 24, 2, 4, emulated.ASCENDING),  # a cluster of each kind
        (130, 72, 264, 24, 2, 4, emulated.DESCENDING),
        (130, 72, 264, 24, 2, 4, emulated.SHUFFLED),
        (300, 200, 72, 8, 2, 4, emulated.SHUFFLED),  # an odd number of rows of tiles, no cluster
        (129, 136, 136, 64, 1, 2, emulated.DESCENDING),  # the least there may be, no cluster
        (40, 65, 304, 1, 1, 3, emulated.ASCENDING),
    ],
)
def test_y_and_s(m: int, k: int, n: int, r: int, blocks: int, sms: int, order: int) -> None:
    check(layer(m, k, n, r), blocks=blocks, multiprocessors=sms, order=order)


def test_a_cluster_s_last_row_of_tiles_may_lie_outside() -> None:
    check(layer(16 * 128 + 3, 8, 16, 8), blocks=2, multiprocessors=4)


def test_float16_and_no_bias_and_no_s() -> None:
    one = layer(140, 72, 144, 40, F16, bias=False)
    check(one, multiprocessors=4)
    wanted = one.out.t.clone()
    one.s = None
    one.out.t.fill_(float("nan"))
    one.narrow.t.fill_(float("nan"))
    assert call(one, multiprocessors=4) == 0, emulated.error()
    assert torch.equal(one.out.t, wanted)


def test_the_same_bits_however_many_make_s() -> None:
    found = []
    # what is left over: a cluster; one alone; two alone
    for order, sms, blocks in ((0, 8, 0), (1, 2, 1), (2, 3, 2)):
        one = layer(250, 72, 136, 16)
        assert call(one, blocks, order=order, multiprocessors=sms) == 0, emulated.error()
        assert one.s is not None
        found.append((one.out.t, one.s.t))
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])


def test_no_rows() -> None:
    assert call(layer(0, 8, 8, 8), multiprocessors=4) == 0, emulated.error()


INVALID, UNSUPPORTED = 1, 2


def refused(one: Layer, status: int, blocks: int = 1, **gpu: int) -> str:
    """The sentence; outputs stay as they were."""
    assert call(one, blocks, **({"multiprocessors": 4} | gpu)) == status
    assert bool(one.out.t.isnan().all())
    assert bool(one.narrow.t.isnan().all())
    return emulated.error()


def test_what_does_not_fit_is_refused() -> None:
    says = "hopper_project_gemm: a must be [8, 24] of dtype 1, got [8, 16] of dtype 1"
    one = layer(16, 24, 16, 8)
    one.a = matrix(8, 16, BF16, 1)
    assert says in refused(one, INVALID)
    one = layer(16, 24, 16, 8)
    one.narrow = Bordered.empty(16, 8, BF16, 1)
    assert "hopper_project_gemm: s_narrow must have rows on 16 bytes" in refused(one, UNSUPPORTED)
    says = "takes 1 to 64 ranks and at least one row and column of the weight, got 72 of [16, 24]"
    assert says in refused(layer(16, 24, 16, 72), UNSUPPORTED)
    says = "blocks must be 0 or how many make S, got -1"
    assert says in refused(layer(16, 24, 16, 8), INVALID, blocks=-1)
    says = "hopper_project_gemm: 1 blocks that make S must leave 1 of the 1 multiprocessors"
    assert says in refused(layer(16, 24, 16, 8), UNSUPPORTED, multiprocessors=1)
    says = "hopper_project_gemm: runs on Hopper (compute capability 9.0), and GPU 0 has 10.0"
    assert says in refused(layer(16, 24, 16, 8), UNSUPPORTED, capability=100)


def test_structs_and_workspaces_that_are_none_are_refused() -> None:
    one = layer(16, 24, 16, 8)
    flags = hopper.flags_of(16)
    for field, value, says in (
        ("struct_size", 8, "hopper_project_gemm: struct_size must be"),
        ("workspace_bytes", 3, "workspace must have 4 bytes on 16 bytes, got 3 at"),
        ("workspace", None, "workspace must have 4 bytes on 16 bytes, got 4 at"),
    ):
        args = one.args(1, flags)
        setattr(args, field, value)
        with emulated.grid(capability=90, multiprocessors=4) as lib:
            assert lib.deltaops_cuda_hopper_project_gemm(ctypes.byref(args)) == INVALID
        assert says in emulated.error()
