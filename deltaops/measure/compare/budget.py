"""A method sized to train about so many parameters: the nearest number that its sizes allow.

What has a size is made as large as fits into the budget, or one larger where that is nearer; in a
combination, what has none comes first, and the others share what is left. What has no size, such
as BitFit, stays as it is: the table states the true count of each line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from deltaops.errors import ConfigError, DeltaopsError
from deltaops.methods import Combined, Delta, parts_of
from deltaops.surgery import plan

from .contenders import Contender

LARGEST = 1 << 16
"""Of any size."""


def sized(contender: Contender, encoder: nn.Module, parameters: int) -> Contender:
    """The contender with about so many trained parameters; as it is without a delta, or steered.

    Raises: ConfigError where the encoder cannot have its delta at all.
    """
    delta = contender.delta()
    if delta is None or contender.steer is not None:
        return contender
    if isinstance(delta, Combined):
        found: Delta | Combined = _shared_out(delta, encoder, parameters)
        if delta.gated:  # gates are of no part's own, and of the same number whatever the sizes
            bare = sum(count(part, encoder) for part in parts_of(found).values())
            gates = count(found, encoder) - bare
            found = _shared_out(delta, encoder, parameters - gates)
    else:
        found = _nearest(delta, encoder, parameters)
    title = contender.title
    if not isinstance(found, Combined) and found.kind in _SIZES:
        told = _SIZES[found.kind](found)[0]
        # of the table's own lines the size stands behind a comma; a delta as it was written stays
        own = title != contender.spec or title == found.kind
        title = f"{title.partition(',')[0]}, {told}" if own else f"{title} → {told}"
    return replace(contender, title=title, sized=found)


def count(delta: Delta | Combined, encoder: nn.Module) -> int:
    """Parameters that ``delta`` would train on ``encoder``."""
    return sum(torch.Size(shape).numel() for _, _, shape in plan(encoder, delta).tensors())


# --------------------------------------------------------------------------------------- details


def _lora(delta: Any) -> tuple[str, int, Callable[[int], dict[str, Any]]]:
    scale = delta.alpha / delta.r
    return f"r = {delta.r}", 1, lambda size: {"r": size, "alpha": scale * size}


def _bottleneck(delta: Any) -> tuple[str, int, Callable[[int], dict[str, Any]]]:
    return f"R = {delta.size}", 1, lambda size: {"size": size}


def _compacter(delta: Any) -> tuple[str, int, Callable[[int], dict[str, Any]]]:
    return f"R = {delta.size}", delta.phm_dim, lambda size: {"size": size}


def _prefix(delta: Any) -> tuple[str, int, Callable[[int], dict[str, Any]]]:
    if delta.reparameterised:
        told = f"P = {delta.num_virtual_tokens} by an MLP of {delta.encoder_hidden_size}"
        return told, 1, lambda size: {"encoder_hidden_size": size}
    return _prompt(delta)


def _prompt(delta: Any) -> tuple[str, int, Callable[[int], dict[str, Any]]]:
    return f"P = {delta.num_virtual_tokens}", 1, lambda size: {"num_virtual_tokens": size}


def _pool(delta: Any) -> tuple[str, int, Callable[[int], dict[str, Any]]]:
    chosen = delta.top_k  # of fewer than that, all
    told = f"{delta.top_k} of N = {delta.size}"
    return told, 1, lambda size: {"size": size, "top_k": min(chosen, size)}


def _intrinsic(delta: Any) -> tuple[str, int, Callable[[int], dict[str, Any]]]:
    return f"q = {delta.intrinsic_dim}", 1, lambda size: {"intrinsic_dim": size}


_SIZES: Mapping[str, Callable[[Any], tuple[str, int, Callable[[int], dict[str, Any]]]]] = {
    "lora": _lora,
    "adapter": _bottleneck,
    "parallel": _bottleneck,
    "compacter": _compacter,
    "prefix": _prefix,
    "prompt": _prompt,
    "prompt-pool": _pool,
    "prefix-pool": _pool,
    "intrinsic-prompt": _intrinsic,
    "intrinsic-adapter": _intrinsic,
}
"""Method → what a title says of its size, the step between sizes, and the fields of one."""


def _nearest(delta: Delta, encoder: nn.Module, parameters: int) -> Delta:
    """The size whose count is nearest; the larger of two that fit alike."""
    if delta.kind not in _SIZES:
        return delta
    _, step, fields = _SIZES[delta.kind](delta)

    def of(number: int) -> Delta:
        found: Delta = replace(delta, **fields(number * step))  # type: ignore[type-var]  # a dataclass
        return found

    def cost(number: int) -> int | None:
        try:
            return count(of(number), encoder)
        except DeltaopsError:  # a rank above a layer's, or more vectors than positions
            return None

    first = cost(1)
    if first is None:
        raise ConfigError(
            f"--parameters: {delta!r} does not fit the encoder in its least size. Leave it out."
        )
    low, high = 1, 2
    while high * step <= LARGEST and (found := cost(high)) is not None and found <= parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        found = cost(middle)
        low, high = (middle, high) if found is not None and found <= parameters else (low, middle)
    below, above = cost(low), cost(high)
    assert below is not None  # low fits
    nearer = above is not None and above - parameters < parameters - below
    return of(high if nearer else low)


def _shared_out(delta: Combined, encoder: nn.Module, parameters: int) -> Combined:
    """Parts with a size get equal shares of what those without leave."""
    parts = delta.by_name
    sizes = [name for name, part in parts.items() if part.kind in _SIZES]
    fixed = {name: part for name, part in parts.items() if name not in sizes}
    left = parameters - sum(count(part, encoder) for part in fixed.values())
    for done, name in enumerate(sizes):
        part = _nearest(parts[name], encoder, max(1, left // (len(sizes) - done)))
        left -= count(part, encoder)
        parts[name] = part
    return Combined(parts, delta.gated)
