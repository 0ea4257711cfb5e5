"""What surgery did to a model, kept on the model itself, so that copies and pickles know it too.

The record names modules by path and holds no reference to the model (a cycle would keep a big
model alive until the garbage collector runs). It does hold the original parameters of what is
trained whole or merged: they *are* the bits that revert and unmerge give back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deltaops.errors import AttachError
from deltaops.methods.base import Delta

_ATTRIBUTE = "_deltaops_record"


@dataclass
class Record:
    """State of one attached delta."""

    delta: Delta
    name: str
    sites: tuple[str, ...]
    saved: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    trained_before: frozenset[str]
    """Names of the base parameters that required gradients."""
    frozen: tuple[str, ...] = ()
    """Paths of the linear layers that run by the op without a delta."""
    originals: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Path of a module trained whole → its original parameters (and copies of its buffers)."""
    merged: dict[str, nn.Parameter | None] = field(default_factory=dict)
    """Path of a merged place → its original weight; None where that was not kept."""


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


def follow(tensor: Tensor, current: Tensor) -> None:
    """Move ``tensor`` to where ``current`` is: the model may have been moved or cast meanwhile."""
    if tensor.device != current.device or tensor.dtype != current.dtype:
        tensor.data = tensor.data.to(device=current.device, dtype=current.dtype)


def _owned(module: nn.Module, kind: str) -> Iterable[tuple[str, nn.Module, str]]:
    """``(path, module that holds it, name)`` of every parameter or buffer below ``module``."""
    for prefix, holder in module.named_modules():
        for name, value in getattr(holder, kind).items():
            if value is not None:
                yield (f"{prefix}.{name}" if prefix else name), holder, name


# -------------------------------------------------------------------------------------- merging


def merged_weight(delta: Delta, module: nn.Module, name: str, path: str) -> nn.Parameter:
    """``W + ΔW`` in the dtype and layout of W, added in float32 at least and rounded once.

    Raises: AttachError when the sum is not finite.
    """
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    with torch.no_grad():
        change = delta.delta_weight(module, name)
        if hasattr(module, "nf"):  # Conv1D stores [K, N]
            change = change.t()
        total = (weight.to(change.dtype) + change).to(weight.dtype)
        if not bool(torch.isfinite(total).all()):
            raise AttachError(
                f"handle.merge: the merged weight of {path!r} is not finite. The adapter or the "
                "base weight holds NaN or infinity; nothing was merged."
            )
    return nn.Parameter(total, requires_grad=weight.requires_grad)
