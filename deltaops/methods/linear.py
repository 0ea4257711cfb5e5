"""What the methods on linear layers share."""

from __future__ import annotations

from torch import Tensor, nn

from deltaops.modules import DeltaPlace, become, delta_class

from .base import Binding


def become_place(module: nn.Module, kind: str, binding: Binding) -> DeltaPlace:
    """``module`` as a place for deltas; one that is a place already stays it.

    Args:
        module: an exact ``nn.Linear`` or ``Conv1D``; matching saw to it.
        kind: of the delta, for the report.
        binding: how.
    """
    if not isinstance(module, DeltaPlace):
        place = delta_class(type(module))
        assert place is not None, f"{type(module)} passed matching and has no place"
        become(module, place, binding.backend, binding.strict, binding.pack)
        module.__dict__["delta_kind"] = kind
    assert isinstance(module, DeltaPlace)
    known = module.delta_kind.split(" + ")
    if kind not in known:
        module.__dict__["delta_kind"] = " + ".join([*known, kind])
    return module


def laid_out(module: nn.Module, weight: Tensor) -> Tensor:
    """``weight`` ``[N, K]`` as ``module`` stores it: Conv1D has ``[K, N]``."""
    return weight.t() if hasattr(module, "nf") else weight
