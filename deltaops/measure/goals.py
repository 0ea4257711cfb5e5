"""The goals as data: what is to be reached, how it is computed from a run, and whether it was.

A goal is held on every cell that it names: its value is the worst of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from . import cell as names
from .causes import causes
from .cell import Cell, Results
from .stacks import LIMIT as STACKED
from .stacks import over_dearest

Samples = Callable[[Results, str], list[tuple[str, float]]]
"""From a run and a dtype: where it was measured → value."""


NO_PART = "not part of this run"


@dataclass(frozen=True)
class Goal:
    """One row of the table."""

    id: str
    text: str
    sense: str
    """"≥" or "≤"."""
    limits: dict[str, float]
    """dtype → threshold; a dtype that is not there has no goal."""
    samples: Samples
    unit: str = "×"
    lacking: Callable[[Results, str], str] = lambda r, dtype: ""
    """What must be measured and was not, in words: without it a goal is not met, if not missed."""
    source: str = "table"
    """"table", or "text" for what the issue asks for beside it."""


@dataclass(frozen=True)
class Outcome:
    """One goal in one dtype on this machine."""

    goal: str
    text: str
    dtype: str
    sense: str
    limit: float
    unit: str
    worst: float | None
    """None where nothing was measured."""
    median: float | None
    where: str
    """The worst cell, or why there is none; and what is lacking beside it."""
    met: bool | None
    """None where too little was measured to say."""
    count: int
    causes: list[str]
    """Of a miss."""

    def as_json(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)


def evaluate(results: Results) -> list[Outcome]:
    """Every goal in every dtype that it has."""
    return [
        _outcome(goal, dtype, limit, results)
        for goal in GOALS
        for dtype, limit in goal.limits.items()
    ]


def _outcome(goal: Goal, dtype: str, limit: float, results: Results) -> Outcome:
    samples = goal.samples(results, dtype)
    shown = (goal.id, goal.text, dtype, goal.sense, limit, goal.unit)
    if not samples:
        return Outcome(*shown, None, None, _why_empty(goal, dtype, results), None, 0, [])
    pick = min if goal.sense == "≥" else max
    where, worst = pick(samples, key=lambda s: s[1])
    met: bool | None = worst >= limit if goal.sense == "≥" else worst <= limit
    middle = statistics.median(v for _, v in samples)
    why = [] if met else causes(goal.id, dtype, where, left_of(goal, worst, limit), results)
    if lacking := goal.lacking(results, dtype):
        where, met = f"{where}; {lacking}", None if met else False
    return Outcome(*shown, worst, middle, where, met, len(samples), why)


def left_of(goal: Goal, value: float, limit: float) -> float:
    """The share of our time that ``goal`` leaves where its value is ``value``."""
    if goal.unit == " %" and goal.sense == "≤":  # over a reference
        value, limit = 100 + value, 100 + limit
    return value / limit if goal.sense == "≥" else limit / value


def _why_empty(goal: Goal, dtype: str, results: Results) -> str:
    """In words: the peer that is missing, the peak that is, or that it was not in this run."""
    if goal.id == "gemm-peak" and isinstance(results.peak.get(dtype), str):
        return str(results.peak[dtype])
    group = goal.id.partition("-")[0]
    groups = {"adapter": ("parallel", "sequential"), "saved": ("lora",)}.get(group, (group,))
    reasons = {
        f"{peer}: {why}"
        for g in groups
        for c in results.of(g, dtype)
        for peer, why in c.absent.items()
    }
    for wanting in (results.left_out, results.failed):
        reasons |= {
            why for what, why in wanting.items() if what.startswith(groups) and _is_of(what, dtype)
        }
    return "; ".join(sorted(reasons)) or NO_PART


def _is_of(what: str, dtype: str) -> bool:
    """Whether a part of the run, by its name, is of this dtype; "call" is of all."""
    words = what.replace(",", " ").split()
    return dtype in words or not {"f32", "bf16"} & set(words)


def _ratios(cells: list[Cell], above: str, below: str) -> list[tuple[str, float]]:
    found = [(c.label, c.ratio(above, below)) for c in cells]
    return [(where, value) for where, value in found if value is not None]


def _layer(above: str, below: str, only: Callable[[Cell], bool] = lambda c: True) -> Samples:
    return lambda r, dtype: _ratios([c for c in r.of("lora", dtype, 0.0) if only(c)], above, below)


def _wide(c: Cell) -> bool:
    return c.shape is not None and min(c.shape[1:]) >= 768


def _step(model: str, dropout: float) -> Samples:
    return lambda r, dtype: _ratios(
        [c for c in r.of("step", dtype, dropout) if c.what.startswith(model)],
        names.PEFT,
        names.OURS,
    )


def _gemm(r: Results, dtype: str) -> list[Cell]:
    return [
        c for c in r.of("gemm", dtype) if c.shape is not None and _wide(c) and c.shape[0] >= 128
    ]


def gigaflops(c: Cell, peer: str) -> float:
    """GF/s of a forward product."""
    assert c.shape is not None
    m, n, k = c.shape
    return 2e-9 * m * n * k / c.timings[peer].median


def _of_peak(r: Results, dtype: str) -> list[tuple[str, float]]:
    top = r.peak.get(dtype)
    if not isinstance(top, float):
        return []
    return [
        (c.label, 100 * gigaflops(c, names.OURS) / top)
        for c in _gemm(r, dtype)
        if names.OURS in c.timings
    ]


def _dropout_cost(r: Results, dtype: str) -> list[tuple[str, float]]:
    plain = {c.what: c for c in r.of("lora", dtype, 0.0)}
    return [
        (c.label, 100 * (c.timings[names.OURS].median / base.timings[names.OURS].median - 1))
        for c in r.of("lora", dtype)
        if c.dropout
        and (base := plain.get(c.what)) is not None
        and names.OURS in c.timings
        and names.OURS in base.timings
    ]


def _compiled(r: Results, dtype: str) -> list[tuple[str, float]]:
    found = []
    for c in r.of("step", dtype, 0.0):
        best = c.best(names.OURS, names.OURS_COMPILED)
        value = c.ratio(names.PEFT_COMPILED, best) if best else None
        if value is not None:
            found.append((c.label, value))
    return found


def _adapters(r: Results, dtype: str) -> list[tuple[str, float]]:
    return [
        (f"{op} {where}", value)
        for op in ("parallel", "sequential")
        for where, value in _ratios(r.of(op, dtype), names.EAGER, names.OURS)
    ]


def _saved(r: Results, dtype: str) -> list[tuple[str, float]]:
    """Bytes above 4·M·R."""
    return [
        (c.label, c.saved[names.OURS] - 4.0 * c.shape[0] * c.rank)
        for c in r.of("lora", dtype)
        if c.shape is not None and names.OURS in c.saved
    ]


def _best_of_layer(r: Results, dtype: str) -> list[tuple[str, float]]:
    return _ratios(r.of("lora", dtype), names.PREPACKED, names.OURS)


def _methods(r: Results, dtype: str) -> list[tuple[str, float]]:
    return _ratios(r.of("method", dtype), names.EAGER, names.OURS)


def _stacks(r: Results, dtype: str) -> list[tuple[str, float]]:
    found = [(c.label, over_dearest(c)) for c in r.of("stack", dtype)]
    return [(where, value) for where, value in found if value is not None]


def _unpaired(r: Results, dtype: str) -> str:
    """The methods that failed, were left out or have no peer; not what a model cannot have."""
    cells = [c for c in r.of("method", dtype) if names.OURS not in c.absent]
    gone = [
        f"{what.removeprefix('method ')}: {why}"
        for wanting in (r.failed, r.left_out)
        for what, why in wanting.items()
        if what.startswith("method ") and _is_of(what, dtype)
    ]
    alone = [
        f"{c.label}: {c.absent.get(names.EAGER, 'not timed')}"
        for c in cells
        if c.ratio(names.EAGER, names.OURS) is None
    ]
    if not gone + alone:
        return ""
    return (
        f"of {len(cells) + len(gone)} methods, {len(gone) + len(alone)} without a peer: "
        f"{'; '.join(gone + alone)}"
    )


def _both(f32: float, bf16: float | None = None) -> dict[str, float]:
    return {"f32": f32, "bf16": f32 if bf16 is None else bf16}


GOALS = (
    Goal("gemm-peak", "frozen GEMM, hidden ≥ 768, M ≥ 128, of the FMA peak", "≥", _both(92),
         _of_peak, " %"),
    Goal("gemm-prepacked", "the same against oneDNN prepacked", "≥", _both(1.0, 1.05),
         lambda r, d: _ratios(_gemm(r, d), names.PREPACKED, names.OURS)),
    Goal("lora-own", "LoRA r=16 layer over our own frozen layer, hidden ≥ 768", "≤", _both(1.06),
         _layer(names.OURS, names.OWN_FROZEN, _wide)),
    Goal("lora-own-384", "the same, hidden 384", "≤", _both(1.10),
         _layer(names.OURS, names.OWN_FROZEN, lambda c: not _wide(c))),
    Goal("lora-peft", "LoRA layer against PEFT eager", "≥", _both(2.2, 1.6),
         _layer(names.PEFT, names.OURS)),
    Goal("lora-peft-narrow", "the same, PEFT with bf16 adapters", "≥", {"bf16": 1.2},
         _layer(names.PEFT_NARROW, names.OURS)),
    Goal("lora-frozen", "LoRA layer's time over the frozen eager layer's", "≤", _both(0.50, 1.00),
         _layer(names.OURS, names.FROZEN)),
    Goal("mixed", "batch of 8 adapters over the same with one, M = 1024", "≤", _both(1.15),
         lambda r, d: _ratios(r.of("mixed", d), names.MIXED, names.OURS), source="text"),
    Goal("lora-dropout", "LoRA layer, dropout 0.1 over none", "≤", _both(5), _dropout_cost, " %"),
    Goal("step-peft-bert", "BERT step against PEFT eager", "≥", _both(2.1, 1.6),
         _step("BERT", 0.0)),
    Goal("step-peft-llama", "Llama step against PEFT eager", "≥", _both(2.0, 1.6),
         _step("Llama", 0.0)),
    Goal("step-dropout-bert", "BERT step with dropout 0.1 against PEFT eager", "≥",
         _both(2.5, 2.2), _step("BERT", 0.1)),
    Goal("step-dropout-llama", "Llama step with dropout 0.1 against PEFT eager", "≥",
         _both(2.4, 2.0), _step("Llama", 0.1)),
    Goal("step-compiled", "step, the best of ours against compiled PEFT", "≥", _both(1.6, 1.15),
         _compiled),
    Goal("adapter-layers", "parallel and sequential adapter against eager", "≥", _both(2.0, 1.5),
         _adapters),
    Goal("bitfit", "BitFit linear against eager", "≥", _both(2.0, 1.05),
         lambda r, d: _ratios(r.of("bitfit", d), names.EAGER, names.OURS)),
    Goal("saved", "bytes saved for backward beyond x and 4·M·R", "≤", _both(64), _saved, " B"),
    Goal("lora-prepacked", "LoRA layer against oneDNN prepacked + addmm_", "≥", _both(1.0),
         _best_of_layer, source="text"),
    Goal("call", "smallest layer (4×16, r=4) over F.linear, per call", "≤", {"f32": 2.0},
         lambda r, d: _ratios(r.of("call", d), names.OURS, names.FROZEN), source="text"),
    Goal("method-eager", "no method's step slower than eager torch", "≥", _both(1.0), _methods,
         lacking=_unpaired, source="text"),
    Goal("stack", "step of two methods over the dearer of them alone", "≤", _both(STACKED),
         _stacks, source="text"),
)  # fmt: skip
