"""Take LoRA off single places of a live model, which are frozen layers again, run by the same op;
and put it back there, for a run that goes back to an earlier step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from deltaops.methods import Combined, Delta, parts_of
from deltaops.methods.base import Binding, Site
from deltaops.modules import (
    DeltaEmbedding,
    DeltaPlace,
    LinearPlace,
    become,
    frozen_class,
    unbecome,
    unbecome_embedding,
)
from deltaops.packing import Policy

from .components import Sized
from .gates import bind_gate
from .handle import Handle

USUAL: Policy = "auto"


class Removal:
    """What taking ``places`` out will change; nothing before :meth:`commit`."""

    def __init__(self, handle: Handle, places: Iterable[Sized]) -> None:
        """Note which."""
        self._handle = handle
        self._places = list(places)

    def commit(self) -> None:
        """Take them out of their modules and of the record."""
        record = self._handle._record
        record.once = record.once or record.sites
        gone = {place.site for place in self._places}
        record.sites = tuple(site for site in record.sites if site not in gone)
        for place in self._places:
            others = [s.part for s in record.sites if s.path == place.path]
            if _take_off(place.module, place.name):
                record.frozen = (*record.frozen, place.path)
            elif isinstance(place.module, DeltaPlace):
                kinds = dict.fromkeys(parts_of(record.delta)[part].kind for part in others)
                place.module.__dict__["delta_kind"] = " + ".join(kinds)


def _take_off(module: nn.Module, name: str) -> bool:
    """Whether the module, which had nothing else, is a frozen layer now."""
    assert isinstance(module, DeltaPlace | DeltaEmbedding)
    module.remove_lora(name)
    if module.names():
        return False
    if isinstance(module, DeltaEmbedding):
        unbecome_embedding(module)
        return False
    settings = module.backend, module.strict, module.pack
    unbecome(module)
    frozen = frozen_class(type(module))
    assert frozen is not None  # every place with deltas has a frozen one
    become(module, frozen, *settings)
    return True


def taken_out(handle: Handle) -> tuple[Site, ...]:
    """The places that were taken out of ``handle``, and could be put back."""
    record = handle._record
    return tuple(site for site in record.once if site not in record.sites)


def put_back(
    handle: Handle,
    sites: Iterable[Site],
    deltas: Mapping[str, Delta],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Let places have the delta again, with start values and the settings of then.

    Args:
        handle: that has each part somewhere.
        sites: of :func:`taken_out`.
        deltas: name in ``handle.parts`` → settings of then.
        optimizer: that gets the new parameters, each where the part's others of its kind are.
    """
    record = handle._record
    modules = dict(handle.model.named_modules())
    for site in sites:
        module, name = modules[site.path], site.part or handle.name
        backend, strict, pack = "auto", False, USUAL  # an embedding has none of these
        if isinstance(module, LinearPlace):
            backend, strict, pack = module.backend, module.strict, module.pack
        if site.path in record.frozen:
            unbecome(module)
            record.frozen = tuple(path for path in record.frozen if path != site.path)
        delta = deltas[name]
        anything = torch.Generator()  # the numbers come later
        delta.bind(site, modules, Binding(name, backend, strict, pack, anything, {}))
        if isinstance(record.delta, Combined) and record.delta.gated:
            bind_gate(site, delta, module, name)
        if site.part in record.off:
            delta.activate(module, False, name)
        record.sites = tuple(one for one in record.once if one in (*record.sites, site))
        if optimizer is not None:
            _join(handle, site, optimizer)


def _join(handle: Handle, site: Site, optimizer: torch.optim.Optimizer) -> None:
    """Have ``optimizer`` train what is new at ``site``."""
    like = {
        suffix: parameter
        for other, tensors in handle.by_place().items()
        if other.part == site.part and other != site
        for suffix, parameter in tensors.items()
    }
    for suffix, parameter in handle.by_place()[site].items():
        for group in optimizer.param_groups:
            if any(one is like.get(suffix) for one in group["params"]):
                group["params"].append(parameter)
