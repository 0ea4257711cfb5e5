"""Run by test_interpreted.py in a process of its own: the kernels in Triton's interpreter.

Usage: TRITON_INTERPRET=1 python interpreted.py NUMBER routed:NUMBER prefix:NUMBER tuning rows:I/N
linears:I/N persistent:NUMBER decode:NUMBER typed:NUMBER merged:NUMBER …
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton.runtime.interpreter as interpreter
from deltaops.kernels import configs

from deltaops.backends.triton import TritonBackend, beside, core, planner
from deltaops.backends.triton.record import recording
from deltaops.backends.triton.tables import PLANS
from deltaops.backends.triton.traffic import traffic
from deltaops.errors import DataError
from deltaops.measure import published, tune_kernels
from deltaops.ops.delta_linear import draw_seed
from deltaops.reference import delta_linear as reference
from deltaops.reference import prefix_attention as prefix_reference
from deltaops.reference.philox import draws
from deltaops.testing import (
    DELTA_LINEAR_CASES,
    PREFIX_ATTENTION_CASES,
    ROUTED_CASES,
    DeltaLinearCase,
    assert_accurate,
)

sys.path.append(str(Path(__file__).parent))  # which -P takes off
import linears
import merged
import rows
from rows import bordered, guarded


def mend_interpreter() -> None:
    """NumPy ≥ 2.4 refuses int() of Triton's one-element arrays, which `range` in a kernel needs.

    And a function that a kernel calls replaces Triton's language once more, each time: a launch has
    done so for what kernels see of it, and once is enough for what Triton's own functions see.
    """
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    known: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in known:
            interpreter._patch_lang(self.fn)
            known.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


TALLY: Counter[str] = Counter()
"""Bytes loaded and stored and operations of products, as the interpreter makes them."""


def tally_interpreter() -> None:
    """Have the interpreter keep ``TALLY``."""
    builder = interpreter.InterpreterBuilder
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot

    def size(pointers: Any, mask: Any) -> int:
        return int(np.asarray(mask.data).sum()) * (
            pointers.get_element_ty().primitive_bitwidth // 8
        )

    def tally_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        TALLY["loaded"] += size(pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def tally_store(
        self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any
    ) -> Any:
        TALLY["stored"] += size(pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    def tally_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        TALLY["operations"] += 2 * a.data.shape[0] * b.data.shape[1] * a.data.shape[1]
        return dot(self, a, b, *rest)

    builder.create_masked_load = tally_load
    builder.create_masked_store = tally_store
    builder.create_dot = tally_dot


def as_modelled(call: Callable[[], Any], what: str) -> Any:
    """Run ``call``; what its kernels load, store and multiply is what the traffic model says."""
    TALLY.clear()
    with recording(execute=True) as launches:
        result = call()
    kernels = [launch for launch in launches if not launch.kernel.startswith("torch.")]
    modelled = [traffic(launch) for launch in kernels]
    for name in ("loaded", "stored", "operations"):
        count = sum(getattr(one, name) for one in modelled)
        names = [launch.kernel for launch in kernels]
        assert TALLY[name] == count, f"{what}: {name} {TALLY[name]}, modelled {count}: {names}"
    return result


def other_plan(number: int, mask: bool) -> tuple[str, str] | None:
    """Some cases go the other ways as well; a mask is not the library's to make."""
    if number % 3 == 2:
        return None
    forward, backward = ("split", "torch") if number % 3 else ("torch", "split")
    return forward, "split" if mask else backward


HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
TYPED = (
    # the model's dtype and the adapter's; all lanes of a rank, and several blocks of them
    (DeltaLinearCase(20, 33, 40, (128,), (0.3,)), FULL, FULL),
    (DeltaLinearCase(17, 40, 24, (130,), bias=False), FULL, FULL),
    (DeltaLinearCase(40, 48, 64, (16,), (0.2,)), HALF, HALF),
    (DeltaLinearCase(35, 30, 43, (24, 3), (0.2, 0.0), padding=5), HALF, FULL),
    (DeltaLinearCase(40, 48, 64, (8,), (0.2,), layout="col"), BRAIN, FULL),
    (DeltaLinearCase(33, 41, 64, (16, 5), routed="mixed"), BRAIN, BRAIN),
)


def check_case(
    number: int,
    cases: tuple[DeltaLinearCase, ...] = DELTA_LINEAR_CASES,
    dtype: torch.dtype = FULL,
    adapter: torch.dtype = FULL,
) -> None:
    """Forward and every gradient against float64, twice, between borders of NaN and into poisoned
    memory; then once more by another plan."""
    case, run = cases[number], TritonBackend()
    t = case.tensors(dtype, adapter_dtype=adapter)
    wide, grad_y = t.to(torch.float64), case.grad_y(dtype)
    between = replace(
        t,
        x=bordered(t.x),
        weight=bordered(t.weight),
        bias=bordered(t.bias),
        a=[*map(bordered, t.a)],
        b=[*map(bordered, t.b)],
        branch_bias=[*map(bordered, t.branch_bias)],
    )
    needs = t.all_needed()
    y64, s64 = reference.forward(*wide.forward_arguments())
    y32, s32 = reference.forward(*t.forward_arguments())
    rest = needs, *t.by_row()
    oracle = [
        y64,
        s64,
        *t.joined(reference.backward(*wide.backward_arguments(grad_y.double(), s64), *rest)),
    ]
    baseline = [y32, s32, *t.joined(reference.backward(*t.backward_arguments(grad_y, s32), *rest))]

    def results() -> list[torch.Tensor]:
        with guarded():
            y, s = run.forward(*between.forward_arguments())
            given = between.backward_arguments(bordered(grad_y), bordered(s))
            return [y, s, *t.joined(run.backward(*given, *rest))]

    def check(found: list[torch.Tensor], what: str) -> None:
        for i, (got, want, low) in enumerate(zip(found, oracle, baseline, strict=True)):
            assert_accurate(got, want, low, f"{what}: result {i}")

    with planner.forced("fused", "fused"):
        found, again = as_modelled(results, str(case)), results()
    check(found, str(case))
    for i, (got, same) in enumerate(zip(found, again, strict=True)):
        assert torch.equal(got, same), f"{case}: result {i} changed its bits"
    mixed = dtype != adapter and bool(case.ranks)
    if (plan := other_plan(number, any(case.dropout))) and not mixed:
        by_bytes = configs.reads_dy_twice
        configs.reads_dy_twice = lambda *args: True  # bytes would decide so for half types only
        with planner.forced(*plan):
            check(as_modelled(results, f"{case} {plan}"), f"{case} {plan}")
        configs.reads_dy_twice = by_bytes


PERSISTENT = (
    # ragged in every length: tiles and steps left over, and a rank of two steps
    (DeltaLinearCase(264, 144, 144, (80,), padding=16), torch.bfloat16),
    (DeltaLinearCase(257, 136, 200, (8,), (0.3,), bias=False), torch.float16),
    # the tall table, whose tiles are stored in two parts; the only tile of columns is not full
    (DeltaLinearCase(1030, 136, 72, (16,)), torch.bfloat16),
)


def check_persistent(number: int) -> None:
    """As :func:`check_case`, in a half type, which tensor descriptors are for; y and dx, dA beside
    dx where there is no mask, with dB, and once dB before it with db."""
    case, dtype = PERSISTENT[number]
    t, run = case.tensors(dtype), TritonBackend()
    wide, grad_y = t.to(torch.float64), case.grad_y(dtype)
    plain = not case.dropout
    of_dy = plain and case.m > 1024
    needs = [True, of_dy, plain, plain, False]

    def results(forward: Any, backward: Any, t: Any, grad_y: torch.Tensor) -> list[torch.Tensor]:
        y, s = forward(*t.forward_arguments())
        return [y, *backward(*t.backward_arguments(grad_y, s), needs)]

    with (
        planner.forced("persistent", "beside" if plain else "persistent"),
        mock.patch.object(core, "multiprocessors", return_value=132),
        mock.patch.multiple(beside, LEAST_ROWS_OF_BOTH=0, MOST_RANK_OF_BOTH=128),
    ):
        found, again = (
            as_modelled(lambda: results(run.forward, run.backward, t, grad_y), str(case))
            for _ in range(2)
        )
    sound = reference.forward, reference.backward
    oracle, low = results(*sound, wide, grad_y.double()), results(*sound, t, grad_y)
    for i, (got, same, want, eager) in enumerate(zip(found, again, oracle, low, strict=True)):
        assert_accurate(got, want, eager, f"{case} {dtype}: result {i}")
        assert torch.equal(got, same), f"{case}: result {i} changed its bits"


DECODE = (
    # S within, of lanes filled and not; then from sums over pieces of K, of which some are empty
    (DeltaLinearCase(1, 70, 130, (16,)), BRAIN),
    (DeltaLinearCase(7, 70, 90, (1,), bias=False), FULL),
    (DeltaLinearCase(16, 64, 64, (8,), layout="col"), FULL),
    (DeltaLinearCase(16, 130, 150, (24,), padding=3), HALF),
    (DeltaLinearCase(13, 40, 270, (64,)), FULL),
    (DeltaLinearCase(16, 96, 528, (40,), bias=False), BRAIN),
)


def check_decode(number: int) -> None:
    """As :func:`check_case`, of y and S."""
    case, dtype = DECODE[number]
    t, run = case.tensors(dtype), TritonBackend()
    between = replace(
        t, **{name: bordered(getattr(t, name)) for name in ("x", "weight", "bias")},
        a=[bordered(t.a[0])], b=[bordered(t.b[0])],
    )  # fmt: skip

    def results() -> list[torch.Tensor]:
        with guarded():
            return list(run.forward(*between.forward_arguments()))

    with planner.forced("decode", "fused"):
        found, again = as_modelled(results, str(case)), results()
    oracle = reference.forward(*t.to(torch.float64).forward_arguments())
    low = reference.forward(*t.forward_arguments())
    for i, (got, same, want, eager) in enumerate(zip(found, again, oracle, low, strict=True)):
        assert_accurate(got, want, eager, f"decode {case} {dtype}: result {i}")
        assert torch.equal(got, same), f"decode {case}: result {i} changed its bits"


def check_published(dropout: float) -> None:
    """LoRAFusion's plan, a peer of the GPU benchmark, against float64, with the same mask."""
    case = DeltaLinearCase(37, 40, 70, (19,), (dropout,), bias=False)
    grad_y, needs = case.grad_y(torch.float32), [True, False, True, True, False]
    torch.manual_seed(1)
    t = replace(case.tensors(torch.float32), seed=draw_seed(grad_y.device))
    results = []
    for one, dy in ((t.to(torch.float64), grad_y.double()), (t, grad_y)):
        y, s = reference.forward(*one.forward_arguments())
        results.append([y, *reference.backward(*one.backward_arguments(dy, s), needs)])
    x, a, b = (v.requires_grad_() for v in (t.x, t.a[0], t.b[0]))

    def call() -> list[torch.Tensor]:
        torch.manual_seed(1)
        y = published.lora_fusion(x, t.weight, a, b, t.scaling[0], dropout)
        return [y, *torch.autograd.grad(y, [x, a, b], grad_y)]

    for i, (got, want, low) in enumerate(zip(as_modelled(call, str(case)), *results, strict=True)):
        assert_accurate(got, want, low, f"LoRAFusion's plan {case}: result {i}")


HALVES = {3: BRAIN, 5: HALF, 12: HALF}
"""Cases of prefix attention that go in a half type too; of the last two the prefix is float32."""


def check_prefix_attention(number: int, dtype: torch.dtype = FULL) -> None:
    """As :func:`check_case`, of the other table; of many keys, some tiles say all."""
    case, run = PREFIX_ATTENTION_CASES[number], TritonBackend()
    if case.rest.l_kv > 170:
        case = replace(case, rest=replace(case.rest, l_kv=170))
    t, grad_y = case.tensors(dtype), case.grad_y(dtype)

    def results(forward: Any, backward: Any, t: Any, grad_y: torch.Tensor) -> list[torch.Tensor]:
        y, lse = forward(*t.forward_arguments())
        *grads, of_k, of_v = backward(*t.backward_arguments(grad_y, y, lse), [True] * 5)
        # exp: a query that sees nothing has an infinite lse. Both together: the gradient of a
        # single key is so few numbers that their error is luck
        return [y, torch.exp(-lse), *grads, torch.cat([of_k, of_v])]

    kernels = run.prefix_attention_forward, run.prefix_attention_backward
    plain = prefix_reference.forward, prefix_reference.backward
    with guarded():
        found = as_modelled(lambda: results(*kernels, t, grad_y), str(case))
        again = results(*kernels, t, grad_y)
    oracle = results(*plain, t.to(torch.float64), grad_y.double())
    for i, (got, same, want, low) in enumerate(
        zip(found, again, oracle, results(*plain, t, grad_y), strict=True)
    ):
        assert_accurate(got, want, low, f"{case}: result {i}")
        assert torch.equal(got, same), f"{case}: result {i} changed its bits"


def check_tuning() -> None:
    """Each plan passes the gate of tune-kernels and is timed; one with wrong numbers is not."""
    setting = planner.setting_of(torch.float32, (torch.float32,), 8, 16, 16, (3,), True)
    settings: dict[str, Any] = {
        "device": "cpu", "rounds": 2, "capture": lambda call: call, "cache_bytes": 0,
        "clock": lambda call: float(bool(call())),
    }  # fmt: skip
    few = tune_kernels.measure(setting._replace(dropout=False), TritonBackend(), **settings)
    assert list(few.entry.seconds["forward"]) == [*PLANS[:3], "decode"]
    seconds = tune_kernels.measure(setting, TritonBackend(), **settings).entry.seconds
    assert list(seconds["forward"]) == list(PLANS[:3]), seconds
    assert list(seconds["backward"]) == ["fused", "split"], seconds

    class Wrong(TritonBackend):
        @staticmethod
        def forward(*args: Any) -> Any:
            y, s = TritonBackend.forward(*args)
            return 1.01 * y, s

    with pytest.raises(DataError, match="forward by the plan 'fused' is wrong"):
        tune_kernels.measure(setting, Wrong(), **settings)


def check_mask() -> None:
    """The mask is that of the reference, element by element."""
    from deltaops.kernels.dropout import dropout_mask

    seed = torch.tensor([-0x1234_5678_9ABC_DEF0])
    for stream in (0, 3):
        got = dropout_mask(37, 101, seed, stream, 20_000)
        assert torch.equal(got.bool(), draws(37, 101, seed, stream) >= 20_000)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1", "set it before Triton is imported"
    torch.set_num_threads(1)
    mend_interpreter()
    tally_interpreter()
    rows.mend_bfloat16()
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    torch.empty = poisoned
    check_mask()
    for argument in sys.argv[1:]:
        kind, _, number = argument.rpartition(":")
        if number == "tuning":
            check_tuning()
            check_published(0.0)
            check_published(0.3)
        elif kind == "rows":
            rows.check_share(number, as_modelled)
        elif kind == "linears":
            linears.check_share(number, as_modelled)
        elif kind == "routed":
            check_case(int(number), ROUTED_CASES)
        elif kind == "merged":
            merged.check(int(number), as_modelled)
        elif kind == "persistent":
            check_persistent(int(number))
        elif kind == "decode":
            check_decode(int(number))
        elif kind == "typed":
            case, dtype, adapter = TYPED[int(number)]
            check_case(0, (case,), dtype, adapter)
        elif kind == "prefix" and int(number) in HALVES:
            check_prefix_attention(int(number))
            check_prefix_attention(int(number), HALVES[int(number)])
        else:
            (check_prefix_attention if kind else check_case)(int(number))
