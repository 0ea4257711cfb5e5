"""The one table of tolerances.

A kernel may be off by twice what the low-precision reference is off, plus one rounding:
both errors are relative L2 norms against the float64 reference. So the bound follows the shape
(long sums round more) and is never a number that somebody chose until a test passed.
"""

from __future__ import annotations

import torch

_ROUNDING = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    # Half of the unit roundoff, 2^-8 with 8 significant bits; the others have all of theirs. No
    # element is off by more than that, but a norm over normal ones by 0.43 of it only, so where
    # one rounding outweighs every other error the bound need not be looser.
    torch.bfloat16: 2.0**-9,
}

FACTOR = 2.0
"""How many times the reference's own error is allowed."""


def rounding(dtype: torch.dtype) -> float:
    """What one rounding to nearest may add to a relative L2 error."""
    return _ROUNDING[dtype]


def bound(reference_error: float, dtype: torch.dtype) -> float:
    """The largest relative L2 error for a result in ``dtype``.

    Args:
        reference_error: the low-precision reference's relative L2 error against float64.
        dtype: of the result; decides what one rounding is.
    """
    return FACTOR * (reference_error + rounding(dtype))
