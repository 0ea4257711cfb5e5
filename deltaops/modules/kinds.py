"""Which exact types can become a place, and which class they become."""

from __future__ import annotations

from torch import nn

from .linear import DeltaLinear, FrozenLinear
from .place import DeltaPlace, LinearPlace


def is_conv1d(kind: type) -> bool:
    """Whether ``kind`` is exactly transformers' Conv1D, without importing transformers."""
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def delta_class(kind: type[nn.Module]) -> type[DeltaPlace] | None:
    """The place with deltas of exactly ``kind``, or None."""
    if kind is nn.Linear:
        return DeltaLinear
    if is_conv1d(kind):
        from .conv1d import DeltaConv1D  # a model that has this layer has loaded transformers

        return DeltaConv1D
    return None


def frozen_class(kind: type[nn.Module]) -> type[LinearPlace] | None:
    """The frozen place of exactly ``kind``, or None."""
    if kind is nn.Linear:
        return FrozenLinear
    if is_conv1d(kind):
        from .conv1d import FrozenConv1D  # a model that has this layer has loaded transformers

        return FrozenConv1D
    return None
