"""Who computes the two GEMMs of a ``delta_linear``, y and dx: a fused kernel, or torch's library.

    fused   one Triton kernel: x Wᵀ and S Bᵀ in one accumulator
    split   a Triton kernel writes the rank part, and the library adds x Wᵀ onto it (beta = 1)
    torch   the library computes both
    persistent   the fused kernel whose programs stay, with tensor descriptors: Hopper and
            data-centre Blackwell
    cuda    the same, hand-written in CUDA C++ (:mod:`cuda`): Hopper
    ampere  another of CUDA C++, of any shape, few rows among them: sm_80 and later
    decode  y of at most 16 rows, and S with it, which all but this and ``beside`` are handed
    beside  of dx: cuda, or else persistent, on the multiprocessors that its rounds need, with dA,
            and dB of wide layers, on the others meanwhile; of y: cuda, with S likewise, in one
            launch (:mod:`beside`)
    produced   of y: another of these, with S that was made in the pass before, where x is
            (:mod:`produce`); its seconds are those that it adds to that pass

Fused saves a pass over the output and a launch; the library's GEMM (cuBLAS; rocBLAS on AMD) is the
faster one. Which outweighs the other is a matter of measurement (:mod:`tables`). Where nothing was
measured, :func:`start` takes ``decode`` where it can and else decides by the break-even rule, never
for "cuda", "ampere", "beside" and "produced". Either way a choice follows from the call, how its
matrices lie and the tables alone, which are read once a GPU and process: nothing is timed in a
call, nor under graph capture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from . import core, tables
from .tables import PLANS, Setting


class Choice(NamedTuple):
    """The plan of one direction, of :data:`tables.PLANS`, and why."""

    plan: str
    why: str


def text(y: Choice, dx: Choice) -> str:
    """Both directions in a line."""
    if y.why == dx.why:
        return f"y {y.plan}, dx {dx.plan}: {y.why}"
    return f"y {y.plan}: {y.why}; dx {dx.plan}: {dx.why}"


class Ceilings(NamedTuple):
    """What a GPU does at best."""

    flops: float
    """Of the library's GEMM, a second."""
    bytes: float
    """Read or written in a copy, a second."""
    launch: float
    """Seconds that one more kernel costs in a graph."""


# An H200's: 767e12 to 805e12 and 4.1e12 to 4.2e12 were measured, a launch in a graph 1.5 to 2.5 µs.
# The rule takes them for every GPU, which no measurement supports: a start for those that have no
# table.
HALF = Ceilings(790e12, 4.3e12, 1.5e-6)
FLOAT = Ceilings(60e12, 4.3e12, 1.5e-6)
"""Of float32 products without TF32, as torch has them by default. The 60e12 is a guess, without a
source."""

_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in core.DTYPES}

EXPECTED = 0.67
"""The share of the library's speed that is assumed of the fused kernels where nothing was measured.
On an H200 it is 0.66 of y [8192,4096] and 0.66 to 0.67 of 512 rows, K = 4096; of dx [8192,4096], in
smaller tiles, about 0.6."""
EXPECTED_SMALL = 0.5
"""The same for their small tiles: float32, float32 adapters on a half model, unaligned rows,
several branches. A guess: they read each operand two to four times as often."""
EXPECTED_PERSISTENT = 0.98
"""And of the persistent kernels: on an H200 0.97 to 1.00 of 8192 rows; less with a mask (0.80) and
of 512 rows (0.89 to 0.92), where the smaller tiles are taken."""


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


def possible(setting: Setting, direction: str, special: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The plans that can run a call.

    Args:
        special: those from ``persistent`` on that take its matrices on its GPU.
    """
    mixed = setting.rank > 0 and setting.adapter != setting.dtype
    masked = setting.dropout and direction == "backward"
    # the library rounds S to the model's dtype, and knows no mask
    plans = PLANS[:2] if mixed or masked else PLANS[:3]
    # beside dx x is only read: few multiprocessors take longer to make its mask than dx takes
    return plans + tuple(plan for plan in special if plan != "beside" or not masked)


def break_even(setting: Setting, direction: str) -> float:
    """The share of the library's speed from which on a fused GEMM is the faster way.

    Split writes and reads the output once more and is one launch more; fused does the rank part's
    operations at its own speed. Above 1: it is never the faster one.
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


def start(setting: Setting, direction: str, plain: bool, special: tuple[str, ...] = ()) -> Choice:
    """The plan where nothing was measured.

    Args:
        plain: the large tiles take it, as ``configs.is_plain`` finds.
        special: as :func:`possible`.
    """
    if setting.rank == 0:  # no rank part: nothing is saved by fusing
        return Choice("torch", "no branch, so the library's GEMM is all there is to do")
    if "decode" in special:
        return Choice(
            "decode",
            "not measured on this GPU; of so few rows launches are saved by making S with y, which "
            "is the fastest on an H200 (deltaops tune-kernels measures)",
        )
    name, speed = "fused", expected(setting, plain)
    if "persistent" in special and speed < EXPECTED_PERSISTENT:
        name, speed = "persistent", EXPECTED_PERSISTENT
    needed = break_even(setting, direction)
    return Choice(
        name if speed >= needed else "split",
        f"not measured on this GPU; {name} breaks even at {needed:.0%} of the library's speed, "
        f"{speed:.0%} are assumed (deltaops tune-kernels measures)",
    )


_forced: dict[str, str] | None = None
_forced_ahead = False


@contextmanager
def forced(forward: str, backward: str, produced: bool = False) -> Iterator[None]:
    """These plans for every call, for tests and measurements; and ``produced`` wherever it can be,
    with ``forward`` for what is left of it. A call that one of them cannot run raises ValueError.
    """
    global _forced, _forced_ahead
    before = _forced, _forced_ahead
    _forced, _forced_ahead = {"forward": forward, "backward": backward}, produced
    try:
        yield
    finally:
        _forced, _forced_ahead = before


def choose(
    setting: Setting,
    direction: str,
    device: torch.device | str,
    plain: bool = True,
    special: tuple[str, ...] = (),
) -> Choice:
    """How one direction of a call on ``device`` goes.

    Args:
        direction: of :data:`tables.DIRECTIONS`.
        plain: the large tiles take it, as ``configs.is_plain`` finds.
        special: as :func:`possible`.
    Raises: DataError for a table that cannot be used.
    """
    if _forced_ahead and "produced" in special:
        return Choice("produced", "as forced")
    if _forced is not None:
        plan, able = _forced[direction], possible(setting, direction, special)
        if plan not in able:
            raise ValueError(
                f"{setting}: {direction} must be one of {', '.join(able)}, {plan!r} is forced"
            )
        return Choice(plan, "as forced")
    return _chosen(setting, direction, core.gpu(device), plain, special)


@lru_cache(maxsize=4096)
def _chosen(
    setting: Setting, direction: str, gpu: str | None, plain: bool, special: tuple[str, ...]
) -> Choice:
    if gpu is None:
        return Choice("fused", "Triton's interpreter shows the kernels")
    found = _found(gpu)
    able = possible(setting, direction, special)
    # tables are of aligned operands and one branch: others have other tiles
    for table, path in found.tables if plain else ():
        entry = table.nearest(setting, direction)
        best = None if entry is None else entry.best(direction, able)
        if entry is not None and best is not None:
            why = f"fastest for {entry.setting} on {gpu}, {path}"
            return Choice(best, "; ".join([why, *found.notes]))
    rule = start(setting, direction, plain, special)
    missing = [f"{path} has no call like it" for _, path in found.tables]
    return Choice(rule.plan, "; ".join([rule.why, *missing, *found.notes]))


_found = lru_cache(maxsize=None)(tables.find)
"""Once a GPU, so that all calls of a process follow the same tables."""


def knows_produced(device: torch.device) -> bool:
    """Whether some call on ``device`` may go by the plan ``produced``: its tables know of one, or
    it is forced."""
    return _forced_ahead or _has_produced(core.gpu(device))


@cache
def _has_produced(gpu: str | None) -> bool:
    if gpu is None:
        return False
    entries = [entry for table, _ in _found(gpu).tables for entry in table.entries]
    return any("produced" in entry.seconds.get("forward", {}) for entry in entries)


def forget() -> None:
    """Plans are made again, and tables are read again: after something was measured."""
    _chosen.cache_clear()
    _found.cache_clear()
    _has_produced.cache_clear()
