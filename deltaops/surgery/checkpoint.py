"""Save and load an adapter, bit for bit: in PEFT's format where PEFT has the method, else in ours.

PEFT's: ``adapter_config.json`` and ``adapter_model.safetensors`` with keys
``base_model.model.<module>.lora_A.weight``; the adapter's name is not in the keys.
Ours: ``deltaops.json``, a manifest with the method and its settings, and ``deltaops.safetensors``
with keys ``<module>.<suffix>``; of a combination, the parts with theirs, and ``<part>/`` before the
keys. Loading checks the whole file against the model first and changes
the model after.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaops.errors import CheckpointError, ConfigError, TargetError
from deltaops.methods import METHODS, Combined, parts_of
from deltaops.methods.base import BY_PARAMETER, PEFT_PREFIX, Delta, Site, Stored
from deltaops.methods.targets import roles
from deltaops.methods.tasks import about
from deltaops.modules import LinearPlace
from deltaops.packing import Policy

from .anatomy import resolve
from .blocks import swap_blocks
from .files import OURS, PEFT, Files, files_in, read_config, read_weights, write_adapter
from .handle import Handle
from .losses import swap_losses
from .match import selects
from .plan import Plan, check_name, make_plan

FORMAT = "deltaops"
VERSION = 1
"""Of the manifest; raised when an older reader would misread a newer file."""


def save(
    handle: Handle,
    path: str | os.PathLike[str],
    *,
    flat: bool = False,
    part: str | None = None,
    format: str = "auto",
) -> None:
    """Write the adapter into the folder ``path`` (``path/NAME`` unless its name is "default").

    ``flat`` leaves out what only training needs, ``part`` is one of a combination's: see
    :meth:`Handle.save`. A failure leaves a previous checkpoint as it was; a success replaces it,
    also one of the other format. In a distributed run, call it on one process.
    Raises: CheckpointError when it cannot be written; AttachError when the handle is spent;
        ConfigError for an unknown part or format.
    """
    if format not in _FORMATS:
        raise ConfigError(f"save: format must be one of {', '.join(_FORMATS)}, got {format!r}.")
    folder = Path(path)
    if handle.name != "default":
        folder = folder / handle.name
    if part is not None and part not in handle.parts:
        raise ConfigError(f"save: no part is called {part!r}; there are {', '.join(handle.parts)}.")
    if isinstance(handle.delta, Combined) and part is None:
        config, state, files, reason = _combination(handle, flat)
    else:
        config, state, files, reason = _single(handle, part, flat, format)
    if format == "peft" and files is not PEFT:
        raise CheckpointError(f"save: PEFT's file cannot hold this: {reason}. Use format='auto'.")
    # clone: safetensors refuses tensors that share storage, and the file must not
    write_adapter(folder, config, {k: t.contiguous().clone() for k, t in state.items()}, files)


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

    The folder says itself which of the two formats it holds.

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
    files = files_in(folder)
    config = read_config(folder, files)
    delta = _delta(config, files)
    try:
        plan = make_plan(
            model, delta, name=name, backend=backend, strict=strict, frozen=frozen, pack=pack,
            lenient=True,
        )  # fmt: skip
    except TargetError as error:
        raise CheckpointError(f"load: {str(folder)!r} does not fit this model: {error}") from error
    if files is PEFT:
        _check_peft(model, plan, config)
    tensors = read_weights(folder, files)
    if not tensors:
        raise CheckpointError(f"load: {files.weights} in {str(folder)!r} holds no tensors.")
    delta_shapes, saved_shapes = (_in_file(found, plan, files) for found in _expected(model, plan))
    shapes = delta_shapes | saved_shapes
    if files is PEFT:
        tensors = _without_base(tensors, model, folder)
    _check_keys(tensors, shapes, folder, files)
    where = f"load: {files.weights} in {str(folder)!r}"
    for key in delta_shapes:
        if not tensors[key].is_floating_point():
            raise CheckpointError(
                f"{where}: {key!r} must be floating point, got {tensors[key].dtype}."
            )
    _check_tensors(tensors, shapes, where, files, allow_nonfinite)
    if files is PEFT:
        assert isinstance(delta, Delta)  # PEFT's file holds one
        tensors = delta.from_peft_tensors(tensors, plan.sites)
    handle = plan.apply()
    try:
        with torch.no_grad():
            for key, tensor in handle.state().items():
                tensor.copy_(tensors[key])
                if not allow_nonfinite and tensor.is_floating_point() and not _finite(tensor):
                    raise CheckpointError(
                        f"{where}: {key!r} must fit into the model's {tensor.dtype}, and does not. "
                        "Load it into the model in the dtype that it was trained in."
                    )
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

_FORMATS = ("auto", "peft", "deltaops")


class _File(NamedTuple):
    """What is written."""

    config: dict[str, Any]
    state: Mapping[str, Tensor]
    files: Files
    reason: str | None
    """Why the format is not PEFT's, if it cannot be."""


def _stored(handle: Handle, part: str, flat: bool) -> Stored:
    """What a file holds of the part ``part``, with the keys and sites of a single delta."""
    sites = tuple(replace(site, part="") for site in handle.places if site.part == part)
    start = f"{part}/" if part else ""
    state = {
        key.removeprefix(start): tensor.detach().cpu()
        for key, tensor in handle.state().items()
        if key.startswith(start)
    }
    modules = {site.path: handle.model.get_submodule(site.path) for site in sites}
    delta = parts_of(handle.delta)[part]
    factor = handle.weights[part or handle.name]
    if factor != 1:
        delta = delta.weighed(factor)
    return delta.portable(modules, part or handle.name, state, sites, flat=flat)


def _saved_whole(handle: Handle) -> dict[str, Tensor]:
    """The tensors of ``modules_to_save``, which are no part's."""
    sites = [site.part for site in handle.places]
    return {
        key: tensor.detach().cpu()
        for key, tensor in handle.state().items()
        if not any(part and key.startswith(f"{part}/") for part in dict.fromkeys(sites))
    }


def _single(handle: Handle, part: str | None, flat: bool, format: str) -> _File:
    """Of a delta that is alone in its file."""
    model = handle.model
    combined = isinstance(handle.delta, Combined)
    if isinstance(handle.delta, Combined) and handle.delta.gated:
        raise CheckpointError(
            f"save: the part {part!r} goes through gates, which a delta by itself has not. Save "
            "the whole combination, without part."
        )
    delta, state, sites = _stored(handle, part if combined and part else "", flat)
    if combined:
        state = {**state, **_saved_whole(handle)}
    labelled = delta.labelled(model)
    reason = _unlike_peft(model, labelled, sites, writing=True)
    if reason is not None or format == "deltaops":
        return _File(_manifest(model, delta), state, OURS, reason)
    state = labelled.to_peft_tensors(state, sites)
    return _File(_peft_config(model, labelled, sites), state, PEFT, None)


def _combination(handle: Handle, flat: bool) -> _File:
    """Of all parts and what is trained whole; PEFT has no format for several."""
    parts: dict[str, Delta] = {}
    state: dict[str, Tensor] = {}
    for part in handle.parts:
        stored = _stored(handle, part, flat)
        parts[part] = stored.delta
        state |= {f"{part}/{key}": tensor for key, tensor in stored.state.items()}
    gated = isinstance(handle.delta, Combined) and handle.delta.gated
    reason = "it is a combination; save(path, part=NAME) writes one of its parts"
    return _File(
        _manifest(handle.model, Combined(parts, gated)), state | _saved_whole(handle), OURS, reason
    )


def _peft_config(model: nn.Module, delta: Delta, sites: tuple[Site, ...]) -> dict[str, Any]:
    """All that PEFT needs to build the same adapter on the same base model."""
    paths = tuple(site.path for site in sites if site.place not in BY_PARAMETER)
    config = delta.to_peft(sites)
    if "layers_to_transform" in config and not _means_the_same(model, delta, paths):
        # every path in full, as PEFT writes "all-linear": it means the same to every reader
        config["target_modules"] = sorted(paths)
        config["layers_to_transform"] = config["layers_pattern"] = None
    if "num_virtual_tokens" in config:
        config |= {k: v for k, v in about(model).items() if config.get(k) is None}
    kind = type(model)
    config.update(
        auto_mapping=(
            {"base_model_class": kind.__name__, "parent_library": kind.__module__}
            if config["task_type"] is None
            else None
        ),
        base_model_name_or_path=_base_model(model),
        inference_mode=True,
    )
    if "fan_in_fan_out" in config:
        # PEFT reads it as the layout of the last matched layer and corrects it, layer by layer
        last = model.get_submodule(paths[-1]) if paths else None
        config["fan_in_fan_out"] = hasattr(last, "nf")
    return config


def _unlike_peft(
    model: nn.Module, delta: Delta, sites: tuple[Site, ...], *, writing: bool
) -> str | None:
    """Why PEFT's file cannot hold this; None where it can."""
    if delta.peft_type is None:
        return "PEFT has no such method"
    reason = delta.unlike_peft(model, sites, writing=writing)
    if reason is None and delta.peft_role is not None:
        found = resolve(model, (delta.peft_role,), lenient=True)
        theirs = [path for path in found if delta.peft_takes(model.get_submodule(path))]
        if [site.path for site in sites] != theirs:
            return f"it binds to other modules than all {len(theirs)} of {delta.peft_role!r}"
    return reason


def _manifest(model: nn.Module, delta: Delta | Combined) -> dict[str, Any]:
    """All that :func:`load` needs to build the same adapter on the same base model."""
    kept: dict[str, Any] = {"settings": delta.settings()}
    if isinstance(delta, Combined):
        kept = {"parts": delta.settings(), "gated": delta.gated}
    return {
        "format": FORMAT,
        "version": VERSION,
        "method": delta.kind,
        **kept,
        "base_model": _base_model(model),
    }


def _base_model(model: nn.Module) -> str | None:
    """Where the base model came from, if it says so."""
    config = getattr(model, "config", None)
    return getattr(config, "name_or_path", None) or getattr(model, "name_or_path", None) or None


def _means_the_same(model: nn.Module, delta: Delta, sites: tuple[str, ...]) -> bool:
    """Whether another reader of the delta's own names, who knows no places, matches these sites."""
    target = delta.target_modules
    if isinstance(target, str) or roles(target) or delta.layers_to_transform is not None:
        return False
    kinds = (nn.Linear, LinearPlace, nn.Embedding)
    paths = [p for p, m in model.named_modules() if isinstance(m, kinds)]
    found = {p for p in paths if selects(target, p)}
    if delta.exclude_modules is not None:
        found = {p for p in found if not selects(delta.exclude_modules, p)}
    return found == set(sites)


# ------------------------------------------------------------------------------------------ load


def _delta(config: Mapping[str, Any], files: Files) -> Delta | Combined:
    """The method and settings of a file, or those of all parts."""
    if files is PEFT:
        by_type = {m.peft_type: m for m in METHODS.values() if m.peft_type is not None}
        kind = config.get("peft_type")
        if not isinstance(kind, str) or kind not in by_type:
            raise CheckpointError(
                f"load: {files.config} has peft_type={kind!r}; deltaops reads {', '.join(by_type)}."
            )
        return by_type[kind].from_peft(config)
    if config.get("format") != FORMAT or config.get("version") != VERSION:
        raise CheckpointError(
            f"load: {files.config} must have format={FORMAT!r} and version={VERSION}, got "
            f"{config.get('format')!r} and {config.get('version')!r}. A newer deltaops may read it."
        )
    if config.get("method") == Combined.kind:
        return _parts(config.get("parts"), config.get("gated", False), files)
    return _method(config, files)


def _parts(parts: Any, gated: Any, files: Files) -> Combined:
    """The parts of a manifest. Raises: CheckpointError where they are none."""
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise CheckpointError(
            f"load: {files.config} must have a list of parts, each with name, method and settings."
        )
    try:
        found = tuple((part.get("name"), _method(part, files)) for part in parts)
        return Combined(found, gated)
    except ConfigError as error:
        raise CheckpointError(f"load: {files.config}: {error}") from error


def _method(config: Mapping[str, Any], files: Files) -> Delta:
    kind, settings = config.get("method"), config.get("settings")
    method = METHODS.get(kind) if isinstance(kind, str) else None
    if method is None or not isinstance(settings, dict):
        raise CheckpointError(
            f"load: {files.config} has method={kind!r}; deltaops knows {', '.join(METHODS)}, each "
            "with an object of settings."
        )
    try:
        return method(**settings)
    except (ConfigError, TypeError) as error:  # TypeError: a setting that the method does not have
        raise CheckpointError(f"load: {files.config}: {error}") from error


def _check_peft(model: nn.Module, plan: Plan, config: Mapping[str, Any]) -> None:
    """Raises: CheckpointError for a file that PEFT gives another meaning in ``model``."""
    delta = plan.delta
    assert isinstance(delta, Delta)  # PEFT's file holds one
    reason = _unlike_peft(model, delta, plan.sites, writing=False)
    if reason is not None:
        raise CheckpointError(
            f"load: {PEFT.config} means something else to PEFT in this {type(model).__name__}: "
            f"{reason}. Load it with peft."
        )
    sizes = delta.to_peft(plan.sites) if delta.peft_sizes else {}
    for key in delta.peft_sizes:
        if config.get(key) not in (None, sizes[key]):
            raise CheckpointError(
                f"load: {PEFT.config} has {key}={config[key]!r}, and this {type(model).__name__} "
                f"{sizes[key]!r}. Is this the base model that it was trained on?"
            )


Shapes = dict[str, tuple[int, ...]]


def _expected(model: nn.Module, plan: Plan) -> tuple[Shapes, Shapes]:
    """Every key of ``handle.state()`` with its shape: the delta's, and those saved whole."""
    ours: Shapes = {}
    saved: Shapes = {}
    for site, suffix, shape in plan.tensors():
        ours[site.key(suffix)] = shape
    for path in plan.saved:
        for key, tensor in model.get_submodule(path).state_dict().items():
            saved[f"{path}.{key}"] = tuple(tensor.shape)
    return ours, saved


def _in_file(shapes: Shapes, plan: Plan, files: Files) -> Shapes:
    """What the file must hold for tensors of ``shapes``."""
    if files is OURS:
        return shapes
    assert isinstance(plan.delta, Delta)  # PEFT's file holds one
    empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    found = plan.delta.to_peft_tensors(empty, plan.sites)
    return {key: tuple(tensor.shape) for key, tensor in found.items()}


def _without_base(
    tensors: Mapping[str, Tensor], model: nn.Module, folder: Path
) -> dict[str, Tensor]:
    """``tensors`` without the frozen weights, which PEFT writes along for embeddings with a delta.

    Raises: CheckpointError where one is not what the model has.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    ending = ".base_layer.weight"
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        path = key.removeprefix(PEFT_PREFIX).removesuffix(ending) + ".weight"
        if not key.endswith(ending) or path not in own:
            found[key] = tensor
            continue
        weight = own[path].detach().cpu()
        if weight.shape != tensor.shape or not torch.equal(weight, tensor.to(weight.dtype)):
            raise CheckpointError(
                f"load: {PEFT.weights} in {str(folder)!r} replaces the frozen weight at {path!r}, "
                "and the model has another one. Load the base model that it was trained on."
            )
    return found


def _check_keys(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    folder: Path,
    files: Files,
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
        f"load: {files.weights} in {str(folder)!r} does not fit this model and its "
        f"{files.config}: "
        f"{'; '.join(parts)}. Is this the base model that it was trained on?"
    )


def _check_tensors(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    where: str,
    files: Files,
    allow_nonfinite: bool,
) -> None:
    # in the model's order: safetensors hands tensors out in the order of its hash table
    for key, shape in expected.items():
        tensor = tensors[key]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{where}: {key!r} must be {list(shape)} for this model and {files.config}, got "
                f"{list(tensor.shape)}. Is this the base model that it was trained on?"
            )
        if not allow_nonfinite and tensor.is_floating_point() and not _finite(tensor):
            raise CheckpointError(
                f"{where}: {key!r} holds NaN or infinity; the training that wrote it had diverged. "
                "Pass allow_nonfinite=True to load it as it is."
            )


def _finite(tensor: Tensor) -> bool:
    small = tensor.element_size() == 1  # torch has no isfinite of float8
    return bool(torch.isfinite(tensor.float() if small else tensor).all())


def _some(keys: list[str], limit: int = 4) -> str:
    shown = ", ".join(repr(key[:120]) for key in keys[:limit])
    return f"{shown}, …" if len(keys) > limit else shown
