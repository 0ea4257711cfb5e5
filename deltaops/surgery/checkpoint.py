"""Save and load an adapter in PEFT's format, bit for bit.

``adapter_config.json`` and ``adapter_model.safetensors`` with keys
``base_model.model.<module>.lora_A.weight``; the adapter's name is not in the keys. Loading checks
the whole file against the model first and changes the model after.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaops.errors import CheckpointError, TargetError
from deltaops.methods import LoRA
from deltaops.methods.base import Delta
from deltaops.modules import LinearPlace
from deltaops.packing import Policy

from .blocks import swap_blocks
from .files import CONFIG, WEIGHTS, read_config, read_weights, write_adapter
from .handle import Handle
from .losses import swap_losses
from .match import selects
from .plan import Plan, check_name, make_plan

PREFIX = "base_model.model."

_METHODS: dict[str, type[Delta]] = {"LORA": LoRA}
"""PEFT's ``peft_type`` → the method that reads it."""


def save(handle: Handle, path: str | os.PathLike[str]) -> None:
    """Write the adapter into the folder ``path`` (``path/NAME`` unless its name is "default").

    All or nothing: a failure leaves a previous checkpoint as it was. In a distributed run, call it
    on one process.
    Raises: CheckpointError when it cannot be written; AttachError when the handle is spent.
    """
    folder = Path(path)
    if handle.name != "default":
        folder = folder / handle.name
    tensors = {}
    for key, tensor in handle.state().items():
        # clone: safetensors refuses tensors that share storage, and the file must not
        tensors[f"{PREFIX}{key}"] = tensor.detach().cpu().contiguous().clone()
    write_adapter(folder, _peft_config(handle), tensors)


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    backend: str = "auto",
    strict: bool = False,
    frozen: bool = True,
    pack: Policy = "auto",
    loss: bool | None = None,
    blocks: bool = True,
    trainable: bool = True,
    allow_nonfinite: bool = False,
) -> Handle:
    """Attach the adapter in the folder ``path``, written by ``handle.save`` or by PEFT.

    Args:
        model: the base model, without a delta; changed in place once all checks have passed.
        path: a local folder.
        name: of the adapter in the model.
        backend: see :func:`deltaops.attach`.
        strict: see :func:`deltaops.attach`.
        frozen: see :func:`deltaops.attach`.
        pack: see :func:`deltaops.attach`.
        loss: see :func:`deltaops.attach`.
        blocks: see :func:`deltaops.attach`.
        trainable: False freezes the adapter too, for inference.
        allow_nonfinite: take NaN and infinity in the weights as they are.
    Raises: CheckpointError for a file that is damaged, foreign or does not fit this model, or uses
        what deltaops does not express; AttachError, ConfigError, NoBackendError as ``attach``.
        The model is as it was then.
    """
    check_name(name)
    folder = Path(path)
    config = read_config(folder)
    delta = _method(config).from_peft(config)
    try:
        plan = make_plan(
            model, delta, name=name, backend=backend, strict=strict, frozen=frozen, pack=pack,
            lenient=True,
        )  # fmt: skip
    except TargetError as error:
        raise CheckpointError(f"load: {str(folder)!r} does not fit this model: {error}") from error
    tensors = read_weights(folder)
    if not tensors:
        raise CheckpointError(f"load: {WEIGHTS} in {str(folder)!r} holds no tensors.")
    expected = _expected(model, plan)
    _check_keys(tensors, expected, folder)
    _check_tensors(tensors, expected, folder, allow_nonfinite)
    handle = plan.apply()
    try:
        with torch.no_grad():
            for key, tensor in handle.state().items():
                tensor.copy_(tensors[f"{PREFIX}{key}"])
        if not trainable:
            for parameter in handle.parameters():
                parameter.requires_grad_(False)
        if loss is not False:
            swap_losses(model, backend, strict, tell=bool(loss))
        if blocks:
            swap_blocks(model, backend, strict)
    except BaseException:  # also KeyboardInterrupt and out of memory: undo, then raise it
        handle.revert()
        raise
    return handle


# ------------------------------------------------------------------------------------------ save


def _peft_config(handle: Handle) -> dict[str, Any]:
    """All that PEFT needs to build the same adapter on the same base model."""
    model, delta = handle.model, handle.delta
    sites = handle.sites
    config = delta.to_peft()
    if not _means_the_same(model, delta, sites):
        # every path in full, as PEFT writes "all-linear": it means the same to every reader
        config["target_modules"] = sorted(sites)
        config["layers_to_transform"] = config["layers_pattern"] = None
    base = getattr(getattr(model, "config", None), "name_or_path", None)
    kind = type(model)
    config.update(
        auto_mapping=(
            {"base_model_class": kind.__name__, "parent_library": kind.__module__}
            if delta.task_type is None
            else None
        ),
        base_model_name_or_path=base or getattr(model, "name_or_path", None) or None,
        # PEFT reads it as the layout of the last matched layer and corrects it, layer by layer
        fan_in_fan_out=bool(sites) and hasattr(model.get_submodule(sites[-1]), "nf"),
        inference_mode=True,
    )
    return config


def _means_the_same(model: nn.Module, delta: Delta, sites: tuple[str, ...]) -> bool:
    """Whether another reader of the delta's own names, who knows no places, matches these sites."""
    target = delta.target_modules
    if isinstance(target, str) or delta.layers_to_transform is not None:
        return False
    linear = [p for p, m in model.named_modules() if isinstance(m, (nn.Linear, LinearPlace))]
    found = {p for p in linear if selects(target, p)}
    if delta.exclude_modules is not None:
        found = {p for p in found if not selects(delta.exclude_modules, p)}
    return found == set(sites)


# ------------------------------------------------------------------------------------------ load


def _method(config: Mapping[str, Any]) -> type[Delta]:
    kind = config.get("peft_type")
    method = _METHODS.get(kind) if isinstance(kind, str) else None
    if method is None:
        raise CheckpointError(
            f"load: {CONFIG} has peft_type={kind!r}; deltaops reads {', '.join(_METHODS)}."
        )
    return method


def _expected(model: nn.Module, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Every key that the file must have, with its shape."""
    expected: dict[str, tuple[int, ...]] = {}
    for site in plan.sites:
        for suffix, shape in plan.delta.shapes(site.in_features, site.out_features).items():
            expected[f"{PREFIX}{site.path}.{suffix}"] = shape
    for path in plan.saved:
        for key, tensor in model.get_submodule(path).state_dict().items():
            expected[f"{PREFIX}{path}.{key}"] = tuple(tensor.shape)
    return expected


def _check_keys(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    missing = [key for key in expected if key not in tensors]
    foreign = sorted(key for key in tensors if key not in expected)
    if not missing and not foreign:
        return
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors are missing: {_some(missing)}")
    if foreign:
        parts.append(f"{len(foreign)} belong to nothing in this model: {_some(foreign)}")
    raise CheckpointError(
        f"load: {WEIGHTS} in {str(folder)!r} does not fit this model and its {CONFIG}: "
        f"{'; '.join(parts)}. Is this the base model that it was trained on?"
    )


def _check_tensors(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    folder: Path,
    allow_nonfinite: bool,
) -> None:
    where = f"load: {WEIGHTS} in {str(folder)!r}"
    # in the model's order: safetensors hands tensors out in the order of its hash table
    for key, shape in expected.items():
        tensor = tensors[key]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{where}: {key!r} must be {list(shape)} for this model and {CONFIG}, got "
                f"{list(tensor.shape)}. Is this the base model that it was trained on?"
            )
        if ".lora_" in key and not tensor.is_floating_point():
            raise CheckpointError(f"{where}: {key!r} must be floating point, got {tensor.dtype}.")
        if (
            not allow_nonfinite
            and tensor.is_floating_point()
            and not bool(torch.isfinite(tensor).all())
        ):
            raise CheckpointError(
                f"{where}: {key!r} holds NaN or infinity; the training that wrote it had diverged. "
                "Pass allow_nonfinite=True to load it as it is."
            )


def _some(keys: list[str], limit: int = 4) -> str:
    shown = ", ".join(repr(key[:120]) for key in keys[:limit])
    return f"{shown}, …" if len(keys) > limit else shown
