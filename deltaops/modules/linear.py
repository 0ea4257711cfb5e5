"""``nn.Linear`` as a place: with deltas, and frozen without any."""

from __future__ import annotations

from torch import nn

from .place import DeltaPlace, LinearPlace


class DeltaLinear(DeltaPlace, nn.Linear):
    """An ``nn.Linear`` whose frozen weight and deltas run as one op."""

    base_class = nn.Linear

    def extra_repr(self) -> str:
        """That of nn.Linear and the deltas."""
        return f"{nn.Linear.extra_repr(self)}, {self.describe_deltas()}"


class FrozenLinear(LinearPlace, nn.Linear):
    """An ``nn.Linear`` whose weight gets no gradient: the op with no branch."""

    base_class = nn.Linear
