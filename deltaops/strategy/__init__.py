"""Deltas chosen as training runs: what watches a run, and what changes its deltas."""

from .budget import Allocation, Importance, ShiftedSigmoid, allocate

__all__ = ["Allocation", "Importance", "ShiftedSigmoid", "allocate"]
