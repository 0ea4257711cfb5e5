"""What the methods share that put keys and values before those of the tokens in attentions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaops.modules import draws_on, head_width, restore, switch

from .base import ATTENTION, Binding, Delta, Promise, adapter_dtype

NO_MERGE = "keys and values before those of the tokens are part of no weight"
SPREAD_OF_VALUES = 0.02
"""Standard deviation of the start values."""


class PrefixDelta(Delta):
    """What every method is that gives attentions a prefix."""

    places: ClassVar[frozenset[str]] = frozenset({ATTENTION})
    once: ClassVar[str | None] = "the prefix of its attentions"
    promises: ClassVar[frozenset[Promise]] = frozenset(
        {Promise.STATED_AT_START, Promise.REVERT_RESTORES_BITS}
    )

    def enter(self, model: nn.Module) -> None:
        """See :meth:`Delta.enter`: the function that attends."""
        switch(model)

    def leave(self, model: nn.Module) -> None:
        """See :meth:`Delta.leave`."""
        restore(model)

    def switch(self, model: nn.Module, active: bool) -> None:
        """See :meth:`Delta.switch`: without a prefix, the model attends by what it had."""
        if active:
            switch(model)
        else:
            restore(model)

    def unbindable(self, module: nn.Module) -> str | None:
        """See :meth:`Delta.unbindable`."""
        if head_width(module) is None:
            return f"{type(module).__name__} does not say how wide its heads are"
        return None

    def unmergeable(self, module: nn.Module) -> str | None:
        """See :meth:`Delta.unmergeable`."""
        return NO_MERGE

    def merged(self, module: nn.Module, name: str) -> dict[str, Tensor]:
        """Never asked; see :meth:`unmergeable`."""
        raise NotImplementedError(NO_MERGE)


def drawn(
    shape: tuple[int, ...], spread: float, beside: nn.Module, binding: Binding, autocast: bool
) -> Tensor:
    """N(0, spread²), where and in the dtype of which the parameters of ``beside`` are."""
    known = next((p for p in beside.parameters() if p.is_floating_point()), torch.empty(0))
    dtype = adapter_dtype(known, autocast)
    if known.device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=known.device)
    random = binding.generator
    found = torch.randn(shape, generator=random, device=draws_on(random), dtype=torch.float32)
    return (found * spread).to(device=known.device, dtype=dtype)


def spread_of_keys(attention: Any, width: int) -> float:
    """With which scores of a query of N(0, 1) are N(0, 1); T5 has no scale of D^-½."""
    scale = getattr(attention, "scaling", None)
    return float(width**-0.5 / scale) if isinstance(scale, float) and scale > 0.0 else 1.0
