"""Gates on the parts of a combination: where they can be, and their tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from deltaops.errors import AttachError, NoBackendError
from deltaops.methods import LoRA, Prefix
from deltaops.methods.base import ATTENTION, MODEL, Delta, Site, adapter_dtype
from deltaops.methods.causal import is_causal
from deltaops.modules import DeltaPlace, Gate, gate_of, gate_prefix

NO_MERGE = "its gate depends on the input"
_SUFFIX = "gate."


def refuse_gates(
    model: nn.Module, parts: Mapping[str, Delta], sites: tuple[Site, ...], strict: bool
) -> None:
    """Raises: AttachError where a site can have no gate, or a token would see later ones;
    NoBackendError under ``strict`` where a gated part runs in torch."""
    if is_causal(model):
        raise AttachError(
            f"attach: {type(model).__name__} is causal, and a gate is the mean over all tokens of "
            "a sample: it would tell a token of those that follow. Attach without gates."
        )
    for site in sites:
        if site.place != MODEL and parts[site.part].gate_width(site) is None:
            raise AttachError(
                f"attach: the part {site.part!r} can have no gate at {site.path!r}. Gates are for "
                "Prefix, adapters after or beside a sub-layer, and plain LoRA on linear layers."
            )
        if strict and isinstance(parts[site.part], (LoRA, Prefix)):
            raise NoBackendError(
                f"attach: strict=True wants parts on a backend, and {site.part!r} behind a gate "
                "runs in torch. Attach with strict=False, or without gates."
            )


def bind_gate(site: Site, delta: Delta, module: nn.Module, name: str) -> None:
    """Put a gate on the adapter ``name`` of ``module``, which is bound already."""
    width = delta.gate_width(site)
    if site.place == MODEL or width is None:
        return
    weights = (p for p in module.parameters() if p.is_floating_point())
    like = next(weights, torch.empty(0))
    gate = Gate(width, torch.empty(0, device=like.device, dtype=adapter_dtype(like, True)))
    if site.place == ATTENTION:
        gate_prefix(module, name, gate)
    else:
        assert isinstance(module, DeltaPlace)
        module.add_gate(name, gate)


def gate_tensors(module: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Suffix in a checkpoint → parameter."""
    gate = gate_of(module, name)
    return {} if gate is None else {f"{_SUFFIX}{k}": p for k, p in gate.named_parameters()}


def gate_shapes(site: Site, delta: Delta) -> dict[str, tuple[int, ...]]:
    """Suffix in a checkpoint → shape, before anything is bound."""
    width = None if site.place == MODEL else delta.gate_width(site)
    return {} if width is None else {f"{_SUFFIX}weight": (width,), f"{_SUFFIX}bias": (1,)}
