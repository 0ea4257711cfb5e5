"""transformers' ``Conv1D`` (GPT-2's linear layer, weight ``[K, N]``) as a place.

Imports transformers, so it is imported only where a model has such a layer.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .place import DeltaPlace, LinearPlace


class _TransposedWeight(LinearPlace):
    """The op takes the transpose as it lies; nothing is copied."""

    def base(self) -> tuple[Tensor, Tensor | None]:
        """Weight as ``[N, K]`` and bias ``[N]``."""
        weight, bias = super().base()
        return weight.t(), bias

    def __repr__(self) -> str:
        # Conv1D's own __repr__ leaves out children
        return nn.Module.__repr__(self)


class DeltaConv1D(DeltaPlace, _TransposedWeight, Conv1D):
    """A ``Conv1D`` whose frozen weight and deltas run as one op."""

    base_class = Conv1D

    def extra_repr(self) -> str:
        """Sizes and deltas."""
        return f"nf={self.nf}, nx={self.nx}, {self.describe_deltas()}"


class FrozenConv1D(_TransposedWeight, Conv1D):
    """A ``Conv1D`` whose weight gets no gradient: the op with no branch."""

    base_class = Conv1D

    def extra_repr(self) -> str:
        """Sizes."""
        return f"nf={self.nf}, nx={self.nx}"
