"""Where start values are drawn."""

from __future__ import annotations

import torch


def draws_on(generator: torch.Generator | None) -> torch.device:
    """The generator's device, the CPU without one: a seed gives the same on every device.

    To be named in each draw, since ``torch.set_default_device`` decides where it is not.
    """
    return torch.device("cpu") if generator is None else generator.device
