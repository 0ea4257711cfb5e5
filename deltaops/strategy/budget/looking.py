"""Gradients of a model that is only looked at: flags, gradients and random states stay."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaops.errors import ConfigError

Loss = Callable[[nn.Module, Any], Tensor]
"""Model and batch → the loss, one number."""


@contextlib.contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """Inside, the model evaluates (no dropout), with gradients on; random states come back."""
    training = [module for module in model.modules() if module.training]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    model.eval()
    try:
        with torch.random.fork_rng(list(devices)), torch.enable_grad():
            yield
    finally:
        for module in training:
            module.training = True


def gradients(
    subject: str, model: nn.Module, loss: Loss, batch: Any, parameters: Sequence[Tensor]
) -> list[Tensor]:
    """∂loss/∂p of each of ``parameters``, zero where the loss does not depend on it.

    Raises: ConfigError where the loss is no finite number that depends on any of them.
    """
    frozen = sum(not p.requires_grad for p in parameters)
    if frozen:
        raise ConfigError(
            f"{subject}: the delta must be trained, and {frozen} of the {len(parameters)} tensors "
            "that are asked for are frozen. Thaw it first."
        )
    value = loss(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        shown = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(
            f"{subject}: loss(model, batch) must return a tensor with one number, got {shown}. "
            "Return model(**batch).loss."
        )
    if not value.requires_grad or not bool(torch.isfinite(value)):
        raise ConfigError(
            f"{subject}: the loss must be finite and depend on what the delta trains, got "
            f"{value.item():g}, {'with' if value.requires_grad else 'without'} a gradient. Compute "
            "it with gradients on, from the model that has the delta."
        )
    found = torch.autograd.grad(value, list(parameters), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
