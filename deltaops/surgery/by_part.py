"""A batch whose samples have parts of an attached combination of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from deltaops.errors import AttachError
from deltaops.methods import Delta, parts_of
from deltaops.modules import SAMPLES, DeltaPlace, Samples, has_copies

from .record import Record, read


def attached_to(model: nn.Module) -> Record | None:
    """The record of ``model``, or of what it wraps; None where nothing is attached."""
    return next((found for m in model.modules() if (found := read(m)) is not None), None)


def parts_by_name(record: Record) -> dict[str, Delta]:
    """Name → delta; a single one has the adapter's name."""
    return {part or record.name: delta for part, delta in parts_of(record.delta).items()}


@contextmanager
def parts_by_sample(model: nn.Module, record: Record, names: Sequence[str]) -> Iterator[None]:
    """While it is open, sample i of each batch runs with the part ``names[i]`` alone.

    Raises: AttachError for a part that is on and is more than branches of linear layers.
    """
    places = _places(model, record)
    samples = Samples(names)
    for place in places:
        place.__dict__[SAMPLES] = samples
    try:
        yield
    finally:
        for place in places:
            place.__dict__.pop(SAMPLES, None)


def _places(model: nn.Module, record: Record) -> list[DeltaPlace]:
    """Those of the parts that are on. Raises: AttachError, before anything changes."""
    if record.merged or record.disabled is not None:
        what = "merged into the weights" if record.merged else "disabled"
        raise AttachError(
            f"adapters_by_sample: the delta is {what}, for all samples alike. "
            "Call handle.unmerge() or leave handle.disabled() first."
        )
    if any(SAMPLES in module.__dict__ for module in model.modules()):
        raise AttachError("adapters_by_sample: one is open already. Leave it first.")
    root = next(m for m in model.modules() if read(m) is record)
    found: dict[str, DeltaPlace] = {}
    for site in record.sites:
        name = site.part or record.name
        if site.part in record.off:
            continue
        module = root.get_submodule(site.path)
        if not isinstance(module, DeltaPlace) or not _is_branch(module, name):
            raise AttachError(
                f"adapters_by_sample: {name!r} is at {site.path!r} more than a branch of a linear "
                "layer, and would be in all samples. LoRA goes by sample; switch "
                f"the others off: with handle.disabled({name!r})."
            )
        if (reason := module.slow_reason()) is not None:
            raise AttachError(f"adapters_by_sample: {site.path!r}: {reason}. Freeze it.")
        found[site.path] = module
    return list(found.values())


def _is_branch(place: DeltaPlace, name: str) -> bool:
    """Whether all that ``name`` does there is one branch of the op. (A parallel adapter is not: its
    last bias is a copy of the layer's, which all rows see.)"""
    around = any(part.name == name for part in place.around)
    branch = name in place.lora
    return branch and not around and not has_copies(place, name)
