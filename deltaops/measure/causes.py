"""Why a goal is missed, as far as numbers of the same run say it: floors, ceilings, instructions.

A ceiling is what a free delta would reach; what lies between it and the value is ours to win.
"""

from __future__ import annotations

from . import cell as names
from .cell import Cell, Results
from .ledger import branch_flops, ledger, ms, parts
from .stacks import LIMIT, over_dearest, products_over_dearest


def causes(goal: str, dtype: str, where: str, left: float, results: Results) -> list[str]:
    """Sentences, each from a measured or counted fact; never empty.

    left: the share of our time that the goal leaves.
    """
    found = []
    cell = _cell(goal, dtype, where, results)
    if dtype == "bf16" and not results.machine.get("bf16_instructions"):
        found.append("this CPU has no BF16 instructions: bf16 is widened to float32")
    if cell is not None:
        found += _asked(goal, cell, left, results)
        found += _own_work(goal, cell, results)
        found += _torch_at_the_peak(goal, cell, results)
        found += _others_product(goal, cell, results)
        found += _again(goal, cell, results)
        found += _mixed(goal, cell)
        found += _call(goal, cell)
        found += _dropout(goal, cell, results)
        found += _free_delta(goal, cell)
        found += _saved(goal, cell)
    found += _slow_methods(goal, dtype, results)
    found += _stacked(goal, dtype, results)
    isa = results.machine.get("isa", "unknown")
    if not found:
        found.append("no floor of this machine explains it")
    return [*found, f"instruction set {isa}"]


def _asked(goal: str, cell: Cell, left: float, results: Results) -> list[str]:
    """What time the goal leaves, beside that of the multiply-adds alone."""
    if goal == "saved" or goal.startswith(("method", "call")):
        return []
    ours = names.MIXED if cell.group == "mixed" else names.OURS
    if goal == "step-compiled":
        ours = cell.best(names.OURS, names.OURS_COMPILED) or ours
    if ours not in cell.timings:
        return []
    took = cell.timings[ours].median
    text, floor, whose = f"the goal asks for {ms(left * took)}", None, ""
    if cell.group == "step":
        top = results.peak.get(cell.dtype)
        if cell.flops and isinstance(top, float):
            floor, whose = 1e-9 * cell.flops / top, " of the frozen base"
    else:
        found = ledger(cell, results)
        floor = None if found is None else found.floor
    if floor is None:
        return [text]
    if floor >= left * took:
        return [
            f"{text}, and the multiply-adds{whose} alone take {ms(floor)} at the FMA peak: no "
            f"kernel of this machine reaches it; ours takes {ms(took)}"
        ]
    if cell.group == "step":
        return [
            f"{text} of {ms(took)}; the multiply-adds{whose} alone take {ms(floor)} at the FMA peak"
        ]
    return [f"{text}; {parts(cell, results, took)}"]


def _cell(goal: str, dtype: str, where: str, results: Results) -> Cell | None:
    """The cell that was the worst."""
    for c in results.cells:
        if c.dtype == dtype and where in (c.label, f"{c.group} {c.label}"):
            groups = {"adapter": ("parallel", "sequential"), "saved": ("lora",)}
            head = goal.partition("-")[0]
            if c.group in groups.get(head, (head,)):
                return c
    return None


def branch_floor(cell: Cell) -> float:
    """Flops of a LoRA layer over those of the frozen one, forward and backward."""
    assert cell.shape is not None
    m, n, k = cell.shape
    return 1 + branch_flops(cell) / (4.0 * m * n * k)


def _own_work(goal: str, cell: Cell, results: Results) -> list[str]:
    """What the branch's products cost at the rate of the frozen one, and at that of its factors:
    they are float32, as PEFT keeps them, beside a bf16 weight too."""
    if not goal.startswith("lora-own"):
        return []
    floor = branch_floor(cell)
    found = f"the branch's own products make {floor:.3f} at the frozen layer's rate"
    wide, half = results.peak.get("f32"), results.peak.get("bf16")
    if cell.dtype == "bf16" and isinstance(wide, float) and isinstance(half, float):
        found += f", {1 + (floor - 1) * half / wide:.3f} at that of float32, which its factors are"
    return [found]


def _torch_at_the_peak(goal: str, cell: Cell, results: Results) -> list[str]:
    """How much torch leaves unused: what a layer at the very peak could gain over it."""
    top = results.peak.get(cell.dtype)
    peer = {
        "lora-frozen": names.FROZEN, "lora-peft": names.PEFT, "lora-prepacked": names.PREPACKED,
        "lora-peft-narrow": names.PEFT_NARROW, "bitfit": names.EAGER,
    }.get(goal)  # fmt: skip
    if not isinstance(top, float) or cell.shape is None or peer not in cell.timings:
        return []
    m, n, k = cell.shape
    least = 4e-9 * m * n * k * (branch_floor(cell) if cell.rank else 1.0) / top
    gain = cell.timings[peer].median / least
    if goal == "lora-frozen":
        reached = 1 / gain / (branch_floor(cell) if cell.rank else 1.0)
        plain = " (MKL is not handicapped here)" if reached > 0.7 else ""
        return [
            f"{peer} runs at {100 * reached:.0f} % of the FMA peak{plain}: a layer at the peak "
            f"would take {1 / gain:.2f} of its time"
        ]
    return [f"a layer at the FMA peak would be {gain:.2f}× as fast as {peer}"]


def _others_product(goal: str, cell: Cell, results: Results) -> list[str]:
    """What the others reach of the peak with the same product."""
    top = results.peak.get(cell.dtype)
    if not goal.startswith("gemm") or not isinstance(top, float) or cell.shape is None:
        return []
    m, n, k = cell.shape
    return [
        f"{peer} reaches {100 * 2e-9 * m * n * k / t.median / top:.0f} % of the FMA peak"
        for peer, t in cell.timings.items()
        if peer != names.OURS or goal == "gemm-prepacked"
    ]


def _again(goal: str, cell: Cell, results: Results) -> list[str]:
    """What the way to the core and cold caches cost: the same call some times in a row."""
    found = []
    top = results.peak.get(cell.dtype)
    if not goal.startswith("gemm") or cell.shape is None or not isinstance(top, float):
        return []
    m, n, k = cell.shape
    for peer in (names.OURS_AGAIN, names.PREPACKED_AGAIN):
        if peer in cell.timings:
            reached = 100 * 2e-9 * m * n * k / cell.timings[peer].median / top
            found.append(f"{peer} reaches {reached:.0f} %")
    return found


def _mixed(goal: str, cell: Cell) -> list[str]:
    """What is the routing's, and what the other adapters' own."""
    if goal != "mixed":
        return []
    one, both = cell.ratio(names.ROUTED, names.OURS), cell.ratio(names.MIXED, names.ROUTED)
    if one is None or both is None:
        return []
    return [
        f"all rows by one of the eight take {one:.2f}×; that seven more pairs of factors are "
        f"packed, and their gradients summed and stored, takes {both:.2f}× of that"
    ]


def _call(goal: str, cell: Cell) -> list[str]:
    """What torch itself takes for an autograd.Function that does nothing; without gradients, that
    there is no arithmetic to speak of in what is left."""
    own, empty, plain = (
        cell.timings.get(p) for p in (names.OURS, names.EMPTY_FUNCTION, names.FROZEN)
    )
    if goal != "call" or own is None or plain is None:
        return []
    if empty is None:
        return [
            f"of our {1e6 * own.median:.1f} µs {1e6 * (own.median - plain.median):.1f} are beyond "
            f"F.linear's {1e6 * plain.median:.1f}, which is C++ from its first line: checks, the "
            "plan's look-up and the core's arguments, in Python"
        ]
    return [
        f"an autograd.Function of as many tensors that computes nothing takes "
        f"{1e6 * empty.median:.1f} of our {1e6 * own.median:.1f} µs, "
        f"F.linear {1e6 * plain.median:.1f}"
    ]


def _dropout(goal: str, cell: Cell, results: Results) -> list[str]:
    """What dropout adds in time, and whether more than the two cells' spread."""
    if goal != "lora-dropout" or cell.shape is None:
        return []
    (base,) = [c for c in results.of("lora", cell.dtype, 0.0) if c.what == cell.what]
    with_it, without = cell.timings[names.OURS], base.timings[names.OURS]
    m, n, k = cell.shape
    found = [
        f"dropout adds {1e6 * (with_it.median - without.median):.0f} µs, for a seed and {m}·{k} "
        f"elements of masks in each pass, to products of {4e-9 * m * n * k:.1f} GF"
    ]
    if with_it.low <= without.high:
        found.append("it is timed apart from the layer without, and their quartiles overlap")
    return found


def _free_delta(goal: str, cell: Cell) -> list[str]:
    """What a step would gain if LoRA cost nothing on torch's own frozen layers."""
    if not goal.startswith("step"):
        return []
    base, own = cell.timings.get("frozen base"), cell.timings.get(names.OURS)
    peft = cell.timings.get(names.PEFT_COMPILED if goal == "step-compiled" else names.PEFT)
    if base is None or peft is None or own is None:
        return []
    return [
        f"the frozen base alone in eager torch is {peft.median / base.median:.2f}× as fast as "
        f"{'compiled ' if goal == 'step-compiled' else ''}PEFT; ours takes "
        f"{own.median / base.median:.2f} of the base's time"
    ]


def _saved(goal: str, cell: Cell) -> list[str]:
    if goal != "saved":
        return []
    return [f"{cell.saved[names.OURS]} bytes are held beyond x"]


def _slow_methods(goal: str, dtype: str, results: Results) -> list[str]:
    """Every method that eager torch is faster at, with what the profiler saw."""
    if not goal.startswith("method"):
        return []
    slow = [
        (ratio, c)
        for c in results.of("method", dtype)
        if (ratio := c.ratio(names.EAGER, names.OURS)) is not None and ratio < 1
    ]
    slow.sort(key=lambda found: found[0])
    return [f"{c.setting}: {ratio:.2f}×, {c.note}" for ratio, c in slow]


def _stacked(goal: str, dtype: str, results: Results) -> list[str]:
    """How many stacks are above the limit, and for how many of them the products alone are."""
    if goal != "stack":
        return []
    found = [
        (ratio, products_over_dearest(c))
        for c in results.of("stack", dtype)
        if (ratio := over_dearest(c)) is not None
    ]
    slow = [(ratio, floor) for ratio, floor in found if ratio > LIMIT]
    said = [f"{len(slow)} of {len(found)} stacks are above"]
    counted = [(ratio, floor) for ratio, floor in slow if floor is not None]
    if counted:
        bound = sum(floor > LIMIT for _, floor in counted)
        beyond = max(ratio / floor for ratio, floor in counted)
        said.append(
            f"the products of {bound} of them alone are, and none takes more than {beyond:.2f}× of "
            "what its products make"
        )
    return said
