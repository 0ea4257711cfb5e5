"""Where a layer's time goes: what its multiply-adds take at the FMA peak, and what comes on top.

A goal that leaves less time than the multiply-adds alone take is beyond any kernel of this machine;
of another, the parts say which is over.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import cell as names
from .cell import Cell, Results

PRODUCTS = {"gemm": 1, "lora": 2, "parallel": 2, "bitfit": 2, "mixed": 2, "sequential": 0}
"""Group → products of M·N·K that it has: forward, and for the gradient of x."""


@dataclass(frozen=True)
class Ledger:
    """Seconds of one layer, forward and backward (of a product: forward)."""

    frozen: float
    """Multiply-adds of the frozen products at the FMA peak of their dtype."""
    branch: float
    """Those of the branch, whose factors are float32, at the peak of float32."""

    @property
    def floor(self) -> float:
        """What no kernel passes."""
        return self.frozen + self.branch


def branch_flops(cell: Cell) -> float:
    """A branch's own: three products that run over K and three over N; a bottleneck's six run over
    its width."""
    assert cell.shape is not None
    m, n, k = cell.shape
    return 6.0 * m * cell.rank * (2 * k if cell.group == "sequential" else n + k)


def ledger(cell: Cell, results: Results) -> Ledger | None:
    """The floor of a cell; None where it is no layer or a peak is missing."""
    own, wide = results.peak.get(cell.dtype), results.peak.get("f32")
    if cell.shape is None or cell.group not in PRODUCTS or not isinstance(own, float):
        return None
    branch = branch_flops(cell)
    if branch and not isinstance(wide, float):
        wide = own  # a run of bf16 alone: its units do no float32 faster
    m, n, k = cell.shape
    frozen = PRODUCTS[cell.group] * 2.0 * m * n * k
    return Ledger(1e-9 * frozen / own, 1e-9 * branch / wide if isinstance(wide, float) else 0.0)


def parts(cell: Cell, results: Results, took: float) -> str:
    """In words: what of ``took`` seconds is over the floor, and where."""
    found = ledger(cell, results)
    if found is None:
        return ""
    text = [f"of {ms(took)} the multiply-adds take {ms(found.floor)} at the FMA peak"]
    frozen = _own_frozen(cell, results)
    if frozen is not None and found.frozen:
        text.append(f"our frozen layer {ms(frozen - found.frozen)} more than its own")
        rest = took - frozen - found.branch
        text.append(f"the delta {ms(rest)} more than its own" if rest > 0 else "the delta no more")
    else:
        text.append(f"all else {ms(took - found.floor)}")
    return ", ".join(text)


def _own_frozen(cell: Cell, results: Results) -> float | None:
    """Our frozen layer's time at the cell's shape, from the LoRA cell that has it."""
    if PRODUCTS[cell.group] != 2:
        return None
    for c in results.of("lora", cell.dtype, 0.0):
        if c.shape == cell.shape and names.OWN_FROZEN in c.timings:
            return c.timings[names.OWN_FROZEN].median
    return None


def ms(seconds: float) -> str:
    """Milliseconds, to three digits."""
    return f"{1e3 * seconds:.3g} ms"
