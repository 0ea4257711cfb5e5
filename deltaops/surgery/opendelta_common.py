"""What the kinds of delta that OpenDelta saves have in common: names, settings, what is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from deltaops.errors import CheckpointError, ConfigError
from deltaops.methods import Delta

CONFIG = "config.json"
Found = dict[str, dict[str, Tensor]]
"""Path of a module → what the file has for it, by the rest of the key."""
State = dict[str, Tensor]
"""As ``handle.state()``."""

_ACTIVATIONS = {
    "relu": "relu", "gelu": "gelu", "gelu_orig": "gelu", "gelu_new": "gelu_tanh",
    "swish": "silu", "silu": "silu",
}  # fmt: skip
"""OpenDelta's name → ours."""
SIDES = ("down", "up")
LINEARS = {f"{s}_proj.{n}": d for s in SIDES for n, d in (("weight", 2), ("bias", 1))}
"""A bottleneck's tensors there, with their dimensions."""
BOTTLENECK = {
    f"{side}_proj.{name}": f"adapter.{side}{'.weight' if name == 'weight' else '_bias'}"
    for side in SIDES
    for name in ("weight", "bias")
}
"""OpenDelta's name → ours."""


def settings(make: Callable[[], Delta]) -> Delta:
    """What ``make`` makes of the configuration. Raises: CheckpointError where that is nothing."""
    try:
        return make()
    except ConfigError as error:
        raise CheckpointError(f"OpenDelta's {CONFIG}: {error}") from error


def needs(found: Found, names: set[str]) -> None:
    """Raises: CheckpointError where a module lacks one of ``names``."""
    for path, own in found.items():
        if not names <= own.keys():
            missing = sorted(names - own.keys())[0]
            raise CheckpointError(
                f"OpenDelta's file has no {missing} for {path!r}. Copy or save it again."
            )


def activation_of(config: Mapping[str, Any], usual: str) -> str:
    """Our name of the activation; ``usual`` is OpenDelta's where it says none.

    Raises: CheckpointError for one that is not ours.
    """
    name = config.get("non_linearity", usual)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise CheckpointError(
            f"OpenDelta's adapter has non_linearity={name!r}; deltaops has those of "
            f"{', '.join(_ACTIVATIONS)}. Train it anew with one of these."
        )
    return _ACTIVATIONS[name]
