"""Who computes the two GEMMs of a ``delta_linear``, y and dx: a fused kernel, or torch's library.

    fused   one Triton kernel: x Wᵀ and S Bᵀ in one accumulator
    split   a Triton kernel writes the rank part, and the library adds x Wᵀ onto it (beta = 1)
    torch   the library computes both

Fused saves a pass over the output and a launch; the library's GEMM is the faster one (cuBLAS;
rocBLAS on AMD). Which outweighs the other is a matter of measurement (:mod:`tables`). Where nothing
was measured, :func:`start` decides by the break-even rule. Either way a choice follows from the
call and the table alone, which is read once: nothing is timed in a call, nor under graph capture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch

from . import core, tables
from .tables import DIRECTIONS, PLANS, Setting


class Plan(NamedTuple):
    """Plans of both directions, of :data:`tables.PLANS`, and why."""

    forward: str
    backward: str
    why: str

    def __str__(self) -> str:
        return f"y {self.forward}, dx {self.backward}: {self.why}"


class Ceilings(NamedTuple):
    """What a GPU does at best."""

    flops: float
    """Of the library's GEMM, a second."""
    bytes: float
    """Read or written in a copy, a second."""
    launch: float
    """Seconds that one more kernel costs in a graph."""


# The design page's figures for an H200. The rule needs their ratios only, and those of other
# data-centre GPUs are alike: 120–180 operations a byte.
HALF = Ceilings(790e12, 4.3e12, 1.5e-6)
FLOAT = Ceilings(60e12, 4.3e12, 1.5e-6)
"""float32 products of a float32 model use no tensor cores."""

_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in core.DTYPES}

EXPECTED = 0.85
"""The share of the library's speed that is assumed of the fused kernels where nothing was measured:
the least that is reported of pipelined Triton GEMMs on Hopper (0.86–1.0). Not a measurement."""
EXPECTED_SMALL = 0.5
"""The same for their small tiles: float32, float32 adapters on a half model, unaligned rows,
several branches. They read each operand two to four times as often as the large ones."""


def setting_of(
    dtype: torch.dtype,
    adapters: tuple[torch.dtype, ...],
    m: int,
    n: int,
    k: int,
    ranks: tuple[int, ...],
    dropout: bool,
) -> Setting:
    """What of a call a choice depends on."""
    wide = dtype
    for adapter in adapters:
        wide = torch.promote_types(wide, adapter)
    return Setting(m, n, k, sum(ranks), _NAMES[dtype], _NAMES[wide], dropout)


def possible(setting: Setting, direction: str) -> tuple[str, ...]:
    """The plans that can run a call."""
    mixed = setting.rank > 0 and setting.adapter != setting.dtype
    masked = setting.dropout and direction == "backward"
    # the library rounds S to the model's dtype, and knows no mask
    return PLANS[:2] if mixed or masked else PLANS


def break_even(setting: Setting, direction: str) -> float:
    """The share of the library's speed from which on a fused GEMM is the faster way.

    Split writes and reads the output once more and is one launch more; fused does the rank part's
    operations at its own speed. Above 1: never.
    """
    m, n, k, rank = setting[:4]
    if direction == "backward":
        n, k = k, n
    size = 4 if setting.dtype == "float32" else 2
    best = FLOAT if size == 4 else HALF
    base = max(2.0 * m * n * k / best.flops, size * (m * k + n * k + m * n) / best.bytes)
    more = 2.0 * size * m * n / best.bytes + best.launch if rank else 0.0
    inside = 2.0 * m * n * rank / best.flops
    return (base + inside) / (base + more)


def expected(setting: Setting, plain: bool) -> float:
    """The assumed speed of the fused GEMM beside the library's: see :data:`EXPECTED`. Where bytes
    and not operations are the limit, as for few tokens, both are as fast."""
    m, n, k = setting[:3]
    size = 4 if setting.dtype == "float32" else 2
    best = FLOAT if size == 4 else HALF
    computing = 2.0 * m * n * k / best.flops
    moving = size * (m * k + n * k + m * n) / best.bytes
    if computing <= moving:
        return 1.0
    small = size == 4 or setting.adapter != setting.dtype or not plain
    return EXPECTED_SMALL if small else EXPECTED


def start(setting: Setting, plain: bool) -> Plan:
    """The plan where nothing was measured.

    Args:
        plain: one branch at most and aligned operands, for which the large tiles are.
    """
    if setting.rank == 0:  # no rank part: nothing is saved by fusing
        return Plan("torch", "torch", "no branch, so the library's GEMM is all there is to do")
    speed = expected(setting, plain)
    y, dx = (break_even(setting, direction) for direction in DIRECTIONS)
    return Plan(
        "fused" if speed >= y else "split",
        "fused" if speed >= dx else "split",
        f"not measured on this GPU; fused breaks even at {y:.0%} and {dx:.0%} of the library's "
        f"speed, {speed:.0%} are assumed (deltaops tune-kernels measures)",
    )


_forced: Plan | None = None


@contextmanager
def forced(forward: str, backward: str) -> Iterator[None]:
    """These plans for every call, for tests and measurements. A call that one of them cannot run
    raises ValueError."""
    global _forced
    before, _forced = _forced, Plan(forward, backward, "as forced")
    try:
        yield
    finally:
        _forced = before


def choose(setting: Setting, device: torch.device | str, plain: bool = True) -> Plan:
    """The plan of a call on ``device``. Raises: DataError for a table that cannot be used."""
    if _forced is not None:
        for direction in DIRECTIONS:
            if getattr(_forced, direction) not in possible(setting, direction):
                raise ValueError(
                    f"{setting}: {direction} must be one of {possible(setting, direction)}, "
                    f"{getattr(_forced, direction)!r} is forced"
                )
        return _forced
    return _chosen(setting, core.gpu(device), plain)


@lru_cache(maxsize=4096)
def _chosen(setting: Setting, gpu: str | None, plain: bool) -> Plan:
    if gpu is None:
        return Plan("fused", "fused", "Triton's interpreter shows the kernels")
    otherwise = start(setting, plain)
    found = tables.find(gpu)
    if found is None:
        return otherwise
    table, path = found
    # tables are of aligned operands and one branch: others have other tiles
    entry = table.nearest(setting) if plain else None
    if entry is None:
        return otherwise._replace(why=f"{otherwise.why}; {path} has no call like it")
    y, dx = (
        entry.best(direction, possible(setting, direction)) or getattr(otherwise, direction)
        for direction in DIRECTIONS
    )
    return Plan(y, dx, f"fastest for {entry.setting} on {gpu}, {path}")


def forget() -> None:
    """Plans are made again, and the table is read again: after a new one was measured."""
    _chosen.cache_clear()
