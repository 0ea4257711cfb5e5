"""What the adapters with a bottleneck share: its size, its settings, its parameters by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from deltaops.errors import ConfigError
from deltaops.modules import AdapterSettings, Bottleneck, DeltaPlace
from deltaops.reference.activation import ACTIVATIONS

from .targets import is_count, is_number

NO_MERGE = "an adapter is a function of its input, which no change of a weight can express"


def check(delta: Any) -> None:
    """Raises: ConfigError for a size, activation or scale out of range."""
    title = type(delta).__name__
    if delta.size is not None and not is_count(delta.size):
        raise ConfigError(f"{title}: size must be an integer ≥ 1 or None, got {delta.size!r}.")
    if not is_count(delta.reduction_factor):
        raise ConfigError(
            f"{title}: reduction_factor must be an integer ≥ 1, got {delta.reduction_factor!r}."
        )
    if delta.non_linearity not in ACTIVATIONS:
        raise ConfigError(
            f"{title}: non_linearity must be one of {', '.join(ACTIVATIONS)}, "
            f"got {delta.non_linearity!r}. Check the spelling."
        )
    if not is_number(delta.scaling):
        raise ConfigError(f"{title}: scaling must be finite, got {delta.scaling!r}. 1 is usual.")


def rank_of(delta: Any, features: int) -> int:
    """R for a layer of ``features``; fits where :func:`misfit` is None."""
    return int(delta.size or max(features // delta.reduction_factor, 1))


def misfit(delta: Any, features: int) -> str | None:
    """Why the bottleneck of a layer of ``features`` has no whole size; None when it has one."""
    if delta.size is None and features % delta.reduction_factor:
        return f"reduction_factor={delta.reduction_factor} does not divide its {features} features"
    return None


def settings_of(delta: Any) -> AdapterSettings:
    """What the place needs to know."""
    return AdapterSettings(delta.non_linearity, float(delta.scaling))


def held(module: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Suffix in a checkpoint → parameter of the adapter ``name``."""
    assert isinstance(module, DeltaPlace)
    adapter = module.adapter[name]
    assert isinstance(adapter, Bottleneck)
    return {f"adapter.{key}": parameter for key, parameter in adapter.named_parameters()}


def shapes(
    rank: int, inputs: int, outputs: int, *, norm: bool = False, branch: bool = False
) -> dict[str, tuple[int, ...]]:
    """Suffix in a checkpoint → shape, of what :func:`held` gives."""
    found = vectors(rank, inputs, outputs, norm=norm, branch=branch)
    return found | {"adapter.down.weight": (rank, inputs), "adapter.up.weight": (outputs, rank)}


def vectors(
    rank: int, inputs: int, outputs: int, *, norm: bool = False, branch: bool = False
) -> dict[str, tuple[int, ...]]:
    """The part of :func:`shapes` that is biases and norms."""
    found: dict[str, tuple[int, ...]] = {"adapter.down_bias": (rank,)}
    if not branch:
        found["adapter.up_bias"] = (outputs,)
    if norm:
        found |= {"adapter.norm_weight": (inputs,), "adapter.norm_bias": (inputs,)}
    return found
