"""The Hopper products on the emulated grid: copy engine, mbarriers and wgmma played by the CPU."""

from __future__ import annotations

import pytest
import torch

from deltaops.reference.philox import draws
from deltaops.testing import assert_accurate

from . import emulated, hopper
from .ampere import GemmArgs
from .hopper import Output, forward, gradient, matrix

BF16, F16 = torch.bfloat16, torch.float16
WIDE, NARROW = 1, 99
"""Multiprocessors with which every shape here gets tiles of 256 columns, or of 128."""
# M, K, N, R: tiles are 128 rows by 128 or 256 columns, chunks 64 of K, steps 16 of R
SHAPES = (
    (1, 8, 8, 8),
    (130, 72, 264, 24),
    (129, 200, 136, 64),
    (67, 72, 296, 1),
    (160, 64, 128, 16),
    (40, 136, 72, 100),
)
_SHAPE = pytest.mark.parametrize(("m", "k", "n", "r"), SHAPES)
_SMS = pytest.mark.parametrize("sms", [WIDE, NARROW], ids=["wide", "narrow"])


def check(*outputs: Output, sms: int = WIDE) -> None:
    """Within twice one rounding of the float64 result."""
    assert hopper.call(outputs, multiprocessors=sms) == 0, emulated.error()
    for one in outputs:
        oracle = one.wide()
        assert_accurate(one.out.t, oracle, oracle.to(one.out.t.dtype), "out")


@_SMS
@_SHAPE
def test_forward(m: int, k: int, n: int, r: int, sms: int) -> None:
    check(*forward(m, k, [n], [r], BF16), sms=sms)


@pytest.mark.parametrize("threshold", [0, hopper.THRESHOLD], ids=["plain", "dropout"])
@_SHAPE
def test_gradient_of_x(m: int, k: int, n: int, r: int, threshold: int) -> None:
    check(gradient(m, k, [n], [r], BF16, threshold, stream=3))


@pytest.mark.parametrize("order", range(3), ids=["ascending", "descending", "shuffled"])
def test_two_blocks_share_right_tiles(order: int) -> None:
    """Two rows of tiles on two multiprocessors: one cluster, for two pairs of wide tiles."""
    one = (
        gradient(130, 304, [72], [8], BF16, hopper.THRESHOLD)
        if order == emulated.SHUFFLED
        else forward(130, 72, [304], [8], BF16)[0]
    )
    assert hopper.call([one], order=order, multiprocessors=2) == 0, emulated.error()
    oracle = one.wide()
    assert_accurate(one.out.t, oracle, oracle.to(BF16), "out")


def test_a_cluster_s_last_row_of_tiles_may_lie_outside() -> None:
    check(*forward(16 * 128 + 3, 8, [16], [8], BF16), sms=NARROW)


@_SMS
def test_float16(sms: int) -> None:
    check(*forward(70, 72, [144], [8], F16), sms=sms)
    check(gradient(70, 144, [72], [8], F16, hopper.THRESHOLD), sms=sms)


@_SMS
def test_a_group_goes_in_one_launch(sms: int) -> None:
    """q, k and v, of which v has no branch; and their gradient, in one accumulator."""
    check(*forward(130, 40, [136, 8, 72], [8, 24, 0], BF16, bias=False), sms=sms)
    check(gradient(130, 136, [72, 40, 65], [8, 24, 0], BF16), sms=sms)


def test_a_rank_part_alone_and_the_frozen_layer_alone() -> None:
    check(*forward(30, 0, [72], [8], BF16))
    check(*forward(30, 72, [72], [0], BF16))


@pytest.mark.parametrize(("m", "n"), [(0, 16), (16, 0)])
def test_nothing_to_do(m: int, n: int) -> None:
    check(*forward(m, 8, [n], [8], BF16))
    check(gradient(m, n, [8], [8], BF16))


def test_an_empty_output_beside_another() -> None:
    check(*forward(20, 16, [0, 40], [8, 8], BF16, bias=False))


def test_the_mask_is_the_reference_s_to_the_bit() -> None:
    one = gradient(137, 304, [8], [8], BF16, threshold=30000, stream=7)
    one.terms[0].left.t.zero_()
    assert hopper.call([one]) == 0, emulated.error()
    assert torch.equal(one.out.t != 0, draws(137, 304, one.seed, 7) >= 30000)


@pytest.mark.parametrize("order", range(3), ids=["ascending", "descending", "shuffled"])
@pytest.mark.parametrize("n", [8, 130, 264])
def test_masks_of_several_tiles(n: int, order: int) -> None:
    """Six of one block, and stages that come round within a tile and between tiles."""
    one = gradient(300, 512, [n], [72], BF16, hopper.THRESHOLD)
    assert hopper.call([one], order=order, multiprocessors=1) == 0, emulated.error()
    oracle = one.wide()
    assert_accurate(one.out.t, oracle, oracle.to(BF16), "out")


@_SMS
def test_a_mask_of_all_that_is_summed_and_of_some_outputs(sms: int) -> None:
    alone = gradient(130, 264, [72], [8], BF16, hopper.THRESHOLD)
    del alone.terms[0]
    plain = gradient(130, 264, [72], [8], BF16)
    masked = gradient(130, 136, [40], [24], BF16, hopper.THRESHOLD, stream=2)
    for one in (plain, masked):
        one.seed = alone.seed
    check(alone, plain, masked, sms=sms)


def test_on_fewer_multiprocessors_than_there_are() -> None:
    outputs = forward(130, 72, [304, 40], [8, 8], BF16)
    for one in outputs:
        one.multiprocessors = 3
    check(*outputs, sms=5)


def test_a_rank_of_1_lies_either_way() -> None:
    """A [1, K] is [K, 1] transposed too."""
    check(gradient(10, 40, [24], [1], BF16))


def test_everything_dropped_leaves_the_frozen_part() -> None:
    check(gradient(20, 40, [16], [8], BF16, threshold=65536))


@pytest.mark.parametrize("masked", [False, True], ids=["forward", "gradient"])
def test_the_same_bits_in_any_order_of_threads_and_on_any_gpu(masked: bool) -> None:
    found = []
    # one block of wide tiles, a cluster of two, a cluster of narrow ones
    for order, sms in ((0, 1), (1, 2), (2, 3)):
        one = (
            gradient(130, 136, [72], [24], BF16, hopper.THRESHOLD)
            if masked
            else forward(130, 72, [136], [24], BF16)[0]
        )
        assert hopper.call([one], order=order, multiprocessors=sms) == 0, emulated.error()
        found.append(one.out.t)
    assert all(torch.equal(found[0], other) for other in found[1:])


# ------------------------------------------------------------------------------------- refusals


def refused(*outputs: Output, status: int, **gpu: int) -> str:
    """The sentence; outputs stay as they were."""
    assert hopper.call(outputs, **gpu) == status
    assert all(bool(one.out.t.isnan().all()) for one in outputs)
    return emulated.error()


INVALID, UNSUPPORTED = 1, 2


def layer(**changes: object) -> Output:
    """A small forward product with a branch, and some of its first term's fields replaced."""
    one = forward(16, 24, [16], [8], BF16)[0]
    for name, value in changes.items():
        setattr(one.terms[0], name, value)
    return one


def test_other_dtypes_are_refused() -> None:
    single = Output(layer().terms, emulated.Bordered.empty(16, 16, torch.float32))
    says = "hopper_gemm: dtype must be bf16 (1) or f16 (2), got 0"
    assert refused(single, status=UNSUPPORTED).endswith(says)
    says = "right of product 0 of out 0 must be [16, 24] of dtype 1, got [16, 24] of dtype 2"
    assert says in refused(layer(right=matrix(16, 24, F16, 1)), status=INVALID)


def test_rows_that_the_copy_engine_cannot_end_are_refused() -> None:
    says = "out must have a multiple of 8 columns, since the copy engine writes 16 bytes at a time"
    assert says in refused(*forward(16, 24, [20], [8], BF16), status=UNSUPPORTED)


def test_shapes_that_do_not_fit_are_refused() -> None:
    says = "right of product 0 of out 0 must be [16, 24] of dtype 1, got [16, 32]"
    assert says in refused(layer(right=matrix(16, 32, BF16, 1)), status=INVALID)
    says = "left of product 0 of out 0 must be [16, 24] of dtype 1, got [8, 24]"
    assert says in refused(layer(left=matrix(8, 24, BF16, 1)), status=INVALID)
    says = "left of product 0 of out 0 must have at least 1 column, got 0"
    empty = layer(left=matrix(16, 0, BF16, 1), right=matrix(16, 0, BF16, 1))
    assert says in refused(empty, status=UNSUPPORTED)
    rows = forward(16, 24, [16], [8], BF16)[0], forward(8, 24, [16], [8], BF16)[0]
    assert "out must be [16, 16] of dtype 1, got [8, 16]" in refused(*rows, status=INVALID)


def test_rows_off_16_bytes_are_refused() -> None:
    odd = emulated.Bordered(torch.zeros(16, 24, dtype=BF16), 1)
    says = "must have rows on 16 bytes, got pointer"
    assert f"left of product 0 of out 0 {says}" in refused(layer(left=odd), status=UNSUPPORTED)
    assert f"right of product 0 of out 0 {says}" in refused(layer(right=odd), status=UNSUPPORTED)


def test_what_a_mask_needs() -> None:
    says = "the right matrices must all have col_stride 1, or all row_stride 1"
    assert says in refused(layer(threshold=5), status=UNSUPPORTED)
    two = gradient(16, 24, [16, 16], [8, 8], BF16, threshold=5)
    says = "one product of an output may have a mask"
    assert says in refused(two, status=UNSUPPORTED)
    most = gradient(16, 24, [16], [8], BF16, threshold=65537)
    says = "drop_threshold must be p * 65536, so 0 to 65536, got 65537"
    assert says in refused(most, status=INVALID)
    unseeded = gradient(16, 24, [16], [8], BF16, threshold=5)
    unseeded.seed = torch.empty(0, dtype=torch.int64)
    assert "seed must point to one 64-bit value" in refused(unseeded, status=INVALID)


def test_multiprocessors_that_are_not_there() -> None:
    one, two = forward(16, 24, [16, 16], [8, 8], BF16)
    one.multiprocessors = two.multiprocessors = 3
    says = "multiprocessors must be at most the 2 of GPU 0, got 3"
    assert says in refused(one, two, status=INVALID, multiprocessors=2)
    two.multiprocessors = 1
    assert "out 1 must be given as many multiprocessors as out 0" in refused(
        one, two, status=INVALID
    )


def test_too_many_are_refused() -> None:
    says = "takes 1 to 4 outputs, got 5"
    assert says in refused(*forward(8, 8, [8] * 5, [8] * 5, BF16), status=INVALID)
    says = "takes at most 8 products together, got 10"
    many = gradient(8, 8, [8] * 5, [8] * 5, BF16)
    assert says in refused(many, status=UNSUPPORTED)
    none = Output([], emulated.Bordered.empty(8, 8, BF16))
    assert "out 0 must have products, got 0" in refused(none, status=UNSUPPORTED)


def test_other_gpus_are_refused() -> None:
    says = "runs on Hopper (compute capability 9.0), and GPU 0 has 10.0"
    assert says in refused(layer(), status=UNSUPPORTED, capability=100)


def test_structs_of_another_header_are_refused() -> None:
    args = layer().args()
    args.struct_size -= 8
    with emulated.grid(capability=90) as lib:
        assert lib.deltaops_cuda_hopper_gemm((GemmArgs * 1)(args), 1) == INVALID
    assert "struct_size of out 0 must be" in emulated.error()
