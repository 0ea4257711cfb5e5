"""What the Triton kernels of a call move and compute, beside the least that it takes.

Counted, not measured: the backend's own launchers run on tensors without memory, and what they
would launch on a GPU is written down (:mod:`deltaops.backends.triton.traffic`). The calls and their
floors are in :mod:`.traffic_linears` and :mod:`.traffic_rows`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from deltaops.backends.triton import core, planner, record, targets
from deltaops.backends.triton.traffic import Traffic, traffic
from deltaops.errors import ConfigError

from .traffic_floor import BACKWARD, FORWARD, Counted, Floor
from .traffic_linears import Group, Linear

COMMITTED = ("sm_90", "gfx942")
"""GPUs for which they are: the largest tiles that there are, and the smallest shared memory."""


@dataclass(frozen=True)
class Count:
    """One direction of a call."""

    call: str
    direction: str
    kernels: tuple[tuple[str, Traffic], ...]
    """Kernels of one name are added up."""
    floor: Floor

    @property
    def total(self) -> Traffic:
        """Of all launches."""
        return sum((found for _, found in self.kernels), Traffic())


def count(call: Counted, gpu: str, plan: str | None = None) -> list[Count]:
    """Forward and backward of ``call`` on a kind of GPU, none of which is needed.

    Args:
        gpu: a name of ``deltaops.backends.triton.targets.TARGETS``.
        plan: of the GEMMs, one of :data:`COUNTED`; a direction that it cannot run is left out, see
            :func:`impossible`. None for the one that would be chosen.
    Raises: ConfigError for another name, or where Triton's interpreter is on.
    """
    if gpu not in targets.TARGETS:
        known = ", ".join(targets.TARGETS)
        raise ConfigError(f"the GPU must be one of {known}, got {gpu!r}.")
    if not core.installed():
        raise ConfigError("traffic is counted from Triton's launches; pip install triton.")
    if core.interpreting():
        raise ConfigError("traffic is counted from compiled kernels: unset TRITON_INTERPRET.")
    counts = []
    left_out = impossible(call, gpu, plan)
    for direction in getattr(call, "directions", (FORWARD, BACKWARD)):
        if direction in left_out:
            continue
        forced = nullcontext() if plan is None else planner.forced(plan, plan)
        with core.standing_in(targets.TARGETS[gpu]), forced, record.recording() as launches:
            call.run(direction)
        kernels: dict[str, Traffic] = {}
        for launch in launches:
            name = launch.kernel.removeprefix("_").removesuffix("_kernel")
            kernels[name] = kernels.get(name, Traffic()) + traffic(launch)
        counts.append(Count(str(call), direction, tuple(kernels.items()), call.floor(direction)))
    return counts


def impossible(call: Counted, gpu: str, plan: str | None) -> list[str]:
    """The directions of ``call`` that ``plan`` cannot run there; see :func:`planner.possible`."""
    if plan is None or not isinstance(call, Linear):
        return []
    with core.standing_in(targets.TARGETS[gpu]):
        return [d for d in (FORWARD, BACKWARD) if plan not in call.plans(d)]


PLANS = ("fused", "split", "persistent", "decode", "beside")
"""Those of ``tables.PLANS`` in which a kernel of Triton has a product."""
COUNTED = (*PLANS, "torch")
"""Those whose launches are counted: of "cuda" none is Triton's."""


def totals(calls: Iterable[Counted], gpus: Sequence[str]) -> dict[str, dict[str, int]]:
    """What is committed: "gpu | call | plan | direction" → launches, bytes and operations."""
    found = {}
    for gpu in gpus:
        for call in calls:
            for plan in plans_of(call):
                for one in count(call, gpu, plan):
                    total = one.total
                    name = [gpu, one.call, *([plan] if plan else []), one.direction]
                    found[" | ".join(name)] = {
                        "launches": total.launches,
                        "bytes_once": total.once,
                        "bytes_asked": total.asked,
                        "operations": total.operations,
                        "floor_bytes": one.floor.bytes,
                        "floor_operations": one.floor.operations,
                    }
    return found


def plans_of(call: Counted) -> Sequence[str | None]:
    """Those of :data:`PLANS` that are counted of ``call``; None where it has one way."""
    if isinstance(call, Linear):
        return PLANS
    return PLANS[:2] if isinstance(call, Group) else [None]


def regressions(
    now: Mapping[str, Mapping[str, int]], before: Mapping[str, Mapping[str, int]]
) -> list[str]:
    """Where a call moves or computes more than before, or is new or gone; a line each."""
    lines = [f"{name}: not committed" for name in now if name not in before]
    lines += [f"{name}: gone" for name in before if name not in now]
    for name in now.keys() & before.keys():
        for what, value in now[name].items():
            committed = before[name].get(what, -math.inf)
            if value > committed:
                lines.append(f"{name}: {what} {value}, was {committed}")
    return sorted(lines)
