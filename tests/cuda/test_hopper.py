"""The Hopper kernels on the emulated grid: the copy engine, mbarriers and wgmma played by the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaops.reference.philox import draws
from deltaops.testing import assert_accurate

from . import emulated, products

BF16, F16 = torch.bfloat16, torch.float16
WIDE, NARROW = 1, 99
"""Multiprocessors with which every shape here gets tiles of 256 columns, or of 128."""
# M, K, N, R: tiles are 128 rows by 128 or 256 columns, chunks 64 of K, steps 16 of R
SHAPES = (
    (1, 8, 8, 8),
    (130, 72, 264, 24),
    (129, 200, 137, 64),
    (67, 65, 300, 1),
    (260, 64, 128, 16),
    (40, 136, 72, 100),
)
_SHAPE = pytest.mark.parametrize(("m", "k", "n", "r"), SHAPES)
_SMS = pytest.mark.parametrize("sms", [WIDE, NARROW], ids=["wide", "narrow"])


def close(actual: Tensor, oracle: Tensor, what: str) -> None:
    """Within twice one rounding of the fp64 result."""
    assert_accurate(actual, oracle, oracle.to(actual.dtype), what)


@_SMS
@_SHAPE
def test_outputs_match_float64(m: int, k: int, n: int, r: int, sms: int) -> None:
    layers = products.output_layers(m, k, [n], [r], BF16)
    assert products.call("outputs", layers, multiprocessors=sms) == 0, emulated.error()
    close(products.result(layers[0]), products.expected_outputs(layers)[0], "y")


@pytest.mark.parametrize("threshold", [0, products.THRESHOLD], ids=["plain", "dropout"])
@_SHAPE
def test_gradient_matches_float64(m: int, k: int, n: int, r: int, threshold: int) -> None:
    layers = products.gradient_layers(m, k, [n], [r], BF16, threshold=threshold, stream=3)
    assert products.call("grad_input", layers, multiprocessors=WIDE) == 0, emulated.error()
    close(products.result(layers[0]), products.expected_gradient(layers), "grad x")


def test_float16_with_narrow_tiles() -> None:
    outputs = products.output_layers(70, 72, [144], [8], F16)
    assert products.call("outputs", outputs, multiprocessors=NARROW) == 0, emulated.error()
    close(products.result(outputs[0]), products.expected_outputs(outputs)[0], "y")
    layers = products.gradient_layers(70, 144, [72], [8], F16, threshold=products.THRESHOLD)
    assert products.call("grad_input", layers, multiprocessors=NARROW) == 0, emulated.error()
    close(products.result(layers[0]), products.expected_gradient(layers), "grad x")


def test_float16_with_wide_tiles() -> None:
    outputs = products.output_layers(70, 72, [144], [8], F16, s_dtype=F16)
    assert products.call("outputs", outputs, multiprocessors=WIDE) == 0, emulated.error()
    close(products.result(outputs[0]), products.expected_outputs(outputs)[0], "y")
    layers = products.gradient_layers(70, 144, [72], [8], F16)
    assert products.call("grad_input", layers, multiprocessors=WIDE) == 0, emulated.error()
    close(products.result(layers[0]), products.expected_gradient(layers), "grad x")


@_SMS
def test_groups_go_in_one_launch(sms: int) -> None:
    """q, k and v, of which v has no branch; and their gradient, in one accumulator."""
    outputs = products.output_layers(150, 72, [264, 72, 136], [8, 24, 0], BF16, bias=False)
    assert products.call("outputs", outputs, multiprocessors=sms) == 0, emulated.error()
    for layer, oracle in zip(outputs, products.expected_outputs(outputs), strict=True):
        close(products.result(layer), oracle, "y")
    layers = products.gradient_layers(150, 264, [136, 72, 65], [8, 24, 0], BF16)
    assert products.call("grad_input", layers, multiprocessors=sms) == 0, emulated.error()
    close(products.result(layers[0]), products.expected_gradient(layers), "grad x")


def test_a_rank_part_alone_and_the_frozen_layer_alone() -> None:
    rank = products.output_layers(30, 0, [72], [8], BF16)
    frozen = products.output_layers(30, 72, [72], [0], BF16)
    for layers in (rank, frozen):
        assert products.call("outputs", layers) == 0, emulated.error()
        close(products.result(layers[0]), products.expected_outputs(layers)[0], "y")


@pytest.mark.parametrize(("m", "n"), [(0, 16), (16, 0)])
def test_nothing_to_do(m: int, n: int) -> None:
    assert products.call("outputs", products.output_layers(m, 8, [n], [8], BF16)) == 0
    assert products.call("grad_input", products.gradient_layers(m, n, [8], [8], BF16)) == 0


def test_the_mask_is_the_reference_s() -> None:
    """With dy of zeros, dx is 0 where dropped and nowhere else."""
    layers = products.gradient_layers(137, 300, [8], [8], BF16, threshold=30000, stream=7)
    layers[0].left.t.zero_()
    assert products.call("grad_input", layers, multiprocessors=WIDE) == 0, emulated.error()
    kept = draws(137, 300, layers[0].seed, 7) >= 30000
    assert torch.equal(products.result(layers[0]) != 0, kept)


def test_everything_dropped_leaves_the_frozen_part() -> None:
    layers = products.gradient_layers(20, 40, [16], [8], BF16, threshold=65536)
    assert products.call("grad_input", layers) == 0, emulated.error()
    layers[0].s = layers[0].factor = None
    close(products.result(layers[0]), products.expected_gradient(layers), "grad x")


@pytest.mark.parametrize("name", ["outputs", "grad_input"])
def test_the_same_bits_in_any_order_of_threads_and_on_any_number_of_sms(name: str) -> None:
    found = []
    for order, sms in ((0, 1), (1, 2), (2, 4)):
        layers = (
            products.output_layers(300, 136, [264], [24], BF16)
            if name == "outputs"
            else products.gradient_layers(
                300, 264, [136], [24], BF16, threshold=products.THRESHOLD
            )
        )
        gpu = {"order": order, "seed": 11, "multiprocessors": sms}
        assert products.call(name, layers, **gpu) == 0, emulated.error()
        found.append(products.result(layers[0]))
    assert all(torch.equal(found[0], other) for other in found[1:])
