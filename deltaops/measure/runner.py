"""A whole run: what is measured in which order, and how long each part may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from deltaops.errors import DeltaopsError

from . import machine
from .cases import DTYPES, OPS, QUICK_SHAPES, SHAPES, SMALL_M
from .cell import EAGER, OURS_COMPILED, PEFT_COMPILED, Cell, Results
from .compare.contenders import Contender, contenders
from .layers import Pace, measure_call, measure_layer, measure_product
from .methods import NAMES, measure_method
from .mixed import SHAPES as MIXED_SHAPES
from .mixed import measure_mixed
from .peak import peak
from .sound import checked_peak, sift
from .stacks import measure_stack, pairs, titled
from .steps import measure_steps
from .workloads import READERS, WORKLOADS, Workload

Shape = tuple[int, int, int]

COMPILER = 45.0
"""Seconds under which a whole model is not worth compiling."""
STEP, METHOD, LAYER = 12.0, 2.0, 1.0
"""Seconds of a part's gate, warm-up and a few rounds."""
NO_PEER = (
    "this CPU has no BF16 instructions: torch's own products take up to a hundred times as long"
)


@dataclass(frozen=True)
class Settings:
    """What a run covers."""

    layers: bool = True
    steps: bool = True
    dtypes: tuple[str, ...] = tuple(DTYPES)
    step_dtypes: tuple[str, ...] = tuple(DTYPES)
    """Of ``dtypes``, those in which steps are taken."""
    ops: tuple[str, ...] = tuple(OPS)
    shapes: tuple[Shape, ...] = SHAPES
    small: tuple[Shape, ...] = SMALL_M
    mixed: tuple[Shape, ...] = MIXED_SHAPES
    """Of a layer whose batch mixes adapters."""
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    methods: tuple[str, ...] = NAMES
    readers: tuple[str, ...] = ("bert", "llama")
    """What the methods are timed on; of :data:`READERS` those whose steps are short."""
    stacks: bool = False
    """Every two methods at once, on the first of ``readers``; only where they are asked for: there
    are many."""
    dropouts: tuple[float, ...] = (0.0, 0.1)
    compiled: bool = True
    rounds: int = 15
    minutes: float = 20.0

    @classmethod
    def quick(cls) -> Settings:
        """Two shapes, one model, no compiler: well under 90 seconds."""
        return cls(
            shapes=QUICK_SHAPES, small=(), mixed=(), workloads=("bert",), dropouts=(0.0,),
            compiled=False, step_dtypes=("f32",), ops=("lora",), methods=(), rounds=5, minutes=1.0,
        )  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One interleaved run of the plan."""

    name: str
    """Begins with the group."""
    weight: float
    """Its share of the time, beside the others'."""
    run: Callable[[float], list[Cell]]
    """Measures within about so many seconds."""
    least: float = 0.0
    """Seconds that it needs to measure all of its peers; parts before it do not get them."""


def run(
    settings: Settings,
    on_part: Callable[[str, int, int], object] = lambda *_: None,
    on_results: Callable[[Results], object] = lambda _: None,
) -> Results:
    """Measure everything that ``settings`` names; a part that fails its gate is in ``failed``.

    Args:
        settings: what to cover.
        on_part: called before each part, and once at the end, with its name, how many are done and
            how many there are.
        on_results: called after each part with what a run that ends there has measured: to keep it.
    """
    began = time.perf_counter()
    facts = machine.describe()
    found = {dtype: checked_peak(peak(dtype)) for dtype in settings.dtypes}
    parts = list(plan(settings))
    cells: list[Cell] = []
    left_out: dict[str, str] = {}
    failed: dict[str, str] = {}
    for done, part in enumerate(parts):
        on_part(part.name, done, len(parts))
        left = 60 * settings.minutes - (time.perf_counter() - began)
        if left <= 0:
            left_out[part.name] = f"the {settings.minutes:g} minutes of the run were spent before"
            continue
        share = _share(parts[done:], left)
        try:
            sound, wrong = sift(part.run(share))
        # a gate, or what one method cannot: the rest of a long run is still worth having
        except (AssertionError, DeltaopsError, ValueError, RuntimeError) as error:
            failed[part.name] = str(error) or type(error).__name__
        else:
            cells += sound
            failed |= wrong
        facts["minutes"] = round((time.perf_counter() - began) / 60, 1)
        rest = dict.fromkeys((p.name for p in parts[done + 1 :]), "the run was stopped before")
        on_results(Results(facts, found, list(cells), left_out | rest, dict(failed)))
    on_part("done", len(parts), len(parts))
    facts["minutes"] = round((time.perf_counter() - began) / 60, 1)
    return Results(facts, found, cells, left_out, failed)


def _share(parts: list[Part], left: float) -> float:
    """Seconds of the first one: what it needs, and its share of what all of them leave."""
    needed, weights = sum(p.least for p in parts), sum(p.weight for p in parts)
    over = left - needed
    if over < 0:
        return left * parts[0].least / needed
    return parts[0].least + over * parts[0].weight / weights


def plan(settings: Settings) -> Iterator[Part]:
    """The parts in order: all of float32 before bfloat16, whose peers may overrun their time."""
    pace = Pace()
    for dtype in settings.dtypes:
        if settings.layers:
            yield from _layers(settings, dtype, pace)
            if dtype == "f32":
                yield Part(
                    "call", 1, lambda s: measure_call(rounds=settings.rounds, seconds=s), LAYER
                )
        if settings.steps and dtype in settings.step_dtypes:
            for name in settings.workloads:
                for dropout in settings.dropouts:
                    yield _step(settings, name, dtype, dropout)
        for reader in settings.readers:
            # in bfloat16 one model tells what its dtype changes
            if dtype == "f32" or reader == settings.readers[0]:
                yield from _methods(settings, reader, dtype)
        if settings.stacks:
            yield from _stacks(settings, dtype)


def _layers(settings: Settings, dtype: str, pace: Pace) -> Iterator[Part]:
    # small ones first: how long the large ones would take is judged by them
    shapes = sorted(settings.shapes, key=lambda s: s[0] * s[1] * s[2])
    for shape in (*settings.small, *shapes):
        yield Part(f"gemm {_text(shape)} {dtype}", 0.5, _product(settings, shape, dtype), LAYER)
    for op in settings.ops:
        for shape in shapes:
            weight = 3.0 if op == "lora" else 1.0
            yield Part(
                f"{op} {_text(shape)} {dtype}",
                weight,
                _layer(settings, op, shape, dtype, pace),
                LAYER,
            )
    for shape in settings.mixed:
        yield Part(f"mixed {_text(shape)} {dtype}", 0.5, _mixed(settings, shape, dtype), LAYER)


def _product(settings: Settings, shape: Shape, dtype: str) -> Callable[[float], list[Cell]]:
    return lambda s: [measure_product(shape, dtype, rounds=settings.rounds, seconds=s / 2)]


def _mixed(settings: Settings, shape: Shape, dtype: str) -> Callable[[float], list[Cell]]:
    return lambda s: [measure_mixed(shape, dtype, rounds=settings.rounds, seconds=s / 2)]


def _layer(
    settings: Settings, op: str, shape: Shape, dtype: str, pace: Pace
) -> Callable[[float], list[Cell]]:
    lora = op == "lora"
    return lambda s: measure_layer(
        op, shape, dtype,
        dropouts=settings.dropouts if lora else (0.0,),
        rounds=settings.rounds,
        # half: the gate, the compiler and the warm-up take their part
        seconds=s / 2,
        compiled=settings.compiled and lora,
        pace=pace,
    )  # fmt: skip


def _step(settings: Settings, name: str, dtype: str, dropout: float) -> Part:
    workload = WORKLOADS[name]()
    compiled = settings.compiled and not dropout

    def measure(seconds: float) -> list[Cell]:
        late = compiled and seconds < COMPILER
        cell = measure_steps(
            workload, dropout=dropout, rounds=settings.rounds, dtype=dtype,
            # the gate, the compiler and the warm-up take the other half
            seconds=seconds / 2, compiled=compiled and not late,
        )  # fmt: skip
        if late:
            why = f"its share of the run is {seconds:.0f} s, the compiler needs {COMPILER:.0f}"
            cell = replace(cell, absent={**cell.absent, OURS_COMPILED: why, PEFT_COMPILED: why})
        return [cell]

    dropped = f", dropout {dropout:g}" if dropout else ""
    weight, least = (24.0, COMPILER) if compiled else (12.0, STEP)
    return Part(f"step {workload.title} {dtype}{dropped}", weight, measure, least)


def _methods(settings: Settings, reader: str, dtype: str) -> Iterator[Part]:
    workload, known = READERS[reader](), contenders()
    for name in settings.methods:
        yield Part(
            f"method {known[name].title} on {workload.title} {dtype}", 1.5,
            _method(settings, known[name], workload, dtype), METHOD,
        )  # fmt: skip


def _stacks(settings: Settings, dtype: str) -> Iterator[Part]:
    workload = READERS[settings.readers[0]]()
    for first, second in pairs():
        yield Part(
            f"stack {titled(first, second)} on {workload.title} {dtype}", 1.5,
            _stack(settings, first, second, workload, dtype), METHOD,
        )  # fmt: skip


def _stack(
    settings: Settings, first: Contender, second: Contender, workload: Workload, dtype: str
) -> Callable[[float], list[Cell]]:
    # half: the gate and the warm-up take their part
    return lambda s: [
        measure_stack(first, second, workload, dtype, rounds=settings.rounds, seconds=s / 2)
    ]


def _method(
    settings: Settings, contender: Contender, workload: Workload, dtype: str
) -> Callable[[float], list[Cell]]:
    def measure(seconds: float) -> list[Cell]:
        if dtype == "bf16" and not machine.bf16_instructions():
            return [
                Cell(
                    "method", contender.title, dtype, 0.0, {}, {EAGER: NO_PEER},
                    model=workload.title,
                )
            ]  # fmt: skip
        # half: the gate and the warm-up take their part
        return [
            measure_method(contender, workload, dtype, rounds=settings.rounds, seconds=seconds / 2)
        ]

    return measure


def _text(shape: Shape) -> str:
    return "×".join(map(str, shape))
