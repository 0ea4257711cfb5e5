"""The flops of a training step's products: what no kernel takes away."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from deltaops.ops import flop_formulas


def step_flops(loss: Callable[[], Tensor]) -> int:
    """Forward and backward, as torch counts them, our ops among them; gradients are added up."""
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        loss().backward()  # type: ignore[no-untyped-call]  # torch's own has no types
    return int(counter.get_total_flops())
