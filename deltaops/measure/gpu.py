"""The Triton ``delta_linear`` on a GPU beside the frozen layer, PEFT, and two published plans.

    python3 -P -m deltaops.measure.gpu --out benchmarks/results        (`make gpu` ends with it)

Each case passes a gate against float64 first, ours and the plans of :mod:`.published` alike. Then
the peers run in turns: each as one CUDA graph over enough copies of its operands that none is found
in the cache, timed with CUDA events. A run in which the frozen layer drifts is thrown away and
repeated. bf16, adapters too.

What has no number has a reason, in the JSON and in the table: a peer that is no CUDA graph, or for
which there is too little memory; a case that drifts in every attempt, does not fit, fails or is
wrong. After each case the JSON is written.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaops.ops import Branch, delta_linear
from deltaops.ops.delta_linear import draw_seed, explain
from deltaops.reference import delta_linear as reference
from deltaops.testing import assert_accurate

from . import published
from .interleave import Timing

FROZEN, PEFT, COMPILED, OURS = "frozen", "PEFT", "PEFT compiled", "deltaops"
UNSLOTH, LORA_FUSION = "Unsloth's arithmetic", "LoRAFusion's plan"

CACHE_BYTES = 180e6
"""What the rotated operands hold at least: more than any L2 cache."""
DRIFT = 0.02
"""How far the frozen layer may move between the halves of a run."""
ATTEMPTS = 3
SCALING = 2.0
CASE = "case"
"""In what was left out: all of it."""
CONTEXT_LOST = 3
"""An exit code: a kernel left the GPU's context unusable, in a new process the rest may go on."""
NO_MEMORY = "too little memory on the GPU"

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """M tokens, N outputs, K inputs. Forward alone for few tokens (decoding), else both ways."""

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


CASES = (
    *(Case(m, 4096, 4096, r) for r in (16, 64) for m in (8192, 512, 1, 16, 32768)),
    Case(8192, 4096, 4096, 16, dropout=0.1),
    *(Case(m, n, k, r) for r in (16, 64) for n, k in ((14336, 4096), (4096, 14336))
      for m in (8192, 512, 1, 16, 32768)),
)  # fmt: skip
"""The most telling first: the time may run out."""


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

    case: Case
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

    def ratio(self, above: str, below: str) -> float | None:
        """Median over median; None where a peer is missing."""
        if above not in self.timings or below not in self.timings:
            return None
        return self.timings[above].median / self.timings[below].median

    def as_json(self) -> dict[str, Any]:
        """Shape, setting, every timing in seconds, and what has none for which reason."""
        case = self.case
        return {
            "shape": [case.m, case.n, case.k],
            "rank": case.rank,
            "dropout": case.dropout,
            "backward": case.backward,
            "dtype": "bf16",
            "seconds": {name: t.as_json() for name, t in self.timings.items()},
            "frozen_drift": self.drift,
            "runs_discarded": self.discarded,
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
        for _ in range(max(2, math.ceil(cache_bytes / one)))
    ]


def make_peers(
    case: Case, copies: list[Operands], backend: str, compile_peft: bool = True
) -> tuple[dict[str, Call], dict[str, str]]:
    """Each peer as a call that goes over all copies, and why a peer is missing."""

    def frozen(o: Operands) -> object:
        y = functional.linear(o.x, o.weight)
        return torch.autograd.grad(y, o.x, o.grad_y) if case.backward else y

    def over_copies(one: Callable[[Operands], object]) -> Call:
        return lambda: [one(o) for o in copies]

    peers: dict[str, Call] = {FROZEN: over_copies(frozen)}
    gated, missing = gated_peers(case, copies[0].x.device, backend)
    peers |= {name: over_copies(one) for name, one in gated.items()}
    layers = [_peft_layer(case, o) for o in copies]
    if None in layers:
        return peers, missing | dict.fromkeys((PEFT, COMPILED), "peft is not installed")
    peers[PEFT] = lambda: [
        _there_and_back(case, layer(o.x), o, list(_trained(layer).values()))
        for layer, o in zip(layers, copies, strict=True)
    ]
    if compile_peft:
        states = [dict(layer.named_parameters()) for layer in layers]

        # parameters are arguments, so that one compilation serves every copy
        def functionally(state: dict[str, Tensor], x: Tensor) -> Tensor:
            y: Tensor = torch.func.functional_call(layers[0], state, (x,))
            return y

        compiled = torch.compile(functionally, dynamic=False)
        peers[COMPILED] = lambda: [
            _there_and_back(case, compiled(state, o.x), o, list(_trained(layer).values()))
            for layer, state, o in zip(layers, states, copies, strict=True)
        ]
    return peers, missing


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
    case: Case,
    *,
    device: str = "cuda",
    backend: str = "triton",
    rounds: int = 20,
    clock: Callable[[Call], float] = cuda_clock,
    capture: Callable[[Call], Call] = captured,
    compile_peft: bool = True,
    cache_bytes: float = CACHE_BYTES,
) -> Result:
    """Gate, then time what can be captured. Raises: AssertionError where numbers are wrong; nothing
    is timed then. torch.OutOfMemoryError where the operands or the gate do not fit.

    Args:
        clock: runs a call and says how many seconds it took.
        capture: turns a call into one without launch costs; a peer for which it raises RuntimeError
            is left out, since its launches would be timed beside others' replays. So is the case
            where that is the frozen layer or ours.
    """
    copies = operands(case, device, cache_bytes)
    gate(case, copies[0], backend)
    calls, left_out = make_peers(case, copies, backend, compile_peft)
    o = copies[0]
    branch = Branch(o.a, o.b, SCALING, case.dropout)
    plan = explain(o.x, o.weight, None, [branch], backend=backend).plan
    peers = {}
    for name, call in calls.items():
        try:
            peers[name] = capture(call)
        except torch.OutOfMemoryError as error:
            left_out[name] = f"{NO_MEMORY}: {first_line(error)}"
        except RuntimeError as error:
            if o.x.is_cuda:
                torch.cuda.synchronize()  # raises where the context is lost: none can go on
            left_out[name] = f"not captured as a graph: {first_line(error)}"
    for name in (FROZEN, OURS):
        if name not in peers:
            left_out[CASE] = f"nothing to compare without {name}"
            return Result(case, left_out=left_out, plan=plan)
    seconds, moved, discarded = steady(peers, clock, rounds)
    if moved > DRIFT:
        left_out[CASE] = (
            f"the frozen layer drifted by {moved:.1%}, in each of {ATTEMPTS} runs more "
        )
        left_out[CASE] += f"than {DRIFT:.0%}"
        return Result(case, drift=moved, discarded=discarded + 1, left_out=left_out, plan=plan)
    timings = {
        name: Timing.of([value / len(copies) for value in values])
        for name, values in seconds.items()
    }
    return Result(case, timings, moved, discarded, left_out, plan)


def first_line(error: BaseException) -> str:
    """Of its message; compilers' go on for pages."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


# --------------------------------------------------------------------------------------- program


PEERS = (PEFT, COMPILED, UNSLOTH, LORA_FUSION)
"""Whose time is told over ours."""


def table(results: Sequence[Result]) -> str:
    """Microseconds of each peer (median, quartiles) and what matters between them; below it what
    was left out, and why."""
    heads = [f"{name}/ours" for name in ("PEFT", "compiled", "Unsloth", "LoRAFusion")]
    lines = [
        f"{'M×N×K, forward (+ backward from M=512)':40} {'frozen µs':>10} {'ours µs':>10} "
        f"{'quartiles':>17} {'ours/frozen':>12}" + "".join(f" {head:>15}" for head in heads)
    ]
    for r in results:
        if CASE in r.left_out:
            lines.append(f"{r.case!s:40} left out: {r.left_out[CASE]}")
            continue
        ours = r.timings[OURS]
        ratios = [r.ratio(name, OURS) for name in PEERS]
        shown = "".join(f" {'—' if ratio is None else f'{ratio:.3f}':>15}" for ratio in ratios)
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
    cases: Sequence[Case],
    measure_one: Callable[[Case], Result],
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
            "machine": facts, "delta_linear": [r.as_json() for r in results], "not_reached": over,
        }  # fmt: skip
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
