"""Parameters of a module that a delta trains or changes, while the originals wait beside them.

BitFit trains biases and LN tuning trains norms; PiSSA takes its start out of weights. What they
train or changed is in the original's place, under its name, so that the module's own forward reads
it; the original, untouched, comes back when the delta is disabled or reverted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_deltaops_kept"
"""In the ``__dict__`` of a module: :class:`_Kept` by the name of the adapter."""


@dataclass
class _Kept:
    """What is not in the module now: the originals while ``active``, else what is trained."""

    outside: dict[str, nn.Parameter | None]
    absent: frozenset[str]
    """Names that the module did not have at all, not even as None."""
    active: bool = True


def train_copies(
    module: nn.Module, starts: dict[str, Tensor], owner: str, *, trained: bool = True
) -> None:
    """Put trainable ``starts`` in the place of ``module``'s parameters of the same names.

    Args:
        module: whose parameters they replace; it may lack them, or have None in their place.
        starts: by name; copied. No other owner has copies of these names, and no other module of
            these parameters: surgery refuses such before.
        owner: name of the adapter that they belong to.
        trained: False where they are frozen as the originals are.
    """
    copies = {name: nn.Parameter(t.detach().clone(), trained) for name, t in starts.items()}
    parameters = module._parameters
    kept = _Kept(
        {name: parameters.get(name) for name in copies},
        frozenset(name for name in copies if name not in parameters),
    )
    module.__dict__.setdefault(_ATTRIBUTE, {})[owner] = kept
    parameters.update(copies)


def owners(module: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that have copies on ``module``."""
    return tuple(module.__dict__.get(_ATTRIBUTE, ()))


def has_copies(module: nn.Module, owner: str | None = None) -> bool:
    """Whether ``owner``, or anybody, called :func:`train_copies`, and :func:`give_back` not yet."""
    found = owners(module)
    return bool(found) if owner is None else owner in found


def copies(module: nn.Module, owner: str) -> dict[str, nn.Parameter]:
    """What ``owner`` trains, by name, whether it is in its place now or not."""
    kept = _kept(module, owner)
    found: dict[str, nn.Parameter] = {}
    for name, outside in kept.outside.items():
        copy = module._parameters[name] if kept.active else outside
        assert copy is not None
        found[name] = copy
    return found


def originals(module: nn.Module, owner: str) -> dict[str, nn.Parameter | None]:
    """What waits while the copies are in their places, by name; None where there was nothing."""
    kept = _kept(module, owner)
    assert kept.active, "the originals are in their places, or what was merged is"
    return dict(kept.outside)


def activate_copies(module: nn.Module, active: bool, owner: str) -> None:
    """Put the copies into their places, or the originals; nothing where they are there already."""
    kept = _kept(module, owner)
    if kept.active is active:
        return
    parameters = module._parameters
    for name, incoming in kept.outside.items():
        outgoing = parameters.get(name)
        beside = parameters.get("weight") if outgoing is None else outgoing
        if incoming is not None and beside is not None:
            follow(incoming, beside)
        if incoming is None and name in kept.absent:
            parameters.pop(name, None)
        else:
            parameters[name] = incoming
        kept.outside[name] = outgoing
    kept.active = active


def give_back(module: nn.Module) -> None:
    """Forget all copies. The originals are back, or what was merged into their places stays."""
    for owner in owners(module):
        activate_copies(module, False, owner)
    module.__dict__.pop(_ATTRIBUTE, None)


def follow(tensor: Tensor, current: Tensor) -> None:
    """Move ``tensor`` to where ``current`` is: the model may have been moved or cast meanwhile."""
    if tensor.device != current.device or tensor.dtype != current.dtype:
        tensor.data = tensor.data.to(device=current.device, dtype=current.dtype)


def zeros_for(module: nn.Module, size: int) -> Tensor:
    """The start of a bias that ``module`` lacks: ``[size]`` in the dtype of its weight."""
    weight: Any = module.weight
    return torch.zeros(size, dtype=weight.dtype, device=weight.device)


def _kept(module: nn.Module, owner: str) -> _Kept:
    found = module.__dict__[_ATTRIBUTE][owner]
    assert isinstance(found, _Kept)
    return found
