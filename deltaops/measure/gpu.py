"""The Triton backend on a GPU beside the frozen layer, PEFT, and two published plans.

    python3 -P -m deltaops.measure.gpu --out benchmarks/results        (`make gpu` ends with it)

Each case passes a gate against float64 first, ours and the plans of :mod:`.published` alike. Then
the peers run in turns: each as one CUDA graph over enough copies of its operands that none is found
in the cache, timed with CUDA events. A run in which the frozen layer drifts is thrown away and
repeated. What a call needs at its peak, beyond what was there, is taken once for each peer, before
the timing. What is measured is in :mod:`.gpu_linear`, :mod:`.gpu_group` and :mod:`.gpu_attention`,
all of it in bf16.

What has no number has a reason, in the JSON and in the table: a peer that is no CUDA graph, or for
which there is too little memory; a case that drifts in every attempt, does not fit, fails or is
wrong. After each case the JSON is written.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .gpu_attention import PrefixCase
from .gpu_clock import ATTEMPTS, DRIFT, captured, ceilings, cuda_clock, cuda_peak, steady
from .gpu_group import GroupCase
from .gpu_linear import Case
from .gpu_subject import (
    COMPILED,
    DEFAULT,
    FROZEN,
    LORA_FUSION,
    OURS,
    PEFT,
    UNSLOTH,
    Call,
    Subject,
)
from .interleave import Timing

CACHE_BYTES = 180e6
"""What the rotated operands hold at least: more than any L2 cache."""
CASE = "case"
"""In what was left out: all of it."""
CONTEXT_LOST = 3
"""An exit code: a kernel left the GPU's context unusable, in a new process the rest may go on."""
NO_MEMORY = "too little memory on the GPU"


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

PEERS = (PEFT, DEFAULT, COMPILED, UNSLOTH, LORA_FUSION)
"""Whose time is told over ours."""


def table(results: Sequence[Result]) -> str:
    """Microseconds of each peer (median, quartiles) and what matters between them; below it what
    was left out, and why."""
    heads = [f"{name}/ours" for name in ("PEFT", "default", "compiled", "Unsloth", "LoRAFusion")]
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
