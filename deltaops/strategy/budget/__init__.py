"""Which places get how much, under a number of trainable parameters."""

from .importance import Importance
from .sensitivity import Allocation, allocate
from .sigmoid import ShiftedSigmoid

__all__ = ["Allocation", "Importance", "ShiftedSigmoid", "allocate"]
