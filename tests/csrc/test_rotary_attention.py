"""Attention that turns its queries and keys, through the C ABI: against the formula in float64."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from .test_attention_core import (
    GRADS,
    ROUNDING,
    Attention,
    BackwardArgs,
    Case,
    ForwardArgs,
    exact,
    formula,
    make,
    off,
)

CASES = [  # B, H, Hkv, L, L, D; the way, the prefix, whether the batch shares the angles
    ((2, 2, 1, 50, 50, 20), "causal", 0, True),
    ((1, 2, 2, 150, 150, 64), "causal", 5, True),
    ((2, 3, 3, 140, 140, 6), "mask", 0, False),
    ((12, 1, 1, 7, 7, 34), "all", 3, False),
    ((2, 0, 0, 7, 7, 8), "all", 0, True),
]
DTYPES = [("f32", "f32"), ("bf16", "f32"), ("bf16", "bf16")]


class Tables(ctypes.Structure):
    _fields_ = [
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("strides", c_int64 * 2),
        ("dtype", c_int32),
        ("reserved", c_int32),
    ]


def angles(helper: ModuleType, case: Case, shared: bool, dtype: str) -> np.ndarray:
    """cos and sin ``[2, B or 1, L, D]``; any numbers will do."""
    b, _, _, length, _, d = case.sizes
    both = np.random.default_rng(3).standard_normal((2, 1 if shared else b, length, d))
    both = both.astype(np.float32)
    return helper.to_bf16(both) if dtype == "bf16" else both


def tables_of(both: np.ndarray, **changes: Any) -> Tables:
    cos, sin = both
    of_batch, of_token = (step // both.itemsize for step in cos.strides[:2])
    strides = (0 if len(cos) == 1 else of_batch, of_token)
    tables = Tables(cos.ctypes.data, sin.ctypes.data, strides, int(both.dtype == np.uint16), 0)
    for name, value in changes.items():
        setattr(tables, name, value)
    return tables


def turn(x: np.ndarray, both: np.ndarray) -> np.ndarray:
    cos, sin = both[:, :, None]
    first, second = np.split(x, 2, -1)
    return x * cos + np.concatenate([-second, first], -1) * sin


def turn_back(grad: np.ndarray, both: np.ndarray) -> np.ndarray:
    cos, sin = both[:, :, None]
    first, second = np.split(grad * sin, 2, -1)
    return grad * cos + np.concatenate([second, -first], -1)


def run(
    core: Any, case: Case, tables: Tables | None, threads: int = 2, **changes: Any
) -> list[int]:
    """The status of either direction."""
    given = None if tables is None else ctypes.byref(tables)
    statuses = []
    for kind, name in ((ForwardArgs, "forward"), (BackwardArgs, "backward")):
        args = Attention._args(kind, case, threads, changes)
        call = getattr(core.lib, f"deltaops_cpu_rotary_attention_{name}")
        statuses.append(int(call(ctypes.byref(args), given)))
    return statuses


@pytest.mark.parametrize(("dtype", "table_dtype"), DTYPES, ids="-".join)
def test_matches_float64_for_any_team(
    core: Any, core_module: ModuleType, dtype: str, table_dtype: str
) -> None:
    for sizes, way, prefix, shared in CASES:
        case = make(core_module, sizes, dtype, way, prefix)
        assert case is not None
        both = angles(core_module, case, shared, table_dtype)
        wide = core_module.to_f64(both)
        q, k = (turn(core_module.to_f64(t), wide) for t in (case.q, case.k))
        want = exact(core_module, replace(case, q=q, k=k))
        low = formula(
            replace(case, q=q, k=k),
            lambda t: core_module.to_f64(t).astype(np.float32),
            core_module.to_bf16 if dtype == "bf16" else lambda y: y,
        )
        for name in ("grad_q", "grad_k"):
            want[name], low[name] = turn_back(want[name], wide), turn_back(low[name], wide)
        bits = set()
        for threads in (1, 2, 3):
            case = replace(case)
            assert run(core, case, tables_of(both), threads) == [0, 0], core.error()
            bits.add(b"".join(t.tobytes() for t in (*case.results().values(), case.lse)))
        assert len(bits) == 1, sizes
        for name, result in case.results().items():
            rounding = ROUNDING["bf16" if result.dtype == np.uint16 else "f32"]
            bound = 2 * (off(low[name], want[name]) + rounding)
            assert off(core_module.to_f64(result), want[name]) <= bound, (sizes, name)


S6 = c_int64 * 6
WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "oblong": (
        {"sizes": S6(2, 2, 1, 4, 5, 6)},
        {},
        "tables need as many queries as keys, got Lq=4",
    ),
    "odd": ({"sizes": S6(2, 2, 1, 5, 5, 5)}, {}, "D must be even to be turned, got 5"),
    "dtype": ({}, {"dtype": 1}, "tables' dtype must be 0 (f32) or that of q, 0, got 1"),
    "reserved": ({}, {"reserved": 1}, "tables' reserved must be 0, got 1"),
    "cos": ({}, {"cos": None}, "cos must point to its elements"),
    "sin": ({}, {"sin": None}, "sin must point to its elements"),
}


@pytest.mark.parametrize(("changes", "of_tables", "sentence"), WRONG.values(), ids=WRONG)
def test_bad_tables_end_in_a_status_and_change_nothing(
    core: Any,
    core_module: ModuleType,
    changes: dict[str, Any],
    of_tables: dict[str, Any],
    sentence: str,
) -> None:
    case = make(core_module, (2, 2, 1, 5, 5, 6), "f32")
    assert case is not None
    tables = tables_of(angles(core_module, case, True, "f32"), **of_tables)
    assert run(core, case, tables, **changes) == [1, 1]
    assert core.error().startswith(f"rotary_attention_backward: {sentence}")
    assert all(np.isnan(result).all() for result in case.results().values())


def test_tables_are_wanted_and_read_alone(core: Any, core_module: ModuleType) -> None:
    case = make(core_module, (2, 2, 1, 5, 5, 6), "f32")
    assert case is not None
    assert run(core, case, None) == [1, 1]
    assert core.error().startswith("rotary_attention_backward: tables must not be NULL")
    both = angles(core_module, case, True, "f32")
    for name in GRADS:
        tables = tables_of(both, sin=getattr(case, name).ctypes.data)
        assert run(core, case, tables)[1] == 1
        assert f"{name} is written, so it must not overlap sin" in core.error()
