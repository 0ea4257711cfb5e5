"""All that a training run needs to go on with the same bits, in one safetensors file.

    parameter.<name>          the trainable tensors
    optimizer.<name>/<key>    AdamW's exp_avg, exp_avg_sq and step of each
    rng.cpu, rng.cuda         torch's generators
    controller.<name>         the tensors of a controller, where one steered; its facts are JSON
    metadata["deltaops"]      JSON: step, history, settings, …; the position in the data is the step

Never pickle: opening a foreign file cannot run code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from deltaops.errors import CheckpointError
from deltaops.surgery import Handle

FILE = "training_state.safetensors"
VERSION = 1


def names_in_model(handle: Handle) -> dict[str, str]:
    """Key of what the handle trains → its name in the model, which it has while it is on."""
    names = {id(parameter): name for name, parameter in handle.model.named_parameters()}
    return {key: names[id(parameter)] for key, parameter in handle.named_parameters()}


def trained(handle: Handle, names: Mapping[str, str]) -> dict[str, Parameter]:
    """Name → parameter of all that the handle trains, also what is off or frozen by now."""
    return {names[key]: parameter for key, parameter in handle.named_parameters()}


def write_state(
    path: Path,
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any],
    controller: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the state as it is now. ``facts`` is JSON. Not atomic: write beside, then rename."""
    steered = (controller or {}).items()
    tensors = {f"controller.{name}": tensor.cpu().contiguous() for name, tensor in steered}
    for name, parameter in parameters.items():
        tensors[f"parameter.{name}"] = parameter.detach().cpu().contiguous().clone()
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"optimizer state {key!r} of {name} is a {type(value).__name__}, expected a "
                    "tensor. Only optimizers whose state is tensors can be resumed."
                )
            tensors[f"optimizer.{name}/{key}"] = value.detach().cpu().contiguous().clone()
    tensors["rng.cpu"] = torch.get_rng_state()
    device = next(iter(parameters.values())).device
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    head = json.dumps({"version": VERSION, **facts}, ensure_ascii=False, allow_nan=False)
    save_file(tensors, path, metadata={"deltaops": head})


def read_facts(path: Path) -> dict[str, Any]:
    """The JSON part of a state file. Raises: CheckpointError for a damaged or foreign file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a training state: {error}. It is damaged or not one of "
            "deltaops; start again in another --out."
        ) from error
    try:
        facts = json.loads(metadata.get("deltaops", ""))
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path} is a safetensors file without deltaops' training state. Name the --out of a "
            "`deltaops tune` run."
        ) from error
    if not isinstance(facts, dict) or facts.get("version") != VERSION:
        found = facts.get("version") if isinstance(facts, dict) else facts
        raise CheckpointError(
            f"{path} has state version {found!r}, this deltaops reads version {VERSION}. "
            "Resume it with the deltaops that wrote it."
        )
    return facts


def read_controller(path: Path) -> dict[str, Tensor]:
    """The tensors of a controller in a state file. Raises: CheckpointError."""
    read_facts(path)
    start = "controller."
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(start)]
        return {name.removeprefix(start): file.get_tensor(name) for name in names}


def restore_state(
    path: Path, parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Put parameters, optimizer and generators back as :func:`write_state` found them.

    Raises: CheckpointError where the file is damaged or its tensors do not fit; checked first, so
        the model is then as it was.
    """
    read_facts(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    saved = {n.removeprefix("parameter.") for n in tensors if n.startswith("parameter.")}
    if saved != set(parameters):
        odd = sorted(saved ^ set(parameters))
        raise CheckpointError(
            f"{path} belongs to another model or delta: {len(odd)} parameters differ, such as "
            f"{odd[0]}. Resume with the model it was started on."
        )
    for name, parameter in parameters.items():
        found = tensors[f"parameter.{name}"]
        if found.shape != parameter.shape or found.dtype != parameter.dtype:
            raise CheckpointError(
                f"{path}: {name} must be {list(parameter.shape)} {parameter.dtype}, got "
                f"{list(found.shape)} {found.dtype}. Resume with the model it was started on."
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
    optimizer.state.clear()
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            name, _, field = key.removeprefix("optimizer.").rpartition("/")
            parameter = parameters[name]
            # AdamW keeps its step counter on the CPU, and moments beside the parameter
            home = tensor if field == "step" else tensor.to(parameter.device)
            optimizer.state[parameter][field] = home
    torch.set_rng_state(tensors["rng.cpu"])
    device = next(iter(parameters.values())).device
    if device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)
