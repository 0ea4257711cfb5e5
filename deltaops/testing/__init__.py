"""Cases, tolerances and comparison, shipped so that other backends can hold themselves to them."""

from .cases import DELTA_LINEAR_CASES, DeltaLinearCase, DeltaLinearTensors
from .compare import assert_accurate, relative_error
from .tolerances import bound, rounding

__all__ = [
    "DELTA_LINEAR_CASES",
    "DeltaLinearCase",
    "DeltaLinearTensors",
    "assert_accurate",
    "bound",
    "relative_error",
    "rounding",
]
