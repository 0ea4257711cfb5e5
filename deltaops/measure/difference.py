"""Where a step loses time to another one: the operators of both, by torch's profiler."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]
STEPS, SHOWN = 3, 3


def difference(slow: Run, fast: Run, against: str = "eager torch's") -> str:
    """In words: the operators that take more of ``slow`` than of ``fast``, and the other way round.

    Times are those of the operators themselves, without what they call, on the calling thread.
    """
    here, there = _operators(slow), _operators(fast)
    more = {name: here.get(name, 0.0) - there.get(name, 0.0) for name in here.keys() | there.keys()}
    order = sorted(more, key=lambda name: -more[name])
    ours = ", ".join(f"{n} +{more[n]:.1f} ms" for n in order[:SHOWN] if more[n] > 0)
    theirs = ", ".join(f"{n} {more[n]:.1f} ms" for n in order[: -SHOWN - 1 : -1] if more[n] < 0)
    said = "; ".join(words for words in (ours, theirs) if words) or "no operator differs"
    return f"a profiled step against {against}: {said}"


def _operators(run: Run) -> dict[str, float]:
    """Name → milliseconds a step."""
    run()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it writes a line at each start and stop
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(STEPS):
            run()
    return {event.key: 1e-3 * event.self_cpu_time_total / STEPS for event in found.key_averages()}
