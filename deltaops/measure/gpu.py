"""The Triton ``delta_linear`` on a GPU beside the frozen layer, PEFT, and two published plans.

    python3 -P -m deltaops.measure.gpu --out benchmarks/results        (`make gpu` ends with it)

Each case passes a gate against float64 first, ours and the plans of :mod:`.published` alike. Then
the peers run in turns: each as one CUDA graph over enough copies of its operands that none is found
in the cache, timed with CUDA events. A run in which the frozen layer drifts is thrown away and
repeated. What a call needs at its peak, beyond what was there, is taken once for each peer, before
the timing. bf16, adapters too. Groups and attention: :mod:`.gpu_group`, :mod:`.gpu_attention`.

What has no number has a reason, in the JSON and in the table: a peer that is no CUDA graph, or for
which there is too little memory; a case that drifts in every attempt, does not fit, fails or is
wrong. After each case the JSON is written.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaops.ops import Branch, delta_linear
from deltaops.ops.delta_linear import draw_seed, explain
from deltaops.reference import delta_linear as reference
from deltaops.testing import assert_accurate

from . import published
from .gpu_attention import PrefixCase
from .gpu_group import GroupCase
from .gpu_subject import (
    COMPILED,
    FROZEN,
    LORA_FUSION,
    OURS,
    PEFT,
    SCALING,
    UNSLOTH,
    Call,
    Peers,
    Subject,
    how_many,
)
from .interleave import Timing

CACHE_BYTES = 180e6
"""What the rotated operands hold at least: more than any L2 cache."""
DRIFT = 0.02
"""How far the frozen layer may move between the halves of a run."""
ATTEMPTS = 3
CASE = "case"
"""In what was left out: all of it."""
CONTEXT_LOST = 3
"""An exit code: a kernel left the GPU's context unusable, in a new process the rest may go on."""
NO_MEMORY = "too little memory on the GPU"


@dataclass(frozen=True)
class Case:
    """M tokens, N outputs, K inputs. Forward alone for few tokens (decoding), else both ways."""

    op: ClassVar[str] = "delta_linear"

    m: int
    n: int
    k: int
    rank: int
    dropout: float = 0.0

    @property
    def backward(self) -> bool:
        """Whether the backward pass is timed too."""
        return self.m > 16

    def __str__(self) -> str:
        dropout = f" p={self.dropout:g}" if self.dropout else ""
        return f"{self.m}×{self.n}×{self.k} r={self.rank}{dropout}"

    def facts(self) -> dict[str, Any]:
        """See :class:`Subject`."""
        shape = [self.m, self.n, self.k]
        return {
            "shape": shape, "rank": self.rank, "dropout": self.dropout, "backward": self.backward
        }  # fmt: skip

    def operands(self, device: str, cache_bytes: float) -> list[Operands]:
        """See :class:`Subject`."""
        return operands(self, device, cache_bytes)

    def gate(self, copy: Operands, backend: str) -> None:
        """See :class:`Subject`."""
        gate(self, copy, backend)

    def peers(
        self, copies: list[Operands], backend: str, compile_peft: bool
    ) -> tuple[Peers, dict[str, str]]:
        """See :class:`Subject`."""
        return make_peers(self, copies, backend, compile_peft)

    def plan(self, copy: Operands, backend: str) -> str | None:
        """See :class:`Subject`."""
        branch = Branch(copy.a, copy.b, SCALING, self.dropout)
        return explain(copy.x, copy.weight, None, [branch], backend=backend).plan


@dataclass(frozen=True)
class Operands:
    """One copy of what a call reads."""

    x: Tensor
    weight: Tensor
    grad_y: Tensor
    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Result:
    """Seconds of each peer for one copy, and how they were taken."""

    case: Subject
    timings: dict[str, Timing] = field(default_factory=dict)
    """Empty where the case was left out."""
    drift: float | None = None
    discarded: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    """Peer → why it has no number; of the case itself under :data:`CASE`."""
    plan: str | None = None
    """How the backend goes, in its words."""
    wrong: bool = False
    """Whether the gate or another failure ended it."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """Peer → what one call allocates at its peak, beyond its operands."""

    def ratio(self, above: str, below: str) -> float | None:
        """Median over median; None where a peer is missing."""
        if above not in self.timings or below not in self.timings:
            return None
        return self.timings[above].median / self.timings[below].median

    def as_json(self) -> dict[str, Any]:
        """Shape, setting, every timing in seconds, and what has none for which reason."""
        return {
            **self.case.facts(),
            "dtype": "bf16",
            "seconds": {name: t.as_json() for name, t in self.timings.items()},
            "frozen_drift": self.drift,
            "runs_discarded": self.discarded,
            "peak_bytes": self.peak_bytes,
            "left_out": self.left_out,
            "plan": self.plan,
            "wrong": self.wrong,
        }


# ---------------------------------------------------------------------------------------- timing


def drift(seconds: Sequence[float]) -> float:
    """Relative change of the median from the first half of the rounds to the second."""
    half = len(seconds) // 2
    first, second = statistics.median(seconds[:half]), statistics.median(seconds[-half:])
    return abs(second / first - 1)


def take_turns(
    peers: Mapping[str, Call], clock: Callable[[Call], float], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each peer in each round, in an order that rotates; one round before is untimed."""
    names = list(peers)
    for name in names:
        clock(peers[name])
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(clock(peers[name]))
    return seconds


def steady(
    peers: Mapping[str, Call], clock: Callable[[Call], float], rounds: int
) -> tuple[dict[str, list[float]], float, int]:
    """A run whose frozen layer did not drift: (seconds, drift, runs thrown away before it).

    After the last attempt a run that drifted is handed out, with its drift: not to be believed.
    """
    discarded = 0
    while True:
        seconds = take_turns(peers, clock, rounds)
        moved = drift(seconds[FROZEN])
        if moved <= DRIFT or discarded == ATTEMPTS - 1:
            return seconds, moved, discarded
        discarded += 1


def cuda_clock(call: Call) -> float:
    """Seconds of ``call`` on the GPU, from one event to the next."""
    begin, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own has no types
        for _ in range(2)
    )
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def captured(call: Call) -> Call:
    """``call`` as a CUDA graph, so that no launch is waited for. Raises: RuntimeError."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own has no types
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def cuda_peak(call: Call) -> int:
    """Bytes that ``call`` holds at most beyond what is allocated before it, what it returns too."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated()
    del kept
    return most - before


def ceilings(
    device: str = "cuda",
    *,
    size: int = 8192,
    rounds: int = 10,
    clock: Callable[[Call], float] = cuda_clock,
) -> dict[str, float]:
    """What this GPU does at best, by the library: operations a second of a bf16 product of size³,
    and bytes a second, read and written, of a copy of size² such elements, 8 times over."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(8, size, size, device=device, dtype=torch.bfloat16)
    product, target = torch.empty_like(left), torch.empty_like(source)
    calls: dict[str, Call] = {
        "product": lambda: torch.mm(left, right, out=product),
        "copy": lambda: target.copy_(source),
    }
    seconds = {name: statistics.median(t) for name, t in take_turns(calls, clock, rounds).items()}
    return {
        "operations_per_second": 2 * size**3 / seconds["product"],
        "copy_bytes_per_second": 2 * source.nbytes / seconds["copy"],
    }


# ----------------------------------------------------------------------------------------- peers


def operands(case: Case, device: str, cache_bytes: float) -> list[Operands]:
    """Random copies, together no smaller than ``cache_bytes``; at least two."""
    one = 2 * (case.n * case.k + case.m * case.k + case.m * case.n * case.backward)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        t = torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)
        return t.mul_(scale)

    return [
        Operands(
            normal(case.m, case.k).requires_grad_(case.backward),
            normal(case.n, case.k, scale=case.k**-0.5),
            normal(case.m, case.n) if case.backward else normal(1, 1),
            normal(case.rank, case.k, scale=case.k**-0.5).requires_grad_(case.backward),
            normal(case.n, case.rank, scale=case.rank**-0.5).requires_grad_(case.backward),
        )
        for _ in range(how_many(one, cache_bytes))
    ]


def make_peers(
    case: Case, copies: list[Operands], backend: str, compile_peft: bool = True
) -> tuple[Peers, dict[str, str]]:
    """Each peer as a call for each copy, and why a peer is missing."""

    def frozen(o: Operands) -> object:
        y = functional.linear(o.x, o.weight)
        return torch.autograd.grad(y, o.x, o.grad_y) if case.backward else y

    def over_copies(one: Callable[[Operands], object]) -> list[Call]:
        return [partial(one, o) for o in copies]

    peers: Peers = {FROZEN: over_copies(frozen)}
    gated, missing = gated_peers(case, copies[0].x.device, backend)
    peers |= {name: over_copies(one) for name, one in gated.items()}
    layers = [_peft_layer(case, o) for o in copies]
    if None in layers:
        return peers, missing | dict.fromkeys((PEFT, COMPILED), "peft is not installed")
    peers[PEFT] = [partial(_peft, case, layer, o) for layer, o in zip(layers, copies, strict=True)]
    if compile_peft:
        states = [dict(layer.named_parameters()) for layer in layers]

        # parameters are arguments, so that one compilation serves every copy
        def functionally(state: dict[str, Tensor], x: Tensor) -> Tensor:
            y: Tensor = torch.func.functional_call(layers[0], state, (x,))
            return y

        compiled = torch.compile(functionally, dynamic=False)
        peers[COMPILED] = [
            partial(_peft, case, layer, o, partial(compiled, state))
            for layer, state, o in zip(layers, states, copies, strict=True)
        ]
    return peers, missing


def _peft(case: Case, layer: Any, o: Operands, forward: Any = None) -> object:
    y = (layer if forward is None else forward)(o.x)
    return _there_and_back(case, y, o, list(_trained(layer).values()))


def gated_peers(
    case: Case, device: torch.device, backend: str
) -> tuple[dict[str, Callable[[Operands], list[Tensor]]], dict[str, str]]:
    """What is held to float64: ours and the published plans, each as a call on one copy that gives
    y and the gradients of x, a and b; and why one is missing."""
    peers: dict[str, Callable[[Operands], list[Tensor]]] = {OURS: lambda o: _ours(case, o, backend)}
    missing = {}
    if case.dropout:
        missing[UNSLOTH] = "its fast path has no dropout"
    else:
        peers[UNSLOTH] = lambda o: _all_of(
            case, published.unsloth(o.x, o.weight, o.a, o.b, SCALING), o
        )
    if reason := published.lora_fusion_unavailable(device):
        missing[LORA_FUSION] = reason
    else:
        peers[LORA_FUSION] = lambda o: _all_of(
            case, published.lora_fusion(o.x, o.weight, o.a, o.b, SCALING, case.dropout), o
        )
    return peers, missing


def _all_of(case: Case, y: Tensor, o: Operands) -> list[Tensor]:
    return [y, *(torch.autograd.grad(y, [o.x, o.a, o.b], o.grad_y) if case.backward else [])]


def _there_and_back(case: Case, y: Tensor, o: Operands, trained: list[Tensor]) -> object:
    return torch.autograd.grad(y, [o.x, *trained], o.grad_y) if case.backward else y


def _ours(case: Case, o: Operands, backend: str) -> list[Tensor]:
    branch = Branch(o.a, o.b, SCALING, case.dropout)
    return _all_of(case, delta_linear(o.x, o.weight, None, [branch], backend=backend), o)


def _peft_layer(case: Case, o: Operands) -> Any:
    """PEFT's own layer with the same values; None where PEFT is not installed."""
    try:
        import peft
    except ImportError:
        return None
    holder = nn.Module()
    holder.lin = nn.Linear(case.k, case.n, bias=False, device="meta", dtype=o.x.dtype)
    holder.lin.weight = nn.Parameter(o.weight, requires_grad=False)
    config = peft.LoraConfig(
        r=case.rank,
        lora_alpha=int(SCALING * case.rank),
        lora_dropout=case.dropout,
        target_modules=["lin"],
    )
    layer: Any = peft.inject_adapter_in_model(config, holder).lin
    # ours also in dtype: PEFT would make them float32
    layer.lora_A["default"].weight = nn.Parameter(o.a.detach(), requires_grad=case.backward)
    layer.lora_B["default"].weight = nn.Parameter(o.b.detach(), requires_grad=case.backward)
    return layer


def _trained(layer: Any) -> dict[str, Tensor]:
    return {"a": layer.lora_A["default"].weight, "b": layer.lora_B["default"].weight}


def gate(case: Case, o: Operands, backend: str) -> None:
    """Hold ours and the published plans to the float64 reference, with the same mask. Raises:
    AssertionError, which names the peer."""
    device = o.x.device
    torch.manual_seed(1)
    seed = draw_seed(device) if case.dropout else None
    wanted = []
    with torch.no_grad():
        for kind in (torch.float64, o.x.dtype):
            x, w, dy, a, b = (t.to(kind) for t in (o.x, o.weight, o.grad_y, o.a, o.b))
            factors = ([SCALING], [case.dropout], ["identity"], seed)
            y, s = reference.forward(x, w, None, [a], [b], [None], *factors)
            results = [y]
            if case.backward:
                needs = [True, False, True, True, False]
                results += reference.backward(dy, x, w, [a], [b], s, *factors, needs)
            wanted.append(results)
    for peer, call in gated_peers(case, device, backend)[0].items():
        torch.manual_seed(1)
        got = call(o)
        names = ("y", "grad x", "grad a", "grad b")[: len(got)]
        for name, value, oracle, baseline in zip(names, got, *wanted, strict=True):
            assert_accurate(value, oracle, baseline, f"{case}: {peer}: {name}")


def measure(
    case: Subject,
    *,
    device: str = "cuda",
    backend: str = "triton",
    rounds: int = 20,
    clock: Callable[[Call], float] = cuda_clock,
    capture: Callable[[Call], Call] = captured,
    compile_peft: bool = True,
    peak: Callable[[Call], int] = cuda_peak,
    cache_bytes: float = CACHE_BYTES,
) -> Result:
    """Gate, then time what can be captured. Raises: AssertionError where numbers are wrong; nothing
    is timed then. torch.OutOfMemoryError where the operands or the gate do not fit.

    Args:
        clock: runs a call and says how many seconds it took.
        capture: turns a call into one without launch costs; a peer for which it raises RuntimeError
            is left out, since its launches would be timed beside others' replays. So is the case
            where that is the frozen layer or ours.
        peak: runs a call, once it has run before, and says how many bytes it took at most.
    """
    copies = case.operands(device, cache_bytes)
    case.gate(copies[0], backend)
    calls, left_out = case.peers(copies, backend, compile_peft)
    plan = case.plan(copies[0], backend)
    peers, peaks = {}, {}
    for name, by_copy in calls.items():
        try:
            by_copy[0]()
            peaks[name] = peak(by_copy[0])
            peers[name] = capture(partial(_all, by_copy))
        except torch.OutOfMemoryError as error:
            left_out[name] = f"{NO_MEMORY}: {first_line(error)}"
        except RuntimeError as error:
            if device == "cuda":
                torch.cuda.synchronize()  # raises where the context is lost: none can go on
            left_out[name] = f"not captured as a graph: {first_line(error)}"
    for name in (FROZEN, OURS):
        if name not in peers:
            left_out[CASE] = f"nothing to compare without {name}"
            return Result(case, left_out=left_out, plan=plan, peak_bytes=peaks)
    seconds, moved, discarded = steady(peers, clock, rounds)
    if moved > DRIFT:
        left_out[CASE] = (
            f"the frozen layer drifted by {moved:.1%}, in each of {ATTEMPTS} runs more "
        )
        left_out[CASE] += f"than {DRIFT:.0%}"
        return Result(case, {}, moved, discarded + 1, left_out, plan, peak_bytes=peaks)
    timings = {
        name: Timing.of([value / len(copies) for value in values])
        for name, values in seconds.items()
    }
    return Result(case, timings, moved, discarded, left_out, plan, peak_bytes=peaks)


def _all(calls: Sequence[Call]) -> list[object]:
    return [call() for call in calls]


def first_line(error: BaseException) -> str:
    """Of its message; compilers' go on for pages."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


# --------------------------------------------------------------------------------------- program


CASES: tuple[Subject, ...] = (
    *(Case(m, 4096, 4096, 16) for m in (8192, 512, 1, 16, 32768)),
    GroupCase(8192, (4096, 1024, 1024), 4096, 16),
    GroupCase(8192, (14336, 14336), 4096, 16),
    PrefixCase(2, 32, 8, 2048, 128, 32),
    *(Case(m, 4096, 4096, 64) for m in (8192, 512, 1, 16, 32768)),
    Case(8192, 4096, 4096, 16, dropout=0.1),
    GroupCase(8192, (4096, 1024, 1024), 4096, 16, dropout=0.1),
    PrefixCase(8, 32, 8, 512, 128, 32),
    *(Case(m, n, k, r) for r in (16, 64) for n, k in ((14336, 4096), (4096, 14336))
      for m in (8192, 512, 1, 16, 32768)),
)  # fmt: skip
"""The most telling first: the time may run out."""

OPS = (Case.op, GroupCase.op, PrefixCase.op)
"""Keys of the JSON, a list of results each."""

PEERS = (PEFT, COMPILED, UNSLOTH, LORA_FUSION)
"""Whose time is told over ours."""


def table(results: Sequence[Result]) -> str:
    """Microseconds of each peer (median, quartiles) and what matters between them; below it what
    was left out, and why."""
    heads = [f"{name}/ours" for name in ("PEFT", "compiled", "Unsloth", "LoRAFusion")]
    lines = [
        f"{'M×N×K, forward (+ backward from M=512)':40} {'frozen µs':>10} {'ours µs':>10} "
        f"{'quartiles':>17} {'ours/frozen':>12}"
        + "".join(f" {head:>15}" for head in heads)
        + "  peak MB, ours and frozen"
    ]
    for r in results:
        if CASE in r.left_out:
            lines.append(f"{r.case!s:40} left out: {r.left_out[CASE]}")
            continue
        ours = r.timings[OURS]
        ratios = [r.ratio(name, OURS) for name in PEERS]
        shown = "".join(f" {'—' if ratio is None else f'{ratio:.3f}':>15}" for ratio in ratios)
        peaks = [r.peak_bytes[name] / 1e6 for name in (OURS, FROZEN) if name in r.peak_bytes]
        shown += "  " + ", ".join(f"{peak:.1f}" for peak in peaks)
        shown += "".join(
            f"; {name}/ours {r.ratio(name, OURS):.3f}"
            for name in r.timings
            if name not in (FROZEN, OURS, *PEERS)
        )
        span = f"{1e6 * ours.low:.1f}–{1e6 * ours.high:.1f}"
        lines.append(
            f"{r.case!s:40} {1e6 * r.timings[FROZEN].median:10.1f} {1e6 * ours.median:10.1f} "
            f"{span:>17} {r.ratio(OURS, FROZEN):12.3f}{shown}"
        )
    reasons: dict[str, list[str]] = {}
    for r in results:
        for name, why in r.left_out.items():
            if name != CASE:
                reasons.setdefault(f"{name} left out: {why}", []).append(str(r.case))
    return "\n".join([*lines, *(f"{why} ({', '.join(cases)})" for why, cases in reasons.items())])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as many cases as the time allows; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python3 -P -m deltaops.measure.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON")
    parser.add_argument("--seconds", type=float, default=300.0, help="no case starts after these")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    wanted = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "deltaops.measure.gpu: torch finds no GPU; it needs an NVIDIA GPU with its driver and "
            "a torch built for CUDA. For this machine's processor: deltaops bench.",
            file=sys.stderr,
        )
        return 2
    name = torch.cuda.get_device_name()
    if wanted.first:  # beside what the cases before it left
        name = f"{name} from {wanted.first}"
    return run(wanted.out, wanted.seconds, name, CASES[wanted.first :], measure, best=ceilings())


def run(
    out: Path,
    budget: float,
    device: str,
    cases: Sequence[Subject],
    measure_one: Callable[[Subject], Result],
    now: Callable[[], float] = time.monotonic,
    best: Mapping[str, float] | None = None,
) -> int:
    """Measure ``cases`` until ``budget`` seconds are over, write the JSON, print the table; returns
    the exit code, 1 where numbers were wrong or a case failed, :data:`CONTEXT_LOST` where this
    process can do no more."""
    from deltaops.files import write_json
    from deltaops.measure import machine

    began, results, lost = now(), list[Result](), False
    path = out / f"gpu-{'-'.join(device.lower().split())}.json"
    facts = {**machine.describe(), "gpu": device, "ceilings": dict(best or {})}
    for case in cases:
        if now() - began > budget:
            break
        try:
            found = measure_one(case)
        except torch.OutOfMemoryError as error:
            found = Result(case, left_out={CASE: f"{NO_MEMORY}: {first_line(error)}"})
        except AssertionError as error:  # the other cases may be right
            found = Result(case, left_out={CASE: f"wrong numbers: {error}"}, wrong=True)
        except Exception as error:  # a compiler's, or the GPU's: the other cases may run
            lost = isinstance(error, torch.AcceleratorError)
            why = f"{type(error).__name__}: {first_line(error)}"
            found = Result(case, left_out={CASE: f"failed: {why}"}, wrong=True)
        results.append(found)
        print(f"{case}: done", file=sys.stderr, flush=True)
        # after each case: a run that is stopped has not been in vain
        over = [str(left) for left in cases[len(results) :]]
        content = {
            "machine": facts,
            **{op: [r.as_json() for r in results if r.case.op == op] for op in OPS},
            "not_reached": over,
        }
        write_json(path, content)
        if lost:
            break
    print(table(results))
    for what, rate in (best or {}).items():
        print(f"{what.replace('_', ' ')} of this GPU at best, in this run: {rate:.3g}")
    if len(results) < len(cases):
        why = "the GPU's context was lost" if lost else "the time was over"
        print(f"{len(cases) - len(results)} of {len(cases)} cases left out: {why}")
    print(f"wrote {path}" if results else "nothing was measured, nothing written")
    if lost and len(results) < len(cases):
        return CONTEXT_LOST
    return 1 if any(r.wrong for r in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
