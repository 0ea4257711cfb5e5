"""The components that a delta's rank counts, and where their parameters lie.

    Δ = s · Σᵢ B[:, i] A[i, :]

A component of LoRA is a row of A with a column of B; one of a bottleneck adapter is a unit with
what it reads, its bias and what it adds. Parameters without an axis for them (a bias of the layer,
DoRA's magnitude, a norm, a gate) are the same at every rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaops.errors import ConfigError
from deltaops.methods import Adapter, Delta, LoRA, ParallelAdapter, parts_of
from deltaops.methods.base import EMBEDDING, LINEAR, Site
from deltaops.methods.lora_start import is_taken_out

from .handle import Handle

AXES = {
    "lora_A.weight": 0,
    "lora_B.weight": 1,
    "lora_embedding_A": 0,
    "lora_embedding_B": 1,
    "adapter.down.weight": 0,
    "adapter.down_bias": 0,
    "adapter.up.weight": 1,
}
"""Suffix of a tensor → its axis that counts components."""


class Slot(NamedTuple):
    """Where a parameter lies."""

    holder: nn.Module
    key: str
    axis: int

    @property
    def parameter(self) -> nn.Parameter:
        """The one that lies there now."""
        found = self.holder._parameters[self.key]
        assert found is not None
        return found

    def put(self, parameter: nn.Parameter) -> None:
        """Let another one lie there."""
        self.holder._parameters[self.key] = parameter


@dataclass(frozen=True)
class Sized:
    """A place whose delta has a rank that can change."""

    site: Site
    module: nn.Module
    delta: Delta
    name: str
    """Of the adapter."""
    tensors: dict[str, nn.Parameter]
    """By suffix, all that is trained there, a gate as well."""
    slots: dict[str, Slot]
    """By suffix, the parameters whose size follows the rank: what reads first, what adds last."""
    fixed: int
    """Parameters whose size does not."""

    @property
    def path(self) -> str:
        """Of the module."""
        return self.site.path

    @property
    def rank(self) -> int:
        """How many components there are."""
        slot = next(iter(self.slots.values()))
        return slot.parameter.shape[slot.axis]

    @property
    def unit(self) -> int:
        """Parameters of one component."""
        return sum(slot.parameter.numel() // self.rank for slot in self.slots.values())

    def parameters(self, rank: int) -> int:
        """How many the place has at ``rank``; none at 0, where it is taken out."""
        return rank * self.unit + self.fixed if rank else 0

    @property
    def largest(self) -> int:
        """The highest rank that adds something: of a product, the smaller side."""
        a, b = self.ends
        width, height = a.numel() // self.rank, b.numel() // self.rank
        return min(width, height) if isinstance(self.delta, LoRA) else 2**31

    @property
    def ends(self) -> tuple[nn.Parameter, nn.Parameter]:
        """What reads, ``[R, K]``, and what adds, ``[N, R]``."""
        matrices = [s.parameter for s in self.slots.values() if s.parameter.dim() == 2]
        down, up = matrices
        return down, up

    def norms(self) -> Tensor:
        """‖B[:, i]‖ · ‖A[i, :]‖ of each component, ``[R]`` in float64: its size in Δ, but for s."""
        down, up = (t.detach().double() for t in self.ends)
        found: Tensor = torch.linalg.vector_norm(down, dim=1) * torch.linalg.vector_norm(up, dim=0)
        return found


def part_of(handle: Handle, part: str | None, action: str) -> str:
    """The part ``part`` as sites have it; without a name the only one.

    Raises: ConfigError for an unknown name, or none where there are several.
    """
    known = {key or handle.name: key for key in parts_of(handle.delta)}
    if part is None and len(known) == 1:
        return next(iter(known.values()))
    if part not in known:
        raise ConfigError(
            f"{action}: part must name one of {', '.join(known)}, got {part!r}. Pass part=NAME."
        )
    return known[part]


def sized_places(handle: Handle, part: str | None, action: str) -> dict[str, Sized]:
    """Path → place, of the part ``part``, in the model's order.

    Raises: ConfigError where the part's rank cannot change.
    """
    key = part_of(handle, part, action)
    delta = parts_of(handle.delta)[key]
    reason = _fixed_size(delta)
    if reason is not None:
        raise ConfigError(
            f"{action}: {delta!r} must have a rank that can change, and {reason}. LoRA, Adapter "
            "and ParallelAdapter have one."
        )
    found = {}
    for site in handle.places:
        if site.part != key:
            continue
        module = handle.model.get_submodule(site.path)
        name = key or handle.name
        if site.place not in (LINEAR, EMBEDDING):
            continue
        tensors = handle._tensors(site)
        slots = {
            suffix: _slot(module, parameter, AXES[suffix])
            for suffix, parameter in tensors.items()
            if suffix in AXES
        }
        fixed = sum(p.numel() for suffix, p in tensors.items() if suffix not in AXES)
        found[site.path] = Sized(site, module, delta, name, tensors, slots, fixed)
    if not found:
        raise ConfigError(
            f"{action}: {delta!r} must be on linear layers or embeddings, and is on none: ranks of "
            "experts and routers stay as they are."
        )
    return found


def trained(places: Iterable[Sized]) -> int:
    """Parameters of all ``places`` together."""
    return sum(place.parameters(place.rank) for place in places)


def _fixed_size(delta: Delta) -> str | None:
    """Why the rank of ``delta`` cannot change; None where it can."""
    if type(delta) not in (LoRA, Adapter, ParallelAdapter):
        return f"{type(delta).__name__} has none"
    if isinstance(delta, LoRA) and is_taken_out(delta.init_lora_weights):
        return (
            f"init_lora_weights={delta.init_lora_weights!r} took its start out of the weight, at "
            "the rank that it has"
        )
    return None


def _slot(module: nn.Module, parameter: nn.Parameter, axis: int) -> Slot:
    for holder in module.modules():
        for key, held in holder._parameters.items():
            if held is parameter:
                return Slot(holder, key, axis)
    raise AssertionError("a delta's tensor lies on its module")  # Delta.tensors names those only


def plain(parameter: Any) -> bool:
    """Whether ``parameter`` is torch's own, whole on one device."""
    return type(parameter) is nn.Parameter and type(parameter.data) is Tensor
