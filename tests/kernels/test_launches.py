"""What is launched: on which device, and of how many variants.

The launchers run on meta tensors, which have no values: what read one back, as a graph that is
captured must not, would raise.
"""

from __future__ import annotations

import ast
import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from torch import Tensor

from deltaops.backends.triton import core
from deltaops.backends.triton.targets import TARGETS
from deltaops.ops.attention_checks import checked_scale

sys.path.append(str(Path(__file__).parent))
import ahead as launched
import linears_ahead
import rows_ahead

ROOT = Path(__file__).resolve().parents[2]
Call = Callable[[], None]


def calls(scaling: float, dropout: float, plan: str) -> Iterator[Call]:
    """Of every op that is scaled or drops, both ways."""

    def linear(*words: Any, **more: Any) -> Call:
        setting = launched.Setting(*words, scaling=scaling, dropout=dropout, **more)
        return lambda: launched.launch(setting)

    if plan == "decode":
        for rank in (16, 64):
            setting = launched.Setting(8, (rank,), scaling=scaling)
            yield partial(launched.launch, setting)
        return
    yield linear(512, (16,))
    if plan == "persistent":
        return
    yield linear(8, (3, 20), activation="gelu")
    yield linear(64, (8, 8), routed=True, wanted="xb")
    yield linears_ahead.Group(512, (16, 8, 3), dropout=dropout, scaling=scaling)
    if plan == "fused":
        yield linears_ahead.DoraNorm(16, scaling=scaling)
        yield linears_ahead.Quantized(64, True, scaling=scaling, dropout=dropout)
        yield rows_ahead.Adapter(512, 4096, 16, scaling=scaling)
        yield lambda: launched.launch_attention(launched.Attention(64, scale=scaling))
        yield lambda: launched.launch_merged(launched.Attention(64, scale=scaling))


class Names(launched.Recorder):
    """Compiles nothing: ``found`` has a key for each variant."""

    def compile(self, source: Any, options: Any, bound: Any) -> dict[str, Any]:
        """What is not asked for."""
        return {}


@pytest.mark.parametrize("plan", ["fused", "split", "persistent", "decode"])
def test_alpha_and_p_are_run_time_arguments(plan: str) -> None:
    # of p, also thresholds that 16 divides, and that are 1
    values = [(2.0, 0.1), (1.0, 0.5), (3e-5, 2**-16)]
    recorder, counts = Names(TARGETS["sm_90"]), []
    with launched.compiling(recorder, TARGETS["sm_90"], plan):
        for value in values:
            for call in calls(*value, plan):
                call()
            counts.append(len(recorder.found))
    assert counts[0] > 1
    assert counts == counts[:1] * len(values)


def test_a_whole_number_as_scale_is_one_too() -> None:
    assert isinstance(checked_scale("attention", 1, torch.empty(1, 1, 1, 64)), float)


class Guarded(Names):
    """Refuses what is launched while some other GPU may be current."""

    def __init__(self) -> None:
        super().__init__(TARGETS["sm_90"])
        self.held: list[Tensor] = []

    @contextlib.contextmanager
    def device_of(self, tensor: Tensor) -> Iterator[None]:
        """Instead of ``core.device_of``."""
        self.held.append(tensor)
        yield
        self.held.pop()

    def run(self, fn: Any, *args: Any, **kwargs: Any) -> None:
        """See the head of this class."""
        assert self.held, f"{fn.__name__} is launched on whichever GPU is current"
        super().run(fn, *args, **kwargs)


@pytest.mark.parametrize("plan", ["fused", "split", "persistent", "decode"])
def test_every_launch_is_on_the_gpu_of_its_tensors(
    plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Guarded()
    monkeypatch.setattr(core, "device_of", recorder.device_of)
    with launched.compiling(recorder, TARGETS["sm_90"], plan):
        for call in calls(2.0, 0.1, plan):
            call()
        for call in rows_ahead.CALLS if plan == "fused" else ():
            call()
    assert len(recorder.found) > 1
    recorder.held.clear()
    with launched.compiling(recorder, TARGETS["sm_90"], plan):
        monkeypatch.setattr(core, "device_of", lambda tensor: contextlib.nullcontext())
        with pytest.raises(AssertionError, match="whichever GPU is current"):
            next(calls(2.0, 0.1, plan))()


def test_no_kernel_is_tuned_when_it_runs() -> None:
    decorators = [
        ast.unparse(decorator)
        for path in (ROOT / "kernels").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if "triton" in ast.unparse(decorator)
    ]
    assert len(decorators) > 30
    assert {decorator.partition("(")[0] for decorator in decorators} == {"triton.jit"}
