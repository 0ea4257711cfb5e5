"""What of PEFT's LoraConfig is a :class:`deltaops.LoRA`, and what is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltaops.errors import CheckpointError

from .lora_start import is_drawn
from .peft_config import unexpressed

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


def start_in(config: Mapping[str, Any]) -> bool | str:
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
