"""``bottleneck`` and ``norm_bias`` of the ABI against numpy float64, for every instruction set."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from ctypes import c_float, c_int32, c_uint32
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

Builds = dict[str, tuple[Path, list[Path]]]
ISAS = [("native", "baseline"), ("native", "avx2"), ("native", "avx512"),
        ("native", "avx512_bf16"), ("emulated", "avx512")]  # fmt: skip
ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu")
SHAPES = [(0, 5, 3), (1, 1, 1), (7, 33, 5), (131, 70, 40), (29, 301, 17)]
INPUTS = ("x", "residual", "gamma", "beta", "down", "down_bias", "up", "up_bias")
GRADS = ("x", "gamma", "beta", "down", "down_bias", "up", "up_bias")


def struct(helper: ModuleType, matrices: tuple[str, ...], *last: tuple[str, Any]) -> Any:
    head = [("struct_size", c_uint32), ("num_threads", c_int32)]
    fields = [*head, *((name, helper.Matrix) for name in matrices), *last]
    return type("Args", (ctypes.Structure,), {"_fields_": fields})


@pytest.fixture(params=ISAS, ids=lambda p: "-".join(p))
def core(request: pytest.FixtureRequest, builds: Builds, core_module: ModuleType) -> Any:
    kind, isa = request.param
    core = core_module.Core(builds[kind][0])
    if not dict(core.isas())[isa]:
        pytest.skip(f"this CPU has no {isa}")
    assert core.set_isa(isa) == 0
    return core


def run(
    core: Any, helper: ModuleType, op: str, tensors: dict[str, Any], *last: Any, threads: int = 3
) -> None:
    kinds = {float: c_float, int: c_int32}
    settings = tuple((f"setting{i}", kinds[type(v)]) for i, v in enumerate(last))
    kind = struct(helper, tuple(tensors), *settings)
    args = kind(ctypes.sizeof(kind), threads, *(helper.matrix(t) for t in tensors.values()), *last)
    assert getattr(core.lib, f"deltaops_cpu_{op}")(ctypes.byref(args)) == 0, core.error()


def poisoned(like: np.ndarray | tuple[int, int]) -> np.ndarray:
    return np.full(like if isinstance(like, tuple) else like.shape, np.nan, np.float32)


def norm(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rstd = 1 / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    return (x - x.mean(1, keepdims=True)) * rstd, rstd


def norm_gradient(g: np.ndarray, n: np.ndarray, rstd: np.ndarray) -> np.ndarray:
    return rstd * (g - g.mean(1, keepdims=True) - n * (g * n).mean(1, keepdims=True))


def value_and_slope(kind: str, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if kind == "identity":
        return h, np.ones_like(h)
    if kind == "relu":
        return np.maximum(h, 0), (h > 0).astype(float)
    if kind == "gelu":
        gate = np.vectorize(lambda v: math.erfc(-v / math.sqrt(2)) / 2, otypes=[float])(h)
        return h * gate, gate + h * np.exp(-h * h / 2) / math.sqrt(2 * math.pi)
    c = 2 * math.sqrt(2 / math.pi)
    u, inner = (c * (h + 0.044715 * h**3), c * (1 + 3 * 0.044715 * h * h))
    if kind == "silu":
        u, inner = h, np.ones_like(h)
    gate = 1 / (1 + np.exp(-u))
    return h * gate, gate + h * gate * (1 - gate) * inner


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    bound = 2e-5 * max(1.0, float(np.abs(want).max(initial=0.0)))
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "layernorm"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_bottleneck_matches_float64(
    core: Any, core_module: ModuleType, kind: str, normed: bool
) -> None:
    rng = np.random.default_rng(0)
    for m, k, r in SHAPES:
        shapes = [(m, k), (m, k), (1, k), (1, k), (r, k), (1, r), (k, r), (1, k)]
        t = {
            name: rng.standard_normal(shape).astype(np.float32)
            for name, shape in zip(INPUTS, shapes, strict=True)
        }
        t["down"] *= k**-0.5
        w = {name: value.astype(np.float64) for name, value in t.items()}
        if not normed:
            t["gamma"] = t["beta"] = None
        y, h, stats = poisoned((m, k)), poisoned((m, r)), poisoned((m, 2))
        out = {**t, "y": y, "h": h, "stats": stats}
        code = ACTIVATIONS.index(kind)
        run(core, core_module, "bottleneck_forward", out, 0.5, 1e-5, code, int(normed))
        n, rstd = norm(w["x"]) if normed else (w["x"], np.ones((m, 1)))
        z = n * w["gamma"] + w["beta"] if normed else n
        inner = z @ w["down"].T + w["down_bias"]
        value, _ = value_and_slope(kind, inner)
        assert_close(h, inner)
        assert_close(y, w["residual"] + 0.5 * value @ w["up"].T + w["up_bias"])

        value, slope = value_and_slope(kind, h.astype(np.float64))
        grad_y = rng.standard_normal((m, k)).astype(np.float32)
        grads = {f"grad_{name}": poisoned(t[name]) for name in GRADS if t[name] is not None}
        none = dict.fromkeys(f"grad_{name}" for name in GRADS)
        given = {"grad_y": grad_y, "x": t["x"], "h": h, "stats": stats if normed else None}
        given |= {name: t[name] for name in ("gamma", "beta", "down", "up")}
        last = (0.5, code, int(normed), 1)
        run(core, core_module, "bottleneck_backward", {**given, **none, **grads}, *last)
        g = grad_y.astype(np.float64)
        dh = 0.5 * g @ w["up"] * slope
        dz = dh @ w["down"]
        dx = norm_gradient(dz * w["gamma"], n, rstd) if normed else dz
        want = {
            "x": dx + g, "gamma": (dz * n).sum(0, keepdims=True),
            "beta": dz.sum(0, keepdims=True), "down": dh.T @ z,
            "down_bias": dh.sum(0, keepdims=True), "up": g.T @ (0.5 * value),
            "up_bias": g.sum(0, keepdims=True),
        }  # fmt: skip
        for name, got in grads.items():
            assert_close(got, want[name.removeprefix("grad_")])


@pytest.mark.parametrize("m", [127, 128, 129, 1023, 1025, 1500])
def test_bottleneck_sums_over_rows_at_every_edge_of_their_segments(
    core: Any, core_module: ModuleType, m: int
) -> None:
    rng, k, r = np.random.default_rng(0), 129, 5  # columns: one more than two threads' share
    names = ("grad_y", "x", "h", "gamma", "beta", "down", "up")
    shapes = ((m, k), (m, k), (m, r), (1, k), (1, k), (r, k), (k, r))
    w = {name: rng.standard_normal(shape) for name, shape in zip(names, shapes, strict=True)}
    t = {name: value.astype(np.float32) for name, value in w.items()}
    w = {name: value.astype(np.float64) for name, value in t.items()}
    n, rstd = norm(w["x"])
    stats = np.concatenate([w["x"].mean(1, keepdims=True), rstd], 1).astype(np.float32)
    t = {"grad_y": t.pop("grad_y"), "x": t.pop("x"), "h": t.pop("h"), "stats": stats, **t}
    value, slope = value_and_slope("silu", w["h"])
    dh = 0.5 * w["grad_y"] @ w["up"] * slope
    dz = dh @ w["down"]
    want = {
        "x": norm_gradient(dz * w["gamma"], n, rstd),
        "gamma": (dz * n).sum(0, keepdims=True), "beta": dz.sum(0, keepdims=True),
        "down": dh.T @ (n * w["gamma"] + w["beta"]), "down_bias": dh.sum(0, keepdims=True),
        "up": w["grad_y"].T @ (0.5 * value), "up_bias": w["grad_y"].sum(0, keepdims=True),
    }  # fmt: skip
    found = []
    for threads in (1, 2, 3):
        grads = {f"grad_{name}": poisoned(want[name]) for name in GRADS}
        last = 0.5, ACTIVATIONS.index("silu"), 1, 0
        run(core, core_module, "bottleneck_backward", {**t, **grads}, *last, threads=threads)
        found.append(b"".join(grad.tobytes() for grad in grads.values()))
    assert found[0] == found[1] == found[2]
    for name in GRADS:
        assert_close(grads[f"grad_{name}"], want[name])


def norm_operands() -> Iterator[list[np.ndarray]]:
    """x, gamma, bias and grad_y of several sizes."""
    rng = np.random.default_rng(0)
    for m, k in ((0, 3), (1, 2), (7, 33), (140, 70), (29, 301)):
        shapes = (m, k), (1, k), (1, k), (m, k)
        yield [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def test_norm_bias_matches_float64(core: Any, core_module: ModuleType) -> None:
    for x, gamma, bias, grad_y in norm_operands():
        y, stats = poisoned(x), poisoned((len(x), 2))
        out = {"x": x, "gamma": gamma, "bias": bias, "y": y, "stats": stats}
        run(core, core_module, "norm_bias_forward", out, 1e-5, 1)
        n, rstd = norm(x.astype(np.float64))
        assert_close(y, n * gamma + bias)
        grads = {f"grad_{name}": poisoned(t) for name, t in (("x", x), ("g", gamma), ("b", bias))}
        given = {"grad_y": grad_y, "x": x, "stats": stats, "gamma": gamma, **grads}
        run(core, core_module, "norm_bias_backward", given, 1, 0)
        g = grad_y.astype(np.float64)
        assert_close(grads["grad_x"], norm_gradient(g * gamma, n, rstd))
        assert_close(grads["grad_g"], (g * n).sum(0, keepdims=True))
        assert_close(grads["grad_b"], g.sum(0, keepdims=True))


def test_a_gain_alone_matches_float64(core: Any, core_module: ModuleType) -> None:
    for x, gamma, bias, grad_y in norm_operands():
        y, wide = poisoned(x), grad_y.astype(np.float64)
        out = {"x": x, "gamma": gamma, "bias": bias, "y": y, "stats": None}
        run(core, core_module, "norm_bias_forward", out, 1e-5, 0)
        assert_close(y, x.astype(np.float64) * gamma + bias)
        grads = {f"grad_{name}": poisoned(t) for name, t in (("x", x), ("g", gamma), ("b", bias))}
        given = {"grad_y": grad_y, "x": x, "stats": None, "gamma": gamma, **grads}
        run(core, core_module, "norm_bias_backward", given, 0, 0)
        assert_close(grads["grad_x"], wide * gamma)
        assert_close(grads["grad_g"], (wide * x).sum(0, keepdims=True))
        assert_close(grads["grad_b"], wide.sum(0, keepdims=True))
        alone = {**given, "x": None, "grad_x": poisoned(x), "grad_g": None, "grad_b": None}
        run(core, core_module, "norm_bias_backward", alone, 0, 0)  # x is read for dgamma alone
        assert np.array_equal(alone["grad_x"], grads["grad_x"])


def test_errors_name_the_argument(core: Any, core_module: ModuleType) -> None:
    x, y, down, up = (np.zeros(s, np.float32) for s in ((4, 6), (4, 6), (2, 6), (6, 3)))
    empty = dict.fromkeys((*INPUTS, "y", "h", "stats"))
    tensors = {**empty, "x": x, "down": down, "up": up, "y": y}
    with pytest.raises(AssertionError, match=r"bottleneck_forward: up must be .*\[6, 2\]"):
        run(core, core_module, "bottleneck_forward", tensors, 1.0, 1e-5, 1, 0)
    tensors["up"] = up[:, :2].copy()
    with pytest.raises(AssertionError, match="activation must be 0"):
        run(core, core_module, "bottleneck_forward", tensors, 1.0, 1e-5, 5, 0)
    tensors = {"x": x, "gamma": None, "bias": None, "y": y, "stats": None}
    with pytest.raises(AssertionError, match="norm_bias_forward: norm must be 0"):
        run(core, core_module, "norm_bias_forward", tensors, 1e-5, 3)
    assert not core.lib.deltaops_cpu_bottleneck_backward(None) == 0
    assert "must not be NULL" in core.error()
