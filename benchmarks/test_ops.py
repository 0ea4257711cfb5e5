"""Each op, shape, dtype and peer by pytest-benchmark, after the gate:  pytest benchmarks

A group is one setting, so `--benchmark-group-by=group` (the default) sets its peers side by side.
For ratios take `deltaops bench`: there the peers are interleaved, here each is timed on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from deltaops.measure import layers
from deltaops.measure.cases import DTYPES, OPS, QUICK_SHAPES, LayerCase
from deltaops.measure.cell import EAGER, FROZEN, OURS, OWN_FROZEN, PEFT, PEFT_NARROW, PREPACKED
from deltaops.measure.gate import hold_layer

# an extra: whoever tests without timing need not have it
pytest.importorskip("pytest_benchmark", reason="pip install '.[bench]'")

PEERS = {
    "lora": (FROZEN, OWN_FROZEN, OURS, PEFT, PEFT_NARROW, PREPACKED),
    "parallel": (EAGER, OURS),
    "sequential": (EAGER, OURS),
    "bitfit": (EAGER, OURS),
}
Case = tuple[str, tuple[int, int, int], str, float]


def settings() -> Iterator[Case]:
    """Op, shape, dtype and dropout of every group."""
    for op in OPS:
        for dtype in DTYPES:
            for shape in QUICK_SHAPES:
                for dropout in (0.0, 0.1) if op == "lora" else (0.0,):
                    yield op, shape, dtype, dropout


@pytest.mark.parametrize(
    ("setting", "peer"),
    [
        pytest.param(s, peer, id=f"{s[0]}-{'x'.join(map(str, s[1]))}-{s[2]}-p{s[3]:g}-{peer}")
        for s in settings()
        for peer in PEERS[s[0]]
    ],
)
def test_forward_and_backward(setting: Case, peer: str, benchmark: Any) -> None:
    op, shape, dtype, dropout = setting
    case = LayerCase.of(op, shape, dtype)
    runs, absent = layers.peers(case, dropout)
    if peer not in runs:  # such as bf16 adapters in float32, or oneDNN without BF16 instructions
        pytest.skip(absent.get(peer, f"{peer} has no {dtype} form of its own"))
    run: Callable[[], object] = runs[peer]
    if peer not in (FROZEN, OWN_FROZEN):
        ours = [runs[peer]] if peer == OURS else []
        others = {} if peer == OURS or dropout else {peer: runs[peer]}
        hold_layer(case, dropout, ours, others)
    benchmark.group = f"{op} {'×'.join(map(str, shape))} {dtype} dropout {dropout:g}"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
