"""The Hopper kernels on the emulated grid: the copy engine, mbarriers and wgmma played by the CPU."""

from __future__ import annotations

import pytest
import torch

from deltaops.testing import assert_accurate

from . import emulated, products

BF16, F16 = torch.bfloat16, torch.float16
# M, K, N, R: tiles are 128 rows by 128 or 256 columns, chunks 64 of K, steps 16 of R
SHAPES = ((1, 8, 8, 8), (130, 72, 264, 24), (129, 200, 137, 64), (67, 65, 300, 1), (260, 64, 128, 16))


def close(actual: torch.Tensor, oracle: torch.Tensor, what: str) -> None:
    """One rounding of the fp64 result, of which nearly all are the same bits."""
    assert_accurate(actual, oracle, oracle.to(actual.dtype), what)


@pytest.mark.parametrize(("m", "k", "n", "r"), SHAPES)
def test_outputs_match_float64(m: int, k: int, n: int, r: int) -> None:
    layers = products.output_layers(m, k, [n], [r], BF16)
    assert products.call("outputs", layers) == 0, emulated.error()
    close(layers[0].out.t, products.expected_outputs(layers)[0], "y")


@pytest.mark.parametrize("threshold", [0, products.THRESHOLD])
@pytest.mark.parametrize(("m", "k", "n", "r"), SHAPES)
def test_gradient_matches_float64(m: int, k: int, n: int, r: int, threshold: int) -> None:
    layers = products.gradient_layers(m, k, [n], [r], BF16, threshold=threshold, stream=3)
    assert products.call("grad_input", layers) == 0, emulated.error()
    close(layers[0].out.t, products.expected_gradient(layers), "grad x")
