"""Time and memory of calls on a GPU: in turns, as CUDA graphs, thrown away where the GPU drifts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

from .gpu_subject import FROZEN, Call

DRIFT = 0.02
"""How far the frozen layer may move between the halves of a run."""
ATTEMPTS = 3


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
