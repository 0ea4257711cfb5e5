"""Change the rank of a delta at single places of a live model.

    more:   A' = [A; drawn]      B' = [B 0]      s' = s:  the same function, to the bit or nearly
    fewer:  A' = A[kept]         B' = B[:, kept] s' = s:  the same but for the components that go

The scale s of a place stays what it was, so alpha follows the rank (``alpha_pattern`` holds it):
with alpha fixed, all other components would change too. New rows of A are drawn as a start at the
new rank would be. Fewer components are those named, those that weigh most, or the best sum of all
of them by singular values (Eckart and Young 1936).

The parameters are new ones, without gradients. An optimizer takes them in the old ones' places:
moments keep the rows that are kept, and begin at zero in new ones under the old step count, so that
Adam's first steps there are up to (1 − β₁) / √(1 − β₂) times lr (3.2 by its defaults).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaops.errors import AttachError, ConfigError, TargetError
from deltaops.methods import Adapter, Combined, Delta, LoRA
from deltaops.methods.base import EMBEDDING
from deltaops.methods.targets import is_count
from deltaops.modules import near_zero, start_embedding, start_values

from .arithmetic import lowered
from .components import Sized, part_of, plain, sized_places
from .handle import Handle
from .match import nearest
from .optimizer_state import Exchange, Follow
from .own_settings import Own, alpha_for, with_own, without
from .removal import Removal

CRITERIA = ("norm", "svd")


class Resized(NamedTuple):
    """What became of one place."""

    path: str
    before: int
    after: int
    """0 where the place was taken out."""
    kept: tuple[int, ...]
    """Which components are still there, in their order; none of them after "svd"."""
    error: float
    """‖Δ − Δ'‖ / ‖Δ‖ by Frobenius, in float64 before rounding; of an adapter the same of the
    product without its activation. 0 where nothing was dropped."""


def resize(
    handle: Handle,
    ranks: Mapping[str, int],
    *,
    part: str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    keep: Mapping[str, Sequence[int]] | None = None,
    by: str = "norm",
    generator: torch.Generator | None = None,
) -> tuple[Resized, ...]:
    """Give places of a live handle other ranks; all of them, or an error and nothing.

    Saving, loading, merging, reverting and PEFT's export go on as if it had been attached so. Under
    DistributedDataParallel or torch.compile, wrap or compile the model again afterwards.

    Args:
        handle: of a delta that is neither merged nor inside ``disabled()``.
        ranks: path of a place → its rank from now on; 0 takes LoRA off that place. An adapter's
            size is one number in its settings: name all of its places, with one size.
        part: of a combination, whose places these are.
        optimizer: whose parameters and state follow; None where there is none yet.
        keep: path of a place → components that stay; ``by`` chooses elsewhere. With fewer than the
            rank, new ones join them.
        by: "norm" keeps the components with the largest ‖B[:, i]‖·‖A[i, :]‖; "svd" (LoRA) makes the
            best ones of all, of which an optimizer knows nothing yet.
        generator: draws new rows of A; torch's global CPU generator without one.
    Returns: what became of each place that changed.
    Raises: ConfigError for ranks, components or a part that cannot be, or an optimizer that cannot
        follow; TargetError for a path without the delta; AttachError for a handle that is spent,
        merged or disabled, or parameters that are sharded or have hooks.
    """
    check_handle(handle, "resize")
    if by not in CRITERIA:
        raise ConfigError(f"resize: by must be one of {', '.join(CRITERIA)}, got {by!r}.")
    places = sized_places(handle, part, "resize")
    keep = dict(keep or {})
    _check_ranks(places, ranks, keep)
    key = part_of(handle, part, "resize")
    with _drawing(generator):
        found = [_change(places[p], rank, keep.get(p), by, generator) for p, rank in ranks.items()]
        changes = [change for change in found if change is not None]
        if not changes:
            return ()
        delta = _settings(handle, key, places, {c.place.path: c.row.after for c in changes})
        removal = Removal(handle, [c.place for c in changes if not c.row.after])
        exchanges = [exchange for change in changes for exchange in change.exchanges]
        follow = None if optimizer is None else Follow(optimizer, exchanges)
    # nothing below can fail for what was asked
    for change in changes:
        for slot, new in change.news:
            slot.put(new)
    removal.commit()
    put_settings(handle, key, delta, [c.place for c in changes if c.row.after])
    if follow is not None:
        follow.commit()
    return tuple(change.row for change in changes)


def rescale(handle: Handle, scales: Mapping[str, float], *, part: str | None = None) -> None:
    """Let LoRA's branches at places have other scales s, which ``alpha_pattern`` holds from now on.

    Args:
        handle: of a delta that is neither merged nor inside ``disabled()``.
        scales: path of a place → s.
        part: of a combination, whose places these are.
    Raises: as :func:`resize`, and ConfigError for DoRA, which does not just add.
    """
    check_handle(handle, "rescale")
    places = sized_places(handle, part, "rescale")
    _check_paths(places, scales, "rescale")
    key = part_of(handle, part, "rescale")
    delta = next(iter(places.values())).delta
    if not isinstance(delta, LoRA) or delta.use_dora:
        raise ConfigError(
            f"rescale: {delta!r} must be a LoRA without use_dora, whose branch just adds. Weigh "
            "nothing, or attach plain LoRA."
        )
    own = {
        path: Own(places[path].rank, alpha_for(scale, places[path].rank, delta.use_rslora))
        for path, scale in scales.items()
    }
    new = with_own(delta, (p for p in handle.places if p.part == key), own)
    put_settings(handle, key, new, [places[path] for path in scales])


def put_settings(handle: Handle, key: str, delta: Delta, places: Iterable[Sized]) -> None:
    """Let the part ``key`` have the settings ``delta`` from now on, and ``places`` go by them."""
    record = handle._record
    factor = record.weights.get(key, 1.0)
    live = delta if factor == 1.0 else delta.weighed(factor)
    for place in places:
        if isinstance(live, LoRA):
            live.reread(place.site, place.module, place.name)
    if isinstance(record.delta, Combined):
        parts = {name: delta if name == key else d for name, d in record.delta.by_name.items()}
        record.delta = replace(record.delta, parts=parts)
    else:
        record.delta = delta


# --------------------------------------------------------------------------------------- details


@contextmanager
def _drawing(generator: torch.Generator | None) -> Iterator[None]:
    """What was drawn inside is not where the rest raises."""
    random = torch.default_generator if generator is None else generator
    before = random.get_state()
    try:
        yield
    except Exception:
        random.set_state(before)
        raise


class _Change(NamedTuple):
    place: Sized
    row: Resized
    news: list[tuple[Any, nn.Parameter]]
    """Slot → what will lie there."""
    exchanges: list[Exchange]


def _change(
    place: Sized,
    rank: int,
    chosen: Sequence[int] | None,
    by: str,
    generator: torch.Generator | None,
) -> _Change | None:
    """What ``place`` becomes; None where it stays as it is."""
    before = place.rank
    if rank == before and (chosen is None or len(chosen) == before):
        return None
    if rank == 0:
        found = place.tensors.items()
        gone = [Exchange(place.site.key(suffix), p, None, None) for suffix, p in found]
        return _Change(place, Resized(place.path, before, 0, (), _error(place, ())), [], gone)
    if by == "svd" and chosen is None and rank < before:
        return _by_svd(place, rank)
    kept = _kept(place, rank, chosen)
    fresh = _fresh(place, rank, rank - len(kept), generator)
    news, exchanges = [], []
    for suffix, slot in place.slots.items():
        old = slot.parameter
        carry = _carrying(kept, rank, slot.axis)
        value = carry(old.detach())
        if suffix in fresh:
            value.narrow(slot.axis, len(kept), rank - len(kept)).copy_(fresh[suffix])
        new = nn.Parameter(value, old.requires_grad)
        news.append((slot, new))
        exchanges.append(Exchange(place.site.key(suffix), old, new, carry))
    row = Resized(place.path, before, rank, kept, _error(place, kept))
    return _Change(place, row, news, exchanges)


def _kept(place: Sized, rank: int, chosen: Sequence[int] | None) -> tuple[int, ...]:
    if chosen is not None:
        return tuple(sorted(chosen))
    if rank >= place.rank:
        return tuple(range(place.rank))
    norms = place.norms()
    _check_finite(place, norms)
    best = norms.sort(descending=True, stable=True).indices[:rank]
    return tuple(sorted(best.tolist()))


def _check_finite(place: Sized, norms: Tensor) -> None:
    if not bool(torch.isfinite(norms).all()):
        raise ConfigError(
            f"resize: the components at {place.path!r} must be finite to be compared, and hold NaN "
            "or infinity. Go back to parameters from before the training diverged."
        )


def _carrying(kept: tuple[int, ...], rank: int, axis: int) -> Callable[[Tensor], Tensor]:
    """Old shape → new shape: what is kept, then zeros."""

    def carry(old: Tensor) -> Tensor:
        shape = list(old.shape)
        shape[axis] = rank
        new = old.new_zeros(shape)
        index = torch.tensor(kept, dtype=torch.long, device=old.device)
        new.narrow(axis, 0, len(kept)).copy_(old.index_select(axis, index))
        return new

    return carry


def _fresh(
    place: Sized, rank: int, count: int, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """By suffix, the last ``count`` components of a start at ``rank``; zeros where not named."""
    if count == 0:
        return {}
    down, up = place.ends
    like: Any = {"device": down.device, "dtype": down.dtype, "generator": generator}
    if place.site.place == EMBEDDING:
        _, b = start_embedding(rank, down.shape[1], up.shape[0], **like)
        return {"lora_embedding_B": b[:, rank - count :]}
    if isinstance(place.delta, Adapter):
        a, _ = near_zero(rank, down.shape[1], **like)
        return {"adapter.down.weight": a[rank - count :]}
    gaussian = isinstance(place.delta, LoRA) and place.delta.init_lora_weights == "gaussian"
    a, _ = start_values(rank, down.shape[1], up.shape[0], gaussian=gaussian, **like)
    suffix = "lora_A.weight" if isinstance(place.delta, LoRA) else "adapter.down.weight"
    return {suffix: a[rank - count :]}


def _by_svd(place: Sized, rank: int) -> _Change:
    down, up = place.ends
    if not isinstance(place.delta, LoRA):
        raise ConfigError(
            "resize: by='svd' is for LoRA, whose components are a sum of products; those of an "
            "adapter have an activation between. Use by='norm' or keep=."
        )
    if rank > place.largest:
        raise ConfigError(
            f"resize: by='svd' the rank at {place.path!r} must be at most {place.largest}, the "
            f"smaller side of the layer, got {rank}. Use by='norm'."
        )
    _check_finite(place, place.norms())
    a, b, lost, whole = lowered(down.detach().double(), up.detach().double(), rank, False)
    news, exchanges = [], []
    for (suffix, slot), value in zip(place.slots.items(), (a, b), strict=True):
        old = slot.parameter
        new = nn.Parameter(value.to(old.dtype), old.requires_grad)
        news.append((slot, new))
        exchanges.append(Exchange(place.site.key(suffix), old, new, None))
    error = (lost / whole) ** 0.5 if lost else 0.0
    return _Change(place, Resized(place.path, place.rank, rank, (), error), news, exchanges)


def _error(place: Sized, kept: tuple[int, ...]) -> float:
    """‖Σ of those that go‖ / ‖Δ‖ by the Gram matrices, without Δ."""
    if len(kept) == place.rank:
        return 0.0
    down, up = (t.detach().double() for t in place.ends)
    gram = (up.T @ up) * (down @ down.T)
    gone = [i for i in range(place.rank) if i not in kept]
    whole = float(gram.sum())
    lost = max(float(gram[gone][:, gone].sum()), 0.0)
    if whole <= 0:  # they cancel, or are nothing
        return math.inf if lost else 0.0
    return math.sqrt(lost / whole)


def _settings(handle: Handle, key: str, places: dict[str, Sized], ranks: dict[str, int]) -> Delta:
    """Those of the part with ``ranks`` at the places that change."""
    delta = next(iter(places.values())).delta
    if not isinstance(delta, LoRA):
        (size,) = set(ranks.values())
        return replace(delta, size=size)  # type: ignore[type-var]  # every method is a dataclass
    own = {
        path: Own(rank, alpha_for(delta.scaling_at(path), rank, delta.use_rslora))
        for path, rank in ranks.items()
        if rank
    }
    gone = [path for path, rank in ranks.items() if not rank]
    sites = [s for s in handle.places if s.part == key and s.path not in gone]
    if not sites:
        raise ConfigError(
            "resize: one place at least must keep the delta, and ranks takes it off all "
            f"{len(gone)}. Call handle.revert() to take it off the model."
        )
    settled = with_own(delta, sites, own)
    return without(settled, gone) if gone else settled


def check_handle(handle: Handle, action: str) -> None:
    """Raises: ConfigError for what is no handle; AttachError for one that is spent, or whose delta
    is merged or disabled.
    """
    if not isinstance(handle, Handle):
        raise ConfigError(
            f"{action}: expected the handle of deltaops.attach, got {type(handle).__name__}. The "
            "ranks of a model that PEFT built are PEFT's: save it with save_pretrained and "
            "deltaops.load it on the base model."
        )
    handle._check_enabled(action)
    handle._check_unmerged(action)


def _check_paths(places: Mapping[str, Sized], wanted: Mapping[str, Any], action: str) -> None:
    if not isinstance(wanted, Mapping):
        raise ConfigError(
            f"{action}: expected a number for each path, got {wanted!r}. Pass {{PATH: NUMBER}}, or "
            "dict.fromkeys(handle.sites, NUMBER) for all."
        )
    for path in wanted:
        if path not in places:
            close = ", ".join(nearest(str(path), places)) or ", ".join(list(places)[:5])
            raise TargetError(
                f"{action}: {path!r} must be a place of the delta, and is none. Nearest: {close}."
            )


def _check_replaceable(place: Sized) -> None:
    for slot in place.slots.values():
        parameter = slot.parameter
        if not plain(parameter):
            raise AttachError(
                f"resize: the parameters at {place.path!r} must be whole, and one is a "
                f"{type(parameter.data).__name__}. Resize before the model is sharded."
            )
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise AttachError(
                f"resize: the parameters at {place.path!r} have hooks, which a new parameter would "
                "not have. Remove them first, and register them again."
            )


def _check_ranks(
    places: Mapping[str, Sized], ranks: Mapping[str, int], keep: Mapping[str, Sequence[int]]
) -> None:
    """Raises: ConfigError, TargetError or AttachError, before anything is made."""
    _check_paths(places, ranks, "resize")
    for path in keep:
        if path not in ranks:
            raise ConfigError(f"resize: keep names {path!r}, and ranks does not. Give its rank.")
    for path, rank in ranks.items():
        place = places[path]
        _check_replaceable(place)
        adapter = not isinstance(place.delta, LoRA)
        if not is_count(rank) and not (rank == 0 and rank is not False and not adapter):
            least = 1 if adapter else 0
            raise ConfigError(
                f"resize: the rank at {path!r} must be an integer ≥ {least}, got {rank!r}."
            )
        if rank > max(place.largest, place.rank):
            raise ConfigError(
                f"resize: the rank at {path!r} must be at most {place.largest}, the smaller side "
                f"of the layer, got {rank}."
            )
        chosen = keep.get(path)
        if chosen is None:
            continue
        fits = len(set(chosen)) == len(chosen) <= rank
        if not fits or not all(type(i) is int and 0 <= i < place.rank for i in chosen):
            raise ConfigError(
                f"resize: keep at {path!r} must be at most {rank} distinct components of the "
                f"{place.rank} there, counted from 0, got {list(chosen)!r}."
            )
    first = next(iter(places.values()))
    moved = any(rank != places[path].rank or path in keep for path, rank in ranks.items())
    if moved and not isinstance(first.delta, LoRA):
        if set(ranks) != set(places) or len(set(ranks.values())) > 1:
            raise ConfigError(
                f"resize: {first.delta!r} has one size for all of its {len(places)} places, which "
                f"is what its file holds, and ranks names {len(ranks)} of them with sizes "
                f"{sorted(set(ranks.values()))}. Name all of them with one size."
            )
