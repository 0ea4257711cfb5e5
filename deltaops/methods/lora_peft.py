"""What of PEFT's LoraConfig is a :class:`deltaops.LoRA`, and what is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deltaops.errors import CheckpointError

from .base import BY_PARAMETER, EXPERTS, Site
from .lora_start import is_drawn
from .peft_config import listed, required, target_fields, unexpressed

if TYPE_CHECKING:
    from .lora import LoRA

_EXPRESSED = frozenset(
    {
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
        "task_type",
        "peft_type",
        "target_parameters",
    }
)
"""Fields that :class:`deltaops.LoRA` has."""

_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "fan_in_fan_out",  # read off the layer itself
        "inference_mode",
        "megatron_core",  # names a package; only megatron_config switches it on
        "peft_version",
        "qalora_group_size",  # only use_qalora switches it on
        "revision",
    }
)
"""Fields that change nothing about what the saved tensors mean."""

_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Start values that leave the base weights alone."""

_RECOMPUTED = ("pissa", "olora")
"""Those that every reader takes out of the base weights anew. PEFT's other starts that change them
hang on random numbers or on data, which no file holds."""


def peft_fields(delta: LoRA, sites: tuple[Site, ...]) -> dict[str, Any]:
    """The fields that ``delta`` sets; the others keep their defaults."""
    mixtures = [site for site in sites if site.place in BY_PARAMETER]
    by_name = list(delta.target_parameters)
    if any(site.role == EXPERTS for site in mixtures):
        by_name = [site.key(name) for site in mixtures for name in site.parameters]
    layers = delta.layers_to_transform
    others = tuple(site for site in sites if site.place not in BY_PARAMETER)
    return target_fields(delta, others) | {
        "target_parameters": by_name or None,
        "peft_type": delta.peft_type,
        "r": delta.r,
        "lora_alpha": delta.alpha,
        "lora_dropout": delta.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": delta.use_rslora,
        "use_dora": delta.use_dora,
        "rank_pattern": dict(delta.rank_pattern),
        "alpha_pattern": dict(delta.alpha_pattern),
        "init_lora_weights": delta.init_lora_weights,
        "layers_to_transform": None if layers is None else list(layers),
        "layers_pattern": list(delta.layers_pattern) or None,
    }


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of :class:`deltaops.LoRA`, in a config that :func:`refuse_unknown_features` let pass."""
    parameters = listed(config, "target_parameters") or ()
    nowhere = parameters and config.get("target_modules") is None
    return {
        "r": config.get("r", 8),
        "alpha": config.get("lora_alpha", 8),
        "dropout": config.get("lora_dropout", 0.0),
        "target_modules": () if nowhere else required(config, "target_modules"),
        "exclude_modules": config.get("exclude_modules") or None,
        "modules_to_save": listed(config, "modules_to_save") or (),
        "use_rslora": config.get("use_rslora", False),
        "use_dora": config.get("use_dora", False),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
        "init_lora_weights": _start(config),
        "layers_to_transform": config.get("layers_to_transform"),
        "layers_pattern": listed(config, "layers_pattern") or (),
        "task_type": config.get("task_type"),
        "target_parameters": parameters,
    }


def _start(config: Mapping[str, Any]) -> bool | str:
    """The start that decides what the tensors mean, or at least the next training's."""
    start = config.get("init_lora_weights")
    return start if start in ("gaussian", *_RECOMPUTED) else True


def refuse_unknown_features(config: Mapping[str, Any]) -> None:
    """Anything switched on that a LoRA branch cannot express is an error that names it."""
    refused = []
    for key, value in config.items():
        if key in _EXPRESSED or key in _HARMLESS:
            continue
        if key == "init_lora_weights":
            if is_drawn(value):
                refused.append(
                    f"{key}={value!r} (a start drawn at random, which the file does not hold; save "
                    "it with path_initial_model_for_weight_conversion)"
                )
            elif value not in (*_STARTS, *_RECOMPUTED):
                refused.append(f"{key}={value!r} (it changes the base weights)")
        elif key == "eva_config" and config.get("init_lora_weights") == "eva":
            continue  # how the start was found, nothing about what it means
        elif value not in (None, False, "none") and value != {} and value != []:
            refused.append(f"{key}={value!r}")
    if refused:
        raise CheckpointError(unexpressed("LoRA", refused))
