"""Which linear layers read a block's result next.

A backend may make their S = s · drop(x) Aᵀ in the pass that makes x (:mod:`deltaops.ops.foresee`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from deltaops.ops import Layer

from .sharing import called_alike

READERS = "_deltaops_readers"
"""In the ``__dict__`` of a norm: the layers that surgery found to read what it gives."""


def reading(places: Sequence[nn.Module], x: Tensor) -> list[Layer]:
    """What the op takes for the next call of each of ``places``, whose x is like ``x``; nothing
    where one of them is no place, or has hooks that may change it."""
    if not called_alike(places):
        return []
    found: list[Any] = [place.layer(x) for place in places]  # type: ignore[operator]  # places have it
    return [] if None in found else found
