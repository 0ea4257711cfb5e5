"""The C ABI of the CPU core against numpy float64, for every instruction set that can run here."""

from __future__ import annotations

import functools
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

Builds = dict[str, tuple[Path, list[Path]]]

SHAPES = [(1, 1, 1), (3, 17, 5), (1, 70, 300), (8, 64, 33), (9, 13, 31), (131, 50, 301),
          (260, 129, 521), (17, 67, 1100), (0, 5, 3), (4, 0, 3), (4, 5, 0)]  # fmt: skip


class Spec(NamedTuple):
    """A branch to make; ``activation`` as csrc/include/deltaops.h numbers them."""

    rank: int
    threshold: int = 0
    activation: int = 0
    bias: bool = False


BRANCHES = {
    "none": [],
    "rank4": [Spec(4)],
    "rank1-dropout": [Spec(1, 6554)],
    "four": [Spec(8), Spec(3, 30000), Spec(17), Spec(5, 65536)],
    "rank40": [Spec(40)],
    "adapters": [Spec(5, 0, 1, True), Spec(17, 9000, 2), Spec(4), Spec(1, 0, 3, True),
                 Spec(16, 0, 4, True)],
    "all-dropped": [Spec(3, 65536, 4, True), Spec(2, 65536, 0, True)],
}  # fmt: skip
ERF = np.vectorize(math.erf, otypes=[float])
ACTIVATE: list[Callable[[np.ndarray], np.ndarray]] = [
    lambda h: h,
    lambda h: np.maximum(h, 0),
    lambda h: h * (1 + ERF(h / math.sqrt(2))) / 2,
    lambda h: h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))) / 2,
    lambda h: h / (1 + np.exp(-h)),
]
# Float sums against float64, relative to the largest element; bf16 adds one rounding, 2^-9 of it.
TOLERANCE = {"f32": 2e-5, "bf16": 2.0**-8}


def make(helper: ModuleType, shape: tuple[int, int, int], spec: list[Spec], *,
         dtype: str, adapters: str, layout: str, seed: int = 0) -> Any:  # fmt: skip
    rng = np.random.default_rng(seed)
    m, n, k = shape

    def random(rows: int, cols: int, kind: str) -> np.ndarray:
        x = rng.standard_normal((rows, cols)).astype(np.float32)
        return helper.to_bf16(x) if kind == "bf16" else x

    x = random(m, k + 3, dtype)[:, :k]  # strided rows
    weight = random(n, k, dtype) if layout == "row" else random(k, n, dtype).T
    bias = random(1, n, dtype)
    branches = [
        helper.Adapter(random(r, k, adapters), random(n, r, adapters), 0.5, t, activation,
                       random(1, r, adapters) if biased else None)
        for r, t, activation, biased in spec
    ]  # fmt: skip
    return helper.Layer(x, weight, bias, branches)


def guarded(rows: int, cols: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """A NaN-poisoned [rows, cols] view inside a larger buffer, and that buffer."""
    nan = 0x7FC1 if dtype == "bf16" else np.nan
    kind = np.uint16 if dtype == "bf16" else np.float32
    whole = np.full((rows + 2, cols + 5), nan, kind)
    return whole[1 : rows + 1, 2 : cols + 2], whole


def poisoned(rows: int, cols: int, dtype: str) -> np.ndarray:
    kind, nan = (np.uint16, 0x7FC1) if dtype == "bf16" else (np.float32, np.nan)
    return np.full((rows, cols), nan, kind)


def assert_close(helper: ModuleType, got: np.ndarray, want: np.ndarray, dtype: str) -> None:
    bound = TOLERANCE[dtype] * max(1.0, float(np.abs(want).max(initial=0.0)))
    np.testing.assert_allclose(helper.to_f64(got), want, rtol=0, atol=bound)


class Part(NamedTuple):
    """What the branch of ``adapter`` does, in float64."""

    adapter: Any
    kept: np.ndarray  # the mask, times dropout's scale
    saved: np.ndarray  # what the forward pass leaves for the backward pass
    up: np.ndarray  # what goes into B
    slope: np.ndarray


def expected(helper: ModuleType, layer: Any) -> tuple[np.ndarray, list[Part]]:
    x, f64 = helper.to_f64(layer.x), helper.to_f64
    y = x @ f64(layer.weight).T + f64(layer.bias)
    parts = []
    for i, adapter in enumerate(layer.adapters):
        keep = helper.philox_keep(*x.shape, layer.seed, i, adapter.threshold)
        kept = keep * (65536 / max(1, 65536 - adapter.threshold))
        h = (x * kept) @ f64(adapter.a).T
        if adapter.bias is not None:
            h = h + f64(adapter.bias)
        act, step = ACTIVATE[adapter.activation], 1e-6
        up = adapter.scaling * act(h)
        slope = (act(h + step) - act(h - step)) / (2 * step)
        y = y + up @ f64(adapter.b).T
        parts.append(Part(adapter, kept, h if adapter.activation else up, up, slope))
    return y, parts


def saved(parts: list[Part], m: int) -> np.ndarray:
    return np.concatenate([np.zeros((m, 0)), *(part.saved for part in parts)], 1)


@functools.cache
def known(helper: ModuleType, shape: tuple[int, int, int], spec: tuple[Any, ...], dtype: str,
          adapters: str, layout: str) -> tuple[Any, np.ndarray, list[Part]]:  # fmt: skip
    """A layer and what is expected of it, made once for all instruction sets and both passes."""
    layer = make(helper, shape, list(spec), dtype=dtype, adapters=adapters, layout=layout)
    return layer, *expected(helper, layer)


KINDS = [("f32", "f32"), ("bf16", "bf16"), ("bf16", "f32")]
matrix_of_cases = [
    pytest.mark.parametrize("spec", list(BRANCHES.values()), ids=list(BRANCHES)),
    pytest.mark.parametrize(("dtype", "adapters"), KINDS, ids=lambda k: k),
]


def with_layouts(spec: Any) -> list[tuple[tuple[int, int, int], str]]:
    """Every shape, layouts in turn: over the sets of branches each shape meets both."""
    start = list(BRANCHES.values()).index(spec)
    return [(shape, ("row", "col")[(start + i) % 2]) for i, shape in enumerate(SHAPES)]


def every_case(test: Any) -> Any:
    for mark in matrix_of_cases:
        test = mark(test)
    return test


@every_case
def test_forward_matches_float64_and_writes_nothing_else(
    core: Any, core_module: ModuleType, dtype: str, adapters: str, spec: Any
) -> None:
    for shape, layout in with_layouts(spec):
        m, n, _ = shape
        layer, want, parts = known(core_module, shape, tuple(spec), dtype, adapters, layout)
        before = [layer.x.copy(), layer.weight.copy()]
        y, y_buffer = guarded(m, n, dtype)
        s, s_buffer = guarded(m, sum(r for r, *_ in spec), "f32")
        bits = y_buffer.copy()
        assert core.forward(layer, y, s, threads=3) == 0, core.error()
        assert_close(core_module, y, want, dtype)
        assert_close(core_module, s, saved(parts, m), "f32")
        inner = np.zeros(y_buffer.shape, bool)
        inner[1 : m + 1, 2 : n + 2] = True
        np.testing.assert_array_equal(y_buffer[~inner], bits[~inner])
        assert np.isnan(s_buffer).sum() == s_buffer.size - s.size
        np.testing.assert_array_equal(layer.x, before[0])
        np.testing.assert_array_equal(layer.weight, before[1])


@every_case
def test_backward_matches_float64(
    core: Any, core_module: ModuleType, dtype: str, adapters: str, spec: Any
) -> None:
    f64 = core_module.to_f64
    for shape, layout in with_layouts(spec):
        m, n, k = shape
        layer, _, parts = known(core_module, shape, tuple(spec), dtype, adapters, layout)
        s = saved(parts, m).astype(np.float32)
        grad_y = make(core_module, (m, 1, n), [], dtype=dtype, adapters=adapters, layout="row",
                      seed=1).x  # fmt: skip
        grad_x, grad_bias = guarded(m, k, dtype)[0], poisoned(1, n, dtype)
        grad_a = [poisoned(r, k, adapters) for r, *_ in spec]
        grad_b = [poisoned(n, r, adapters) for r, *_ in spec]
        grad_inner = [poisoned(1, r, adapters) if biased else None for r, *_, biased in spec]
        status = core.backward(
            layer, grad_y, s, grad_x, grad_bias, grad_a, grad_b, grad_inner, threads=3
        )
        assert status == 0, core.error()
        g, x = f64(grad_y), f64(layer.x)
        want = g @ f64(layer.weight)
        for i, part in enumerate(parts):
            dh = part.adapter.scaling * g @ f64(part.adapter.b) * part.slope
            want = want + part.kept * (dh @ f64(part.adapter.a))
            assert_close(core_module, grad_a[i], dh.T @ (x * part.kept), adapters)
            assert_close(core_module, grad_b[i], g.T @ part.up, adapters)
            if part.adapter.bias is not None:
                assert_close(core_module, grad_inner[i], dh.sum(0, keepdims=True), adapters)
        assert_close(core_module, grad_x, want, dtype)
        assert_close(core_module, grad_bias, g.sum(0, keepdims=True), dtype)


@pytest.mark.parametrize("activation", range(1, 5))
def test_activations_are_right_to_a_few_roundings(
    core: Any, core_module: ModuleType, activation: int
) -> None:
    # 1 x 1 matrices of one, beside a weight of zero: y is the activation of x, grad_x its slope
    one, zero = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
    h = np.linspace(-30, 30, 6001, dtype=np.float32)
    h = np.concatenate([h, np.float32([0.0, -0.0, 1e-30, -1e-7, 90, -90, 1e20, -1e20, np.nan])])
    layer = core_module.Layer(
        h[:, None], zero, None, [core_module.Adapter(one, one, 1.0, 0, activation)]
    )
    y, s, slope = (poisoned(h.size, 1, "f32") for _ in range(3))
    assert core.forward(layer, y, s) == 0, core.error()
    ones = np.ones_like(y)
    assert core.backward(layer, ones, s, slope, None, [None], [None]) == 0, core.error()
    wide, act, step = h.astype(np.float64), ACTIVATE[activation], 1e-6
    with np.errstate(over="ignore"):  # exp(1e20)
        want = act(wide)
        want_slope = (act(wide + step) - act(wide - step)) / (2 * step)
    np.testing.assert_array_equal(s[:, 0], h)
    np.testing.assert_allclose(y[:, 0], want, rtol=4e-7, atol=4e-7)
    assert np.isnan(y[-1, 0])
    # elsewhere the difference quotient has no digits, or meets the corner of relu
    plain = (np.abs(h) < 1e3) & (np.abs(h) > 1e-5)
    np.testing.assert_allclose(slope[plain, 0], want_slope[plain], rtol=0, atol=4e-7)
    np.testing.assert_allclose(slope[-3:-1, 0], [1, 0], atol=1e-12)
    np.testing.assert_array_equal(slope[h == 0], 0.0 if activation == 1 else 0.5)


@pytest.mark.parametrize("activation", [0, 4], ids=["lora", "silu"])
def test_backward_computes_only_what_is_asked(
    core: Any, core_module: ModuleType, activation: int
) -> None:
    m, n, k = 20, 30, 40
    spec = [Spec(3, 0, activation, True), Spec(2, 9000, activation, True)]
    layer = make(core_module, (m, n, k), spec, dtype="f32", adapters="f32", layout="row")
    s = saved(expected(core_module, layer)[1], m).astype(np.float32)
    grad_y, nothing = np.ones((m, n), np.float32), [None, None]

    def gradients() -> list[list[np.ndarray]]:
        shapes = [
            [(r, k) for r, *_ in spec],
            [(n, r) for r, *_ in spec],
            [(1, r) for r, *_ in spec],
        ]
        return [[poisoned(*shape, "f32") for shape in kind] for kind in shapes]

    full = gradients()
    assert core.backward(layer, grad_y, s, None, None, *full) == 0, core.error()
    for kind, alone in enumerate(gradients()):
        wanted: list[Any] = [nothing, nothing, nothing]
        wanted[kind] = [None, alone[1]]
        needed = s if kind == 1 or activation else None
        assert core.backward(layer, grad_y, needed, None, None, *wanted) == 0, core.error()
        np.testing.assert_array_equal(alone[1], full[kind][1])
        assert np.isnan(alone[0]).all()
    if activation:
        assert core.backward(layer, grad_y, None, None, None, full[0], nothing) == 1
        assert "s (needed" in core.error()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("ranks", [(1,), (5,), (16,), (33,), (130,), (6, 7)], ids=str)
def test_outer_products_at_every_edge_of_their_blocks(
    core: Any, core_module: ModuleType, ranks: tuple[int, ...], dtype: str
) -> None:
    # Rows and columns around a block's; and with db, which copies a panel before the first tile
    # and not with it, the same bits.
    f64, spec = core_module.to_f64, [Spec(rank) for rank in ranks]
    for shape in [(1, 64, 16), (127, 15, 65), (128, 130, 63), (129, 17, 128), (259, 191, 81)]:
        m, n, k = shape
        layer, _, parts = known(core_module, shape, tuple(spec), dtype, "f32", "row")
        grad_y = make(core_module, (m, 1, n), [], dtype=dtype, adapters="f32", layout="row",
                      seed=1).x  # fmt: skip
        s = saved(parts, m).astype(np.float32)
        found = []
        for grad_bias, threads in ((None, 1), (poisoned(1, n, "f32"), 1), (None, 3)):
            grad_a = [poisoned(rank, k, "f32") for rank in ranks]
            grad_b = [poisoned(n, rank, "f32") for rank in ranks]
            status = core.backward(
                layer, grad_y, s, None, grad_bias, grad_a, grad_b, threads=threads
            )
            assert status == 0, core.error()
            found.append(b"".join(grad.tobytes() for grad in (*grad_a, *grad_b)))
        assert found[0] == found[1] == found[2]
        for i, part in enumerate(parts):
            dh = part.adapter.scaling * f64(grad_y) @ f64(part.adapter.b)
            assert_close(core_module, grad_a[i], dh.T @ f64(layer.x), "f32")
            assert_close(core_module, grad_b[i], f64(grad_y).T @ part.up, "f32")


@pytest.mark.parametrize("by_row", [False, True], ids=["all", "by-row"])
@pytest.mark.parametrize("m", [127, 128, 129, 1023, 1025, 1500])
def test_sums_over_rows_at_every_edge_of_their_segments(
    core: Any, core_module: ModuleType, m: int, by_row: bool
) -> None:
    # Columns around a panel's; enough work for three threads.
    n, k, spec = 131, 65, [Spec(3), Spec(5, 6554), Spec(2, 0, 4, True)]
    layer, _, parts = known(core_module, (m, n, k), tuple(spec), "f32", "f32", "row")
    rng = np.random.default_rng(1)
    grad_y = rng.standard_normal((m, n)).astype(np.float32)
    adapter = rng.integers(-1, len(spec), m, np.int32)
    has = [(adapter == i)[:, None] if by_row else np.ones((m, 1), bool) for i in range(len(spec))]
    s = saved([p._replace(saved=p.saved * own) for p, own in zip(parts, has, strict=True)], m)
    s = s.astype(np.float32)
    found, changes = [], {"adapter": adapter.ctypes.data if by_row else None}
    for threads in (1, 2, 3):
        grad_bias = poisoned(1, n, "f32")
        grads = [
            [poisoned(r, k, "f32") for r, *_ in spec],
            [poisoned(n, r, "f32") for r, *_ in spec],
            [poisoned(1, r, "f32") if biased else None for r, *_, biased in spec],
        ]
        status = core.backward(
            layer, grad_y, s, None, grad_bias, *grads, threads=threads, changes=changes
        )
        assert status == 0, core.error()
        every = [grad_bias, *(g for kind in grads for g in kind if g is not None)]
        found.append(b"".join(g.tobytes() for g in every))
    assert found[0] == found[1] == found[2]
    g, x = grad_y.astype(np.float64), core_module.to_f64(layer.x)
    assert_close(core_module, grad_bias, g.sum(0, keepdims=True), "f32")
    for i, (part, own) in enumerate(zip(parts, has, strict=True)):
        dh = own * part.adapter.scaling * (g @ part.adapter.b) * part.slope
        assert_close(core_module, grads[0][i], dh.T @ (x * part.kept), "f32")
        assert_close(core_module, grads[1][i], g.T @ (own * part.up), "f32")
        if part.adapter.bias is not None:
            assert_close(core_module, grads[2][i], dh.sum(0, keepdims=True), "f32")


@pytest.mark.parametrize("shape", [(300, 200, 520), (40, 300, 64), (5, 300, 70)], ids=str)
def test_same_bits_again_for_any_team_and_from_many_threads(
    core: Any, core_module: ModuleType, shape: tuple[int, int, int]
) -> None:
    spec = [Spec(8), Spec(3, 6554, 2, True), Spec(1, 0, 4, True)]
    layer = make(core_module, shape, spec, dtype="f32", adapters="f32", layout="row")

    m, n, k = shape
    grad_y = np.random.default_rng(1).standard_normal((m, n)).astype(np.float32)

    def run(threads: int) -> bytes:
        y, s, grad_x = (poisoned(m, columns, "f32") for columns in (n, 12, k))
        assert core.forward(layer, y, s, threads=threads) == 0
        grads = [
            [poisoned(*shape, "f32") for shape in shapes]
            for shapes in ([(r, k) for r, *_ in spec], [(n, r) for r, *_ in spec],
                           [(1, r) for r, *_ in spec])
        ]  # fmt: skip
        grads[2][0] = None
        assert core.backward(layer, grad_y, s, grad_x, None, *grads, threads=threads) == 0
        results = [y, s, grad_x, *(g for kind in grads for g in kind if g is not None)]
        return b"".join(result.tobytes() for result in results)

    first = run(1)
    assert all(run(threads) == first for threads in (1, 2, 7, 64))
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(run, [2] * 12)) == {first}


def test_rows_are_read_where_they_lie_or_from_a_copy(core: Any, core_module: ModuleType) -> None:
    # bf16 goes in pairs: rows of x at any address and stride, the same bits. Two blocks of k.
    m, n, k, spec = 20, 2050, 2052, [Spec(8), Spec(3, 6554)]
    ready = make(core_module, (m, n, k), spec, dtype="bf16", adapters="f32", layout="row")
    rng = np.random.default_rng(1)
    grad = core_module.to_bf16(rng.standard_normal((m, n)).astype(np.float32))

    def moved(x: np.ndarray, more: int, by: int) -> np.ndarray:
        whole = np.zeros(x.shape[0] * (x.shape[1] + more) + by, np.uint16)
        place = whole[by:].reshape(x.shape[0], -1)[:, : x.shape[1]]
        place[:] = x
        return place

    found = []
    for more, by in ((0, 0), (6, 2), (5, 0), (0, 1)):
        layer = replace(ready, x=moved(ready.x, more, by))
        y, s = poisoned(m, n, "bf16"), poisoned(m, 11, "f32")
        assert core.forward(layer, y, s) == 0, core.error()
        grad_x = poisoned(m, k, "bf16")
        grads = [[poisoned(*shape, "f32") for shape in shapes]
                 for shapes in ([(8, k), (3, k)], [(n, 8), (n, 3)])]  # fmt: skip
        status = core.backward(layer, moved(grad, more, by), s, grad_x, None, *grads)
        assert status == 0, core.error()
        found.append(b"".join(a.tobytes() for a in (y, s, grad_x, *grads[0], *grads[1])))
        if not (more or by):
            assert_close(core_module, y, expected(core_module, layer)[0], "bf16")
    assert len(set(found)) == 1


@pytest.mark.parametrize("threshold", [0, 1, 6554, 32768, 65535, 65536])
def test_dropout_mask_is_philox(core: Any, core_module: ModuleType, threshold: int) -> None:
    for m, k, stream in ((5, 1003, 2), (3, 8, 0), (2, 1, 7), (0, 4, 0)):
        got = core.mask(m, k, 2**64 - 5, stream, threshold)
        want = core_module.philox_keep(m, k, 2**64 - 5, stream, threshold)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan], ids=str)
@pytest.mark.parametrize("rows", [3, 20])
def test_special_values_stay_in_their_row(
    core: Any, core_module: ModuleType, bad: float, rows: int
) -> None:
    shape = (rows, 21, 37)
    layer = make(core_module, shape, [Spec(3)], dtype="f32", adapters="f32", layout="row")
    layer.x[1, 5] = bad
    layer.weight[2] = 0.5
    for array in layer.adapters[0][:2]:
        np.abs(array, out=array)
    y, s = poisoned(rows, 21, "f32"), poisoned(rows, 3, "f32")
    assert core.forward(layer, y, s) == 0
    np.testing.assert_array_equal(s[1], np.full(3, bad, np.float32))
    np.testing.assert_array_equal(y[1, 2], np.float32(bad))
    assert np.isfinite(np.delete(y, 1, 0)).all()


def test_errors_name_the_argument_and_leave_outputs_alone(
    core: Any, core_module: ModuleType
) -> None:
    layer = make(core_module, (4, 5, 6), [Spec(2)], dtype="f32", adapters="f32", layout="row")
    y, s = poisoned(4, 5, "f32"), poisoned(4, 2, "f32")
    bad = {"activation": 5, "bias": np.zeros((1, 3), np.float32)}
    broken = [
        replace(layer, adapters=[layer.adapters[0]._replace(**{name: value})])
        for name, value in bad.items()
    ]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"struct_size": 3}, "struct_size"),
        ({"num_threads": 0}, "num_threads"),
        ({"weight": core_module.matrix(np.zeros((5, 7), np.float32))}, "weight"),
        ({"weight": core_module.matrix(np.zeros((10, 12), np.float32)[::2, ::2])}, "unit stride"),
        ({"x": core_module.matrix(np.zeros((4, 12), np.float32)[:, ::2])}, "col_stride"),
        ({"y": core_module.matrix(np.zeros((4, 5), np.uint16))}, "y must be f32"),
        ({"bias": core_module.matrix(np.zeros((1, 6), np.float32))}, "bias"),
        ({"branches": None}, "branches"),
    ]
    for change, word in wrong:
        assert core.forward(layer, y, s, changes=change) == 1
        assert word in core.error()
        assert np.isnan(y).all()
        assert np.isnan(s).all()
    for name, changed in zip(bad, broken, strict=True):
        assert core.forward(changed, y, s) == 1
        assert f"branches[0].{name}" in core.error()
        assert np.isnan(y).all()


def test_sizes_whose_work_has_no_number_are_refused(core: Any, core_module: ModuleType) -> None:
    c, many, one = core_module, 2**20, np.zeros((1, 1), np.float32)

    def sized(rows: int, cols: int) -> Any:
        return c.Matrix(one.ctypes.data, rows, cols, cols, 1, c.F32, 0)

    branch = c.Branch(sized(many, 1), sized(many, many), c.matrix(None), 1.0, 0, 0, 0)
    changes = {
        "x": sized(many, 1), "weight": sized(many, 1), "bias": c.matrix(None),
        "y": sized(many, many), "branches": (c.Branch * 1)(branch),
    }  # fmt: skip
    layer = make(c, (1, 1, 1), [Spec(1)], dtype="f32", adapters="f32", layout="row")
    assert core.forward(layer, one, None, changes=changes) == 1
    assert "2^56 multiply-adds" in core.error()


def test_an_isa_that_is_missing_or_unknown_is_refused(
    builds: Builds, core_module: ModuleType
) -> None:
    core = core_module.Core(builds["native"][0])
    assert core.set_isa("sse9") == 1
    assert "sse9" in core.error()
    for name, runs in core.isas():
        assert core.set_isa(name) == (0 if runs else 2)


def test_isa_objects_share_nothing_with_the_linker(builds: Builds) -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    isa_objects = [str(o) for o in builds["native"][1] if o.name.startswith("isa_")]
    out = subprocess.run(["nm", "-C", *isa_objects], check=True, capture_output=True, text=True)
    weak = [line for line in out.stdout.splitlines() if " W " in line or " V " in line]
    assert weak == []


@pytest.mark.parametrize(
    ("name", "words"),
    [("avx2", ("vfmadd231ps", "vbroadcastss", "%ymm")), ("avx512", ("vfmadd231ps", "%zmm")),
     ("avx512_bf16", ("vdpbf16ps", "%zmm"))],
    ids=lambda p: p if isinstance(p, str) else "",
)  # fmt: skip
def test_micro_kernels_have_the_instructions(
    builds: Builds, name: str, words: tuple[str, ...]
) -> None:
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")
    path = next(o for o in builds["native"][1] if o.name == f"isa_{name}.cpp.o")
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert all(word in text for word in words)


@pytest.mark.parametrize(
    ("name", "above"),
    [("dispatch", "yz"), ("checks", "yz"), ("workspace", "yz"), ("isa_baseline", "yz"),
     ("isa_avx2", "z")],
)  # fmt: skip
def test_objects_have_no_instructions_above_their_isa(
    builds: Builds, name: str, above: str
) -> None:
    """%ymm needs AVX, %zmm and the mask registers AVX-512: one of them would be a crash."""
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")
    path = next(o for o in builds["native"][1] if o.name == f"{name}.cpp.o")
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(rf"%[{above}]mm\d+|%k[0-7]\b|%xmm(?:1[6-9]|2\d|3[01])", text)
    if "y" in above:  # the three-operand forms of AVX on %xmm
        found += re.findall(r"\tv[a-z]+\d*[a-z]*\s+.*%xmm", text)
    assert found == []
