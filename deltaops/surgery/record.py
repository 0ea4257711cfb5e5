"""What surgery did to a model, kept on the model itself, so that copies and pickles know it too.

The record names modules by path and holds no reference to the model (a cycle would keep a big
model alive until the garbage collector runs). It does hold the original parameters of what is
trained whole or merged: they *are* the bits that revert and unmerge give back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltaops.errors import AttachError
from deltaops.methods import Combined, Delta
from deltaops.methods.base import Site
from deltaops.modules import follow

_ATTRIBUTE = "_deltaops_record"


@dataclass
class Disabled:
    """What ``handle.disabled()`` took out, to be put back behind it."""

    trained: dict[str, dict[str, Tensor]]
    """Path of a module trained whole → what was trained."""
    merged: dict[str, dict[str, nn.Parameter | None]]
    """Path of a merged place → its merged parameters."""
    inside: bool = True
    """False in a copy of the model, which no ``with`` puts back."""

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle."""
        return self.__dict__ | {"inside": False}


@dataclass
class Record:
    """State of one attached delta."""

    delta: Delta | Combined
    name: str
    sites: tuple[Site, ...]
    saved: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    trained_before: frozenset[str]
    """Names of the base parameters that required gradients."""
    frozen: tuple[str, ...] = ()
    """Paths of the linear layers that run by the op without a delta."""
    originals: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Path of a module trained whole → its original parameters (and copies of its buffers)."""
    merged: dict[str, dict[str, nn.Parameter | None] | None] = field(default_factory=dict)
    """Path of a merged place → its original parameters; None where they were not kept."""
    disabled: Disabled | None = None
    """Inside ``handle.disabled()``."""
    off: set[str] = field(default_factory=set)
    """Names of the parts that are switched off by themselves; the empty one of a single delta."""
    once: tuple[Site, ...] = ()
    """The places that there were before one was taken out, in their order; none before that."""
    weights: dict[str, float] = field(default_factory=dict)
    """Part → how many times what it adds is added, where that is not once."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """What a controller did, as its log has it."""


def read(model: nn.Module) -> Record | None:
    """The record of ``model``, None when nothing is attached."""
    record = model.__dict__.get(_ATTRIBUTE)
    assert record is None or isinstance(record, Record)
    return record


def write(model: nn.Module, record: Record | None) -> None:
    """Put ``record`` on ``model``, or take it off."""
    if record is None:
        model.__dict__.pop(_ATTRIBUTE, None)
    else:
        model.__dict__[_ATTRIBUTE] = record


# ---------------------------------------------------------------------- modules trained whole


def take_over(module: nn.Module) -> dict[str, Tensor]:
    """Give ``module`` trainable copies of its parameters; returns the originals.

    Buffers stay, and the result holds copies of them. New Parameter objects, not new bits in the
    old ones: a head whose weight is tied to the embeddings must not train those too.
    """
    originals: dict[str, Tensor] = {}
    copies: list[tuple[nn.Module, str, nn.Parameter]] = []
    for path, holder, name in _owned(module, "_buffers"):
        originals[path] = getattr(holder, name).detach().clone()
    for path, holder, name in _owned(module, "_parameters"):
        parameter = originals[path] = getattr(holder, name)
        trainable = parameter.is_floating_point() or parameter.is_complex()
        copy = nn.Parameter(parameter.detach().clone(), requires_grad=trainable)
        copies.append((holder, name, copy))
    # only now, when nothing can run out of memory any more, the module changes
    for holder, name, copy in copies:
        setattr(holder, name, copy)
    return originals


def exchange(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put ``tensors`` (by path) into ``module`` and return what they replace."""
    replaced: dict[str, Tensor] = {}
    for path, tensor in tensors.items():
        holder_path, _, name = path.rpartition(".")
        holder = module.get_submodule(holder_path)
        current = getattr(holder, name)
        replaced[path] = current
        follow(tensor, current)
        setattr(holder, name, tensor)
    return replaced


def _owned(module: nn.Module, kind: str) -> Iterable[tuple[str, nn.Module, str]]:
    """``(path, module that holds it, name)`` of every parameter or buffer below ``module``."""
    for prefix, holder in module.named_modules():
        for name, value in getattr(holder, kind).items():
            if value is not None:
                yield (f"{prefix}.{name}" if prefix else name), holder, name


# -------------------------------------------------------------------------------------- merging


def merged_parameters(
    deltas: Iterable[tuple[Delta, str]], module: nn.Module, path: str
) -> dict[str, nn.Parameter]:
    """What merging puts into ``module``, computed in float32 at least and rounded once.

    Args:
        deltas: all that ``module`` has, each with the name of its adapter.
        module: of the place.
        path: of the module.
    Raises: AttachError where a value is not finite.
    """
    found: dict[str, nn.Parameter] = {}
    with torch.no_grad():
        for key, exact in _merged(deltas, module).items():
            replaced = module._parameters.get(key)
            weight = module.weight if replaced is None else replaced
            assert isinstance(weight, nn.Parameter)
            value = exact.to(weight.dtype).contiguous()
            if not bool(torch.isfinite(value).all()):
                raise AttachError(
                    f"handle.merge: the merged {key} of {path!r} is not finite. The adapter or the "
                    "base weight holds NaN or infinity; nothing was merged."
                )
            found[key] = nn.Parameter(value, requires_grad=False)
    return found


def _merged(deltas: Iterable[tuple[Delta, str]], module: nn.Module) -> dict[str, Tensor]:
    """Name of a parameter → its value with all ``deltas``, not rounded between them."""
    before: dict[str, nn.Parameter | None] = {}
    found: dict[str, Tensor] = {}
    try:
        for delta, name in sorted(deltas, key=lambda pair: pair[0].merges_last):
            for key, exact in found.items():  # what the one before left is what this one adds to
                before.setdefault(key, module._parameters.get(key))
                module._parameters[key] = nn.Parameter(exact, requires_grad=False)
            found |= delta.merged(module, name)
    finally:
        module._parameters.update(before)
    return found


def exchange_parameters(
    module: nn.Module, parameters: dict[str, nn.Parameter | None]
) -> dict[str, nn.Parameter | None]:
    """Put ``parameters`` into ``module`` and return what they replace."""
    replaced: dict[str, nn.Parameter | None] = {}
    for name, parameter in parameters.items():
        current = replaced[name] = module._parameters.get(name)
        if parameter is not None and current is not None:
            follow(parameter, current)
        module._parameters[name] = parameter
    return replaced
