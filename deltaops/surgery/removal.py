"""Take LoRA off single places of a live model: they are frozen layers again, run by the same op."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from deltaops.methods import parts_of
from deltaops.modules import (
    DeltaEmbedding,
    DeltaPlace,
    become,
    frozen_class,
    unbecome,
    unbecome_embedding,
)

from .components import Sized
from .handle import Handle


class Removal:
    """What taking ``places`` out will change; nothing before :meth:`commit`."""

    def __init__(self, handle: Handle, places: Iterable[Sized]) -> None:
        """Note which."""
        self._handle = handle
        self._places = list(places)

    def commit(self) -> None:
        """Take them out of their modules and of the record."""
        record = self._handle._record
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
