"""LoRA adapters in PEFT's files, to and from branches in JAX; torch takes no part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.flax import load_file, save_file

from deltaops.errors import CheckpointError
from deltaops.files import publishing, write_json

from .linear import Branch

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
PLAIN = frozenset({
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision",
    "target_modules", "task_type", "use_rslora",
})  # fmt: skip
"""Of a LoraConfig, what says no more than one A and B a layer."""
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base weights alone."""
OFF: tuple[object, ...] = (None, False, "none", {}, [])


def load_lora(folder: str | Path) -> tuple[dict[str, Branch], dict[str, Any]]:
    """The branches of a PEFT LoRA adapter, by the names of their layers, and its configuration.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
    Raises: CheckpointError for files that are missing or damaged, or that say more than one A
        ``[R, K]`` and one B ``[N, R]`` a layer.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(str(folder / WEIGHTS))
    except Exception as error:  # safetensors raises its own class, and OSError
        raise CheckpointError(
            f"load_lora: {folder} must hold {CONFIG} and {WEIGHTS}, and could not be read "
            f"({error}). Save the adapter again."
        ) from error
    _refuse(folder, config)
    branches = {}
    for key, a in tensors.items():
        layer = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        partner = f"{PREFIX}{layer}.lora_B.weight"
        if key == f"{PREFIX}{layer}.lora_A.weight" and partner in tensors:
            rank, b = a.shape[0], tensors[partner]
            if a.ndim != 2 or b.ndim != 2 or b.shape[1] != rank or rank != config["r"]:
                raise CheckpointError(
                    f"load_lora: {layer} in {folder / WEIGHTS} must have A [R, K] and B [N, R] "
                    f"with R={config['r']} (r in {CONFIG}), got {list(a.shape)} and "
                    f"{list(b.shape)}. Load it with deltaops.load."
                )
            scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
            drop = config.get("lora_dropout", 0.0)
            branches[layer] = Branch(a, b, scaling=scale, dropout=drop)
    if 2 * len(branches) != len(tensors):
        known = {f"{PREFIX}{name}.lora_{x}.weight" for name in branches for x in "AB"}
        raise CheckpointError(
            f"load_lora: {folder / WEIGHTS} must hold pairs of lora_A.weight and lora_B.weight, "
            f"and has {sorted(set(tensors) - known)[0]!r} besides. Load it with deltaops.load."
        )
    return branches, config


def save_lora(
    folder: str | Path, branches: Mapping[str, Branch], config: Mapping[str, Any]
) -> None:
    """Write branches as :func:`load_lora` reads them, and PEFT; whole or not at all.

    Args:
        folder: made where it is not there.
        branches: by the names of their layers, at least one; identity activation, no bias, one
            rank, scaling and dropout, as ``config`` has them.
        config: what :func:`load_lora` gave, or another LoraConfig's values.
    Raises: CheckpointError for branches that the configuration does not describe, and where files
        cannot be written.
    """
    folder = Path(folder)
    _refuse(folder, config)
    if not branches:
        raise CheckpointError("save_lora: branches must be at least one, got none.")
    for name, branch in branches.items():
        _check(name, branch, config)
    tensors = {}
    for name, branch in branches.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = branch.a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = branch.b
    with publishing(folder, CONFIG) as scratch:
        save_file(tensors, str(scratch / WEIGHTS), {"format": "pt"})
        write_json(scratch / CONFIG, dict(config))


def _check(name: str, branch: Branch, config: Mapping[str, Any]) -> None:
    """Raises: CheckpointError for a branch that the configuration does not describe."""
    rank, a, b = config["r"], branch.a, branch.b
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"save_lora: {name} must have A [R, K] and B [N, R], got {list(a.shape)} and "
            f"{list(b.shape)}."
        )
    if a.dtype != b.dtype:
        raise CheckpointError(
            f"save_lora: {name} must have A and B of one dtype, got {a.dtype} and {b.dtype}."
        )
    dropout = config.get("lora_dropout", 0.0)
    wanted = (rank, scale, dropout, "identity", True)
    found = (a.shape[0], branch.scaling, branch.dropout, branch.activation, branch.bias is None)
    if found != wanted:
        raise CheckpointError(
            f"save_lora: {name} must be of rank {rank}, scaling {scale} and dropout {dropout}, "
            "linear and without a bias, as the configuration says; got rank "
            f"{found[0]}, scaling {found[1]}, dropout {found[2]}, {found[3]}"
            f"{'' if found[4] else ', with a bias'}. Change the configuration."
        )


def _refuse(folder: Path, config: Any) -> None:
    if not isinstance(config, Mapping):
        kind = type(config).__name__
        raise CheckpointError(f"{folder}: {CONFIG} must be an object, and is a {kind}.")
    more = [
        f"{name}={value!r}"
        for name, value in config.items()
        if name not in PLAIN
        and (value not in STARTS if name == "init_lora_weights" else value not in OFF)
    ]
    if config.get("peft_type") != "LORA" or more:
        found = ", ".join(more) or f"peft_type {config.get('peft_type')!r}"
        raise CheckpointError(
            f"{folder}: the adapter must be a plain LoRA, and has {found}. Use deltaops.load in "
            "torch for it."
        )
    missing = [
        name for name in ("r", "lora_alpha") if not isinstance(config.get(name), int | float)
    ]
    if missing:
        raise CheckpointError(f"{folder}: {CONFIG} must have numbers {missing}, and has not.")
