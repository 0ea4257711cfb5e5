"""What a budget of trainable parameters can hold, asked before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltaops.errors import ConfigError
from deltaops.surgery.components import Sized


def check_count(subject: str, name: str, value: Any, least: int = 1) -> None:
    """Raises: ConfigError where ``value`` is no integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{subject}: {name} must be an integer ≥ {least}, got {value!r}.")


def check_share(subject: str, name: str, value: Any) -> None:
    """Raises: ConfigError where ``value`` is no number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigError(f"{subject}: {name} must be in [0, 1), got {value!r}.")


def least(places: Mapping[str, Sized], smallest: int) -> int:
    """Parameters that no choice can go below: every place at ``smallest``; at 0, one component."""
    if smallest:
        return sum(place.parameters(min(smallest, place.largest)) for place in places.values())
    return min(place.parameters(1) for place in places.values())


def check_budget(subject: str, places: Mapping[str, Sized], budget: int, smallest: int) -> None:
    """Raises: ConfigError where ``budget`` parameters cannot be kept to."""
    needed = least(places, smallest)
    if budget >= needed:
        return
    what = f"{len(places)} places at rank {smallest}" if smallest else "one component at one place"
    remedy = "take places out of target_modules" if smallest else "name smaller layers"
    less = ", lower smallest" if smallest else ""
    raise ConfigError(
        f"{subject}: the budget must hold {what}, which take {needed:,} parameters, and is "
        f"{budget:,}. Raise it{less}, or {remedy}."
    )
