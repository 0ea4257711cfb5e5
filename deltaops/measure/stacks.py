"""A training step of two methods at once, beside each of them alone: what stacking adds.

Two methods that cost a tenth each cost a fifth together, and a prompt's tokens are the other one's
work too. So the flops of all products are counted beside the time: what a stack adds to them, no
kernel takes away. (Two that train different depths add the backward pass of the deeper one.)
"""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import combinations

import torch

from deltaops.errors import AttachError, ConfigError, TargetError
from deltaops.surgery import attach
from deltaops.tuning.spec import parse_delta

from .cases import DTYPES
from .cell import FIRST, SECOND, STACK, Cell
from .compare.contenders import Contender, contenders
from .compare.reader import HEAD
from .difference import difference
from .pair import Peer, held_pair, stepper, time_steps, timed_optimizer
from .products import step_flops
from .workloads import Workload

LIMIT = 1.10
"""Of a stack's time over that of its dearest part: the goal, and what asks for a reason."""


def pairs() -> list[tuple[Contender, Contender]]:
    """Every two of the methods, each by the first line that ``deltaops compare`` has of it."""
    found: dict[str, Contender] = {}
    for line in contenders().values():
        if line.spec:
            found.setdefault(line.spec.partition(":")[0], line)
    return list(combinations(found.values(), 2))


def titled(first: Contender, second: Contender) -> str:
    """What a pair is called."""
    return f"{first.title} + {second.title}"


def measure_stack(
    first: Contender,
    second: Contender,
    workload: Workload,
    dtype: str,
    *,
    rounds: int = 15,
    seconds: float = float("inf"),
) -> Cell:
    """Gate the stack by float64, then time it and its parts in turns.

    Args:
        first: a method with its settings.
        second: another.
        workload: of :data:`deltaops.measure.workloads.READERS`.
        dtype: of the model, "f32" or "bf16".
        rounds: at most.
        seconds: for the timing, all three together.
    Returns: a cell with the profiled difference to the dearest part, where that is above the limit.
    Raises: AssertionError where a loss or gradient is off; nothing was timed then.
    """
    kind = DTYPES[dtype]
    torch.manual_seed(0)
    base = workload.build().to(kind)
    base.train()
    cell = Cell(
        "stack", titled(first, second), dtype, 0.0, {},
        tokens=workload.tokens, model=workload.title,
    )  # fmt: skip
    batch = workload.inputs(kind)
    specs = {STACK: f"{first.spec}+{second.spec}", FIRST: first.spec, SECOND: second.spec}
    peers: dict[str, Peer] = {}
    for name, spec in specs.items():
        model = copy.deepcopy(base)
        try:
            handle = attach(model, parse_delta(spec, modules_to_save=(HEAD,)))
        except (AttachError, ConfigError, TargetError) as error:  # two that share no model
            return replace(cell, absent={name: str(error)})
        if name == STACK:
            held_pair(base, handle, batch, kind)
        peers[name] = model, list(handle.parameters())
    products = {
        name: step_flops(lambda m=model: m(**batch).loss)  # type: ignore[misc]  # a default in a lambda
        for name, (model, _) in peers.items()
    }
    taken = time_steps(peers, batch, rounds=rounds, seconds=seconds)
    cell = replace(cell, timings=taken.timings, saved=taken.saved, products=products)
    ratio = over_dearest(cell)
    if ratio is None or ratio <= LIMIT:
        return cell
    slow, fast = (
        stepper(peers[name][0], timed_optimizer(peers[name][1]), batch)
        for name in (STACK, dearest(cell))
    )
    return replace(cell, note=difference(slow, fast, against=f"the {dearest(cell)}'s"))


def dearest(cell: Cell) -> str:
    """The part that takes longer alone."""
    return max((FIRST, SECOND), key=lambda part: cell.timings[part].median)


def products_over_dearest(cell: Cell) -> float | None:
    """The flops of the stack's products over those of its dearest part: what the ratio of the times
    would be if every product ran at one rate, and nothing else took time."""
    if not cell.products or STACK not in cell.timings:
        return None
    return cell.products[STACK] / cell.products[dearest(cell)]


def over_dearest(cell: Cell) -> float | None:
    """The stack's time over its dearest part's; None where it was not timed."""
    return cell.ratio(STACK, dearest(cell)) if STACK in cell.timings else None
