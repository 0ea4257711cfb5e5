"""Reading and writing the parts of PEFT's ``adapter_config.json`` that its tuners share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deltaops.errors import CheckpointError

from .base import Delta, Site
from .targets import plain, roles

PROMPT_TENSOR = "prompt_embeddings"
"""Of a prompt, or of a prefix as rows of all layers, in PEFT's file."""
UNWRAPPED_PREFIX = "base_model."
"""Of what is trained whole, beside those: their models are wrapped once less than others."""
TARGETS = frozenset({"target_modules", "exclude_modules", "modules_to_save"})
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "fan_in_fan_out",  # read off the layer itself
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    }
)
"""Fields that change nothing about what the saved tensors mean."""


def target_fields(delta: Delta, sites: tuple[Site, ...]) -> dict[str, Any]:
    """``target_modules`` and its kin; roles become the paths that they stand for."""
    target = delta.target_modules
    listed: str | list[str] = (
        sorted(site.path for site in sites)
        if roles(target)
        else target
        if isinstance(target, str)
        else sorted(plain(target))
    )
    excluded = delta.exclude_modules
    return {
        "target_modules": listed,
        "exclude_modules": sorted(excluded) if isinstance(excluded, tuple) else excluded,
        "modules_to_save": list(delta.modules_to_save) or None,
        "task_type": delta.task_type,
    }


def refuse_unknown(method: str, config: Mapping[str, Any], expressed: Iterable[str]) -> None:
    """Raises: CheckpointError where ``config`` switches on what the method does not express.

    Args:
        method: its public name.
        config: of ``adapter_config.json``.
        expressed: fields that it has, beside those of every tuner.
    """
    known = _HARMLESS | TARGETS | set(expressed)
    refused = sorted(
        f"{key}={value!r}"
        for key, value in config.items()
        if key not in known and value not in (None, False, "none") and value != {} and value != []
    )
    if refused:
        raise CheckpointError(unexpressed(method, refused))


def unexpressed(method: str, refused: Iterable[str]) -> str:
    """The message about fields that ``method`` has no counterpart for."""
    return (
        f"adapter_config.json uses what deltaops.{method} does not express: "
        f"{', '.join(sorted(refused))}. Load it with peft and, where it helps, call "
        "deltaops.accelerate on the result."
    )


def required(config: Mapping[str, Any], key: str) -> str | tuple[str, ...]:
    """A field that says where the delta binds. Raises: CheckpointError without it."""
    value = config.get(key)
    if value is None:
        raise CheckpointError(f"adapter_config.json has no {key}, so nothing says where it binds.")
    return value if isinstance(value, str) else listed(config, key) or ()


def listed(config: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
    """A field with names, None where it is empty. Raises: CheckpointError for anything else."""
    value = config.get(key)
    if value is None or value == []:
        return None
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"adapter_config.json: {key} must be a list of names, got {value!r}.")
    return tuple(value)
