"""Linear layers that a module calls with the same x run as one op: q, k and v; gate and up.

The module calls them one after the other, each by itself, hooks and all. So the first one that is
called computes the others' outputs, too, and they find theirs when they are called with that x.
Outputs wait no longer than the module's ``forward``, and a module that leaves some unclaimed (a
cross attention, whose keys come from elsewhere) is not asked again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from deltaops.ops import delta_linear_group

APART = "_deltaops_apart"
"""In the ``__dict__`` of a module whose layers turned out not to share x."""

ALTERS_INPUT = "_deltaops_alters_input"
"""In the ``__dict__`` of a place whose op reads something else than the x it is called with."""


Names = Sequence[str]
"""The adapter of each sample, which PEFT's layers are told in a call."""


class _Waiting(NamedTuple):
    x: Tensor
    state: tuple[Any, ...]
    names: Names | None
    outputs: dict[int, Tensor]
    """By the id of the place."""


class _Group:
    """The places of one running module, and what waits for them."""

    def __init__(self, places: Sequence[Any]) -> None:
        self.places = places
        self.waiting: _Waiting | None = None

    def claim(self, place: Any, x: Tensor, names: Names | None) -> Tensor | None:
        """The output of ``place`` for ``x``; None where it is to compute it alone."""
        if not any([place is member for member in self.places]):
            return None
        if names is not None and not _is_told(place):
            return None  # named by the call itself, which tells nothing of the others
        state = _state(x)
        waiting = self.waiting
        if waiting is None:
            told = [_is_told(member) for member in self.places]
            if names is None and True in told:
                self.places = ()  # whose names nobody knows yet
                return None
            layers = [
                # another list of names for another place is seen when it is called
                member.layer_by_row(x, names) if heard else member.layer(x)
                for member, heard in zip(self.places, told, strict=True)
            ]
            if None in layers:
                self.places = ()  # not in this run: each looks for itself
                return None
            ready: list[Any] = layers
            found = delta_linear_group(x, ready, backend=place.backend, strict=place.strict)
            outputs = {id(m): y for m, y in zip(self.places, found, strict=True)}
            waiting = self.waiting = _Waiting(x, state, names, outputs)
        elif waiting.x is not x or waiting.state != state:
            return None
        elif _is_told(place) and waiting.names != names:
            return None
        return waiting.outputs.pop(id(place), None)


class _Current(threading.local):
    group: _Group | None = None


_CURRENT = _Current()


def shared(place: Any, x: Tensor, names: Names | None = None) -> Tensor | None:
    """What the group that is running now has for ``place`` and ``x``; None: compute it alone.

    names: the adapter of each sample, where the call has them.
    """
    if torch.compiler.is_compiling():
        return None
    group = _CURRENT.group
    return None if group is None else group.claim(place, x, names)


@contextmanager
def sharing(module: nn.Module, places: Sequence[Any]) -> Iterator[None]:
    """While ``module`` runs, let ``places`` share what they read.

    Args:
        module: whose forward this is; it remembers when its layers do not share x.
        places: its linear layers, in the order in which it calls them.
    """
    if APART in module.__dict__ or not called_alike(places):
        yield
        return
    before = _CURRENT.group
    group = _CURRENT.group = _Group(places)
    try:
        yield
        if group.waiting is not None and group.waiting.outputs:
            module.__dict__[APART] = True
    finally:
        _CURRENT.group = before


def called_alike(places: Sequence[Any]) -> bool:
    """Whether all are places that call the op the same way, and nothing changes their input."""
    if not places or global_hooks._global_forward_pre_hooks:
        return False
    if not all([hasattr(place, "layer") for place in places]):
        return False
    first = places[0]
    return all(
        [
            place.backend == first.backend
            and place.strict == first.strict
            and (not place._forward_pre_hooks or _is_told(place))
            and "forward" not in place.__dict__
            and ALTERS_INPUT not in place.__dict__
            for place in places
        ]
    )


def _is_told(place: Any) -> bool:
    """Whether it has hooks that tell it the adapter of each sample, and no others: x stays x."""
    hooks = place._forward_pre_hooks
    return bool(hooks) and hasattr(place, "is_told") and all(map(place.is_told, hooks.values()))


def _state(x: Tensor) -> tuple[Any, ...]:
    """What must not change between two calls of a group beside x itself."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    version = None if x.is_inference() else x._version
    return version, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast
