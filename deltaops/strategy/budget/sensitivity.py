"""Ranks by gradient sensitivity, before training.

    G = ∂L/∂W,  δL ≈ −η · Σ_{i ≤ r} σᵢ(G)²   for the best change of W of rank r and a small step η

So a component at a place is worth σᵢ² and costs K + N parameters, and the budget goes to the
largest worth per parameter, one component after the other. G itself [N, K] is never made: q more
rows Ω, orthonormal and random, join A, and as many zero columns join B, which changes no output;
their gradient is s · G Ωᵀ [N, q], what LoRA's B would learn from. √(K / q) · σ(G Ωᵀ) stands for
σ(G): exact where q = K; below, a sketch whose sum of squares has the right expectation.
Source: the sketch is Halko et al.'s (2011, arXiv 0909.4061, §4.1), the best change of rank r Eckart
and Young's (1936).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltaops.errors import ConfigError
from deltaops.methods import LoRA
from deltaops.methods.base import EMBEDDING
from deltaops.surgery import Handle, Resized, resize
from deltaops.surgery.components import Sized, sized_places
from deltaops.surgery.resize import check_handle

from .limits import check_budget, check_count
from .looking import Loss, gradients, looking

_ACTION = "allocate"


@dataclass(frozen=True)
class Allocation:
    """Who gets what. Print it, read ``ranks``, or :meth:`apply` it."""

    ranks: dict[str, int]
    """Path of a place → its rank; 0 where the place is not worth one component."""
    worth: dict[str, float]
    """Path of a place → ‖G‖² by the sketch: how fast the loss falls there."""
    parameters: int
    """Trained by the part at these ranks."""
    budget: int
    part: str | None = field(repr=False, default=None)

    def apply(
        self,
        handle: Handle,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Resized, ...]:
        """Give the places of ``handle`` these ranks; see :func:`deltaops.surgery.resize`."""
        return resize(handle, self.ranks, part=self.part, optimizer=optimizer, generator=generator)

    def __str__(self) -> str:
        wide = max(map(len, self.ranks))
        rows = sorted(self.ranks, key=lambda path: -self.worth[path])
        lines = [f"{'place':<{wide}}  rank  worth"]
        lines += [f"{path:<{wide}}  {self.ranks[path]:>4}  {self.worth[path]:.3g}" for path in rows]
        return "\n".join([*lines, f"{self.parameters:,} of {self.budget:,} parameters"])


def allocate(
    handle: Handle,
    batches: Iterable[Any],
    loss: Loss,
    *,
    parameters: int,
    part: str | None = None,
    largest: int | None = None,
    smallest: int = 0,
    seed: int = 0,
) -> Allocation:
    """Divide ``parameters`` among the places of a LoRA by the gradient of a few batches.

    The model, its gradients and every random state are left as they were; the same arguments give
    the same ranks. A backward pass a batch, with ``largest`` more components at each place.

    Args:
        handle: of a LoRA on linear layers, or a combination with one.
        batches: of the task; one or a few, each seen once.
        loss: ``loss(model, batch)`` → one number, as training has it. The model evaluates: dropout
            is off.
        parameters: what the part may train at most, over all places; what other parts and
            ``modules_to_save`` train is not counted.
        part: of a combination.
        largest: no rank above it; by default twice the largest there is.
        smallest: no rank below it; 0 takes places out that are worth nothing.
        seed: of Ω.
    Raises: ConfigError for a budget that cannot be met, a part without ranks, or a loss that does
        not depend on it; AttachError for a handle that is spent, merged or disabled.
    """
    check_count(_ACTION, "parameters", parameters)
    check_count(_ACTION, "smallest", smallest, least=0)
    check_handle(handle, _ACTION)
    places = _linear(handle, part)
    top = 2 * max(p.rank for p in places.values()) if largest is None else largest
    check_count(_ACTION, "largest", top, least=max(smallest, 1))
    check_budget(_ACTION, places, parameters, smallest)
    squares = _squares(handle, places, batches, loss, top, seed)
    worth = {path: float(found.sum()) for path, found in squares.items()}
    if not any(worth.values()):
        raise ConfigError(
            f"{_ACTION}: the gradient is zero at all {len(places)} places. Is the loss that of the "
            "model that has the delta, on batches with something to learn?"
        )
    ranks = _greedy(places, squares, parameters, smallest, top)
    if not any(ranks.values()):
        raise ConfigError(
            f"{_ACTION}: no place with a gradient has a component that {parameters:,} "
            "parameters hold. Raise parameters."
        )
    return Allocation(ranks, worth, _taken(places, ranks), parameters, part)


def _linear(handle: Handle, part: str | None) -> dict[str, Sized]:
    """The places of a LoRA on linear layers that is on."""
    places = sized_places(handle, part, _ACTION)
    first = next(iter(places.values()))
    tables = any(place.site.place == EMBEDDING for place in places.values())
    if not isinstance(first.delta, LoRA) or tables:
        raise ConfigError(
            f"{_ACTION}: {first.delta!r} must be a LoRA on linear layers alone. Name those in "
            "target_modules; adapters have one size, and an embedding is read where its ids point."
        )
    if first.name not in handle.enabled:
        raise ConfigError(
            f"{_ACTION}: the part {first.name!r} is switched off, and has no gradient. Call "
            f"handle.enable({first.name!r}) first."
        )
    if not all(first.delta.scaling_at(path) * handle.weights[first.name] for path in places):
        raise ConfigError(
            f"{_ACTION}: every scale of {first.delta!r} must differ from 0, where nothing passes."
        )
    return places


def _squares(
    handle: Handle,
    places: Mapping[str, Sized],
    batches: Iterable[Any],
    loss: Loss,
    columns: int,
    seed: int,
) -> dict[str, Tensor]:
    """By path, estimates of σᵢ(G)² in float64, the largest first."""
    total: list[Tensor] | None = None
    count = 0
    with looking(handle.model), probed(places, columns, seed) as probes:
        ups = list(probes.values())
        for batch in batches:
            found = [g.double() for g in gradients(_ACTION, handle.model, loss, batch, ups)]
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
            count += 1
        scales = {path: place.module.lora[place.name].scaling for path, place in places.items()}  # type: ignore[union-attr, index]  # of a place with LoRA
    if total is None:
        raise ConfigError(f"{_ACTION}: batches must hold at least one batch, and holds none.")
    squares = {}
    for (path, place), gradient in zip(places.items(), total, strict=True):
        sketch = gradient[:, place.rank :] / (scales[path] * count)  # G Ωᵀ [N, q]
        wide = place.ends[0].shape[1] / sketch.shape[1]
        squares[path] = torch.linalg.svdvals(sketch).square().cpu() * wide
    for path, found in squares.items():
        if not bool(torch.isfinite(found).all()):
            raise ConfigError(
                f"{_ACTION}: the gradient at {path!r} holds NaN or infinity. Compute the loss in "
                "float32 or bfloat16."
            )
    return squares


@contextmanager
def probed(places: Mapping[str, Sized], columns: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Inside, every place has up to ``columns`` components more, orthonormal in A and zero in B.

    Yields: path → B ``[N, r + q]``, of which the last q columns are the new ones.
    """
    random = torch.Generator().manual_seed(seed)
    before = [(slot, slot.parameter) for place in places.values() for slot in place.slots.values()]
    probes: dict[str, Tensor] = {}
    try:
        for path, place in places.items():
            down, up = place.slots.values()
            a, b = down.parameter.detach(), up.parameter.detach()
            more = min(columns, a.shape[1])
            # in float64 on the CPU: the same on every device
            q, _ = torch.linalg.qr(torch.randn(a.shape[1], more, generator=random).double())
            wide = nn.Parameter(torch.cat([b, b.new_zeros(len(b), more)], dim=1))
            down.put(nn.Parameter(torch.cat([a, q.T.to(a)]), requires_grad=False))
            up.put(wide)
            probes[path] = wide
        yield probes
    finally:
        for slot, parameter in before:
            slot.put(parameter)


def _greedy(
    places: Mapping[str, Sized],
    squares: Mapping[str, Tensor],
    budget: int,
    smallest: int,
    largest: int,
) -> dict[str, int]:
    """Component by component to the largest worth per parameter that still fits."""
    ranks = {path: min(smallest, place.largest) for path, place in places.items()}
    left = budget - _taken(places, ranks)
    queue: list[tuple[float, int, str]] = []

    def offer(at: int, path: str) -> None:
        place, rank = places[path], ranks[path]
        if rank < min(largest, place.largest, len(squares[path])):
            worth = float(squares[path][rank]) / place.unit
            if worth > 0:
                heapq.heappush(queue, (-worth, at, path))

    for at, path in enumerate(places):
        offer(at, path)
    while queue:
        _, at, path = heapq.heappop(queue)
        place, rank = places[path], ranks[path]
        cost = place.parameters(rank + 1) - place.parameters(rank)
        if cost <= left:  # one that does not fit will not later, either
            ranks[path], left = rank + 1, left - cost
            offer(at, path)
    return ranks


def _taken(places: Mapping[str, Sized], ranks: Mapping[str, int]) -> int:
    """Parameters of ``places`` at ``ranks``."""
    return sum(place.parameters(ranks[path]) for path, place in places.items())
