"""A batch whose samples have parts of an attached combination of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from deltaops.errors import AttachError
from deltaops.modules import SAMPLES, DeltaPlace, Samples, has_copies, told_apart

from .handle import Handle
from .record import read


def attached_to(model: nn.Module) -> Handle | None:
    """The handle of ``model``, or of what it wraps; None where nothing is attached.

    Raises: AttachError where several parts of it have deltas of their own.
    """
    found = [Handle(m, record) for m in model.modules() if (record := read(m)) is not None]
    if len(found) > 1:
        kinds = " and ".join(type(handle.model).__name__ for handle in found)
        raise AttachError(
            f"adapters_by_sample: {kinds} have a delta each. Attach one to the model as a whole, "
            "with the others as its parts."
        )
    return found[0] if found else None


@contextmanager
def parts_by_sample(handle: Handle, names: Sequence[str]) -> Iterator[None]:
    """While it is open, sample i of each batch runs with the part ``names[i]`` alone.

    Raises: AttachError for a part that is on and is more than branches of linear layers, and for
        one of ``names`` that is off.
    """
    places = _places(handle, set(names))
    samples = Samples(names)
    for place in places:
        place.__dict__[SAMPLES] = samples
    try:
        yield
    finally:
        for place in places:
            if SAMPLES in place.__dict__:  # not reverted inside
                place.__dict__[SAMPLES] = None


def _places(handle: Handle, names: set[str]) -> list[DeltaPlace]:
    """Those of the parts that are on. Raises: AttachError, before anything changes."""
    record = handle._record
    if record.merged or record.disabled is not None:
        what = "merged into the weights" if record.merged else "disabled"
        raise AttachError(
            f"adapters_by_sample: the delta is {what}, for all samples alike. "
            "Call handle.unmerge() or leave handle.disabled() first."
        )
    if told_apart(handle.model):
        raise AttachError("adapters_by_sample: one is open already. Leave it first.")
    off = sorted(names & (handle.parts.keys() - set(handle.enabled)))
    if off:
        raise AttachError(
            f"adapters_by_sample: {off[0]!r} is switched off. Call handle.enable({off[0]!r}) "
            "first, or name its samples '__base__'."
        )
    found: dict[str, DeltaPlace] = {}
    for site in record.sites:
        name = site.part or record.name
        if site.part in record.off:
            continue
        module = handle.model.get_submodule(site.path)
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
