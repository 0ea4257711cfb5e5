"""Made-up results, so that goals and reports can be held to known numbers."""

from __future__ import annotations

from typing import Any

from deltaops.measure.cell import Cell, Results
from deltaops.measure.interleave import Timing

MACHINE: dict[str, Any] = {
    "processor": "Some CPU", "threads": 2, "isa": "avx2", "bf16_instructions": False,
    "command": "deltaops bench", "date": "2026-01-02", "deltaops": "0", "versions": {"torch": "9"},
    "torch_cpu_capability": "AVX2",
}  # fmt: skip


def cell(
    group: str,
    seconds: dict[str, float],
    *,
    what: str = "512×768×768",
    dtype: str = "f32",
    dropout: float = 0.0,
    shape: tuple[int, int, int] | None = (512, 768, 768),
    **fields: Any,
) -> Cell:
    timings = {name: Timing.of([s]) for name, s in seconds.items()}
    fields.setdefault("rank", 16 if group == "lora" else 0)
    return Cell(group, what, dtype, dropout, timings, shape=shape, **fields)


def results(*cells: Cell, peak: float | str = 200.0, **machine: Any) -> Results:
    return Results({**MACHINE, **machine}, {"f32": peak, "bf16": peak}, list(cells))
