"""Where start values are drawn, and with what they are computed exactly."""

from __future__ import annotations

import contextlib

import torch


def draws_on(generator: torch.Generator | None) -> torch.device:
    """The generator's device, the CPU without one: a seed gives the same on every device.

    To be named in each draw, since ``torch.set_default_device`` decides where it is not.
    """
    return torch.device("cpu") if generator is None else generator.device


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Without autocast on ``device``; the device "meta" has none, and torch refuses its name."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()  # to enter torch's takes longer than a small product
    return torch.autocast(device.type, enabled=False)
