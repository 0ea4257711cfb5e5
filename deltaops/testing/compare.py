"""Comparison against a float64 oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from .tolerances import bound


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """``‖actual − oracle‖ / ‖oracle‖`` in float64; the plain norm where the oracle is zero.

    NaN, or a value where the other has none, gives NaN or infinity, which passes no bound.
    """
    if actual.shape != oracle.shape:
        raise AssertionError(f"shape {list(actual.shape)}, the oracle has {list(oracle.shape)}")
    wide, oracle = actual.detach().to(torch.float64), oracle.detach().to(torch.float64)
    size = float(torch.linalg.vector_norm(oracle))
    off = float(torch.linalg.vector_norm(wide - oracle))
    return off / size if size else off


def assert_accurate(actual: Tensor, oracle: Tensor, baseline: Tensor, what: str) -> None:
    """Hold ``actual`` to the tolerance table.

    Args:
        actual: the result under test.
        oracle: the float64 reference.
        baseline: the reference run in the precision of ``actual``; sets the bound.
        what: names the tensor in the message.
    Raises: AssertionError with both errors and the bound.
    """
    if actual.dtype != baseline.dtype:
        raise AssertionError(f"{what}: dtype {actual.dtype}, the reference has {baseline.dtype}")
    error, reference = relative_error(actual, oracle), relative_error(baseline, oracle)
    limit = bound(reference, actual.dtype)
    if not error <= limit:  # also catches NaN
        raise AssertionError(
            f"{what}: relative error {error:.3e} exceeds {limit:.3e} "
            f"(twice the reference's {reference:.3e} plus one rounding to {actual.dtype})"
        )
