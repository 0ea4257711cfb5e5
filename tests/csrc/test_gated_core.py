"""``gated`` of the ABI against numpy float64, for every instruction set that can run here."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from ctypes import c_int32, c_uint32
from types import ModuleType
from typing import Any

import numpy as np
import pytest

SHAPES = [(0, 3), (1, 1), (2, 15), (7, 33), (41, 130), (2, 259), (3, 1376)]
ERFC = np.vectorize(math.erfc, otypes=[float])
INPUTS = {
    "forward": ("gate", "up", "y"),
    "backward": ("grad_y", "gate", "up", "grad_gate", "grad_up"),
}


def _sigmoid(u: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -u))


def _gelu_tanh(h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    c = 2 * math.sqrt(2 / math.pi)
    gate = _sigmoid(c * (h + 0.044715 * h**3))
    return gate, gate * (1 - gate) * c * (1 + 3 * 0.044715 * h * h)


GATES: dict[str, Callable[[np.ndarray], tuple[Any, Any]]] = {
    "identity": lambda h: (1.0, 0.0),
    "relu": lambda h: ((h > 0).astype(float), 0.0),
    "gelu": lambda h: (
        ERFC(-h / math.sqrt(2)) / 2, np.exp(-h * h / 2) / math.sqrt(2 * math.pi)
    ),
    "gelu_tanh": _gelu_tanh,
    "silu": lambda h: (_sigmoid(h), _sigmoid(h) * _sigmoid(-h)),
}  # fmt: skip


def value_and_slope(activation: int, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    gate, slope = list(GATES.values())[activation](h)
    return h * gate, gate + h * slope


@pytest.fixture
def gated(core: Any, core_module: ModuleType) -> Any:
    """Both functions of a library, with arguments from arrays."""
    return Gated(core, core_module)


class Gated:
    def __init__(self, core: Any, helper: ModuleType) -> None:
        self.core, self.helper = core, helper
        last = [("activation", c_int32), ("reserved", c_int32)]
        self.kinds = {
            name: type(name, (ctypes.Structure,), {
                "_fields_": [
                    ("struct_size", c_uint32), ("num_threads", c_int32),
                    *((field, helper.Matrix) for field in fields), *last,
                ],
            })
            for name, fields in INPUTS.items()
        }  # fmt: skip

    def __call__(
        self,
        name: str,
        *tensors: np.ndarray | None,
        activation: int = 4,
        threads: int = 2,
        changes: dict[str, Any] | None = None,
    ) -> int:
        kind = self.kinds[name]
        matrices = [self.helper.matrix(t) for t in tensors]
        args = kind(ctypes.sizeof(kind), threads, *matrices, activation)
        for field, value in (changes or {}).items():
            setattr(args, field, value)
        function = getattr(self.core.lib, f"deltaops_cpu_gated_{name}")
        return int(function(ctypes.byref(args)))


def poisoned(shape: tuple[int, ...], dtype: str = "f32") -> np.ndarray:
    if dtype == "bf16":
        return np.full(shape, 0x7FC0, np.uint16)
    return np.full(shape, np.nan, np.float32)


def make(helper: ModuleType, shape: tuple[int, int], dtype: str) -> list[np.ndarray]:
    """grad_y, gate and up; some of gate lies far out, where the activations are flat."""
    rng = np.random.default_rng(sum(shape))
    drawn = [rng.standard_normal(shape).astype(np.float32) for _ in range(3)]
    drawn[1] *= np.float32(3.0)
    drawn[1].flat[::7] *= np.float32(20.0)
    return [helper.to_bf16(t) if dtype == "bf16" else t for t in drawn]


@pytest.mark.parametrize("activation", range(5), ids=list(GATES))
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_matches_float64_for_any_team(
    gated: Any, core_module: ModuleType, dtype: str, activation: int
) -> None:
    for shape in SHAPES:
        grad_y, gate, up = make(core_module, shape, dtype)
        bits = set()
        for threads in (1, 2, 5):
            out = [poisoned(shape, dtype) for _ in range(3)]
            last: dict[str, Any] = {"activation": activation, "threads": threads}
            assert gated("forward", gate, up, out[0], **last) == 0, gated.core.error()
            assert gated("backward", grad_y, gate, up, *out[1:], **last) == 0, gated.core.error()
            bits.add(b"".join(t.tobytes() for t in out))
        assert len(bits) == 1, "the team must not change a bit"
        d, h, u = (core_module.to_f64(t) for t in (grad_y, gate, up))
        value, slope = value_and_slope(activation, h)
        # a few roundings of float, and one of the store; h^3 rounds inside gelu_tanh's exponential
        rtol = (2.0**-8 if dtype == "bf16" else 0.0) + (4e-6 if activation == 3 else 1e-6)
        for got, want in zip(out, (value * u, d * u * slope, d * value), strict=True):
            # slopes cross 0, where only what they are the sum of is known
            np.testing.assert_allclose(core_module.to_f64(got), want, rtol=rtol, atol=2e-6)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_without_up_it_is_the_activation(gated: Any, core_module: ModuleType, dtype: str) -> None:
    for shape in SHAPES:
        grad_y, gate, _ = make(core_module, shape, dtype)
        one = np.full(shape, 0x3F80, np.uint16) if dtype == "bf16" else np.ones(shape, np.float32)
        for activation in range(5):
            y, grad_gate, same_y, same_grad = (poisoned(shape, dtype) for _ in range(4))
            kind: dict[str, Any] = {"activation": activation}
            assert gated("forward", gate, None, y, **kind) == 0, gated.core.error()
            assert gated("forward", gate, one, same_y, **kind) == 0
            assert gated("backward", grad_y, gate, None, grad_gate, None, **kind) == 0
            assert gated("backward", grad_y, gate, one, same_grad, None, **kind) == 0
            assert y.tobytes() == same_y.tobytes()
            assert grad_gate.tobytes() == same_grad.tobytes()
    grads = poisoned(gate.shape, dtype), poisoned(gate.shape, dtype)
    assert gated("backward", grad_y, gate, None, *grads) == 1
    assert "up (needed for grad_gate)" in gated.core.error()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_rows_apart_and_nothing_around_them_is_touched(
    gated: Any, core_module: ModuleType, dtype: str
) -> None:
    grad_y, gate, up = make(core_module, (5, 37), dtype)
    merged, wide, outputs = (
        poisoned((5, 74), dtype),
        poisoned((5, 45), dtype),
        poisoned((5, 80), dtype),
    )
    merged[:, :37], merged[:, 37:], wide[:, 3:40] = gate, up, grad_y
    y, grad_gate, grad_up = (poisoned((5, 37), dtype) for _ in range(3))
    assert gated("forward", gate, up, y) == 0
    assert gated("backward", grad_y, gate, up, grad_gate, grad_up) == 0
    halves = merged[:, :37], merged[:, 37:]
    first, second = outputs[:, 2:39], outputs[:, 40:77]
    assert gated("backward", wide[:, 3:40], *halves, first, second) == 0, gated.core.error()
    want = poisoned((5, 80), dtype)
    want[:, 2:39], want[:, 40:77] = grad_gate, grad_up
    np.testing.assert_array_equal(outputs, want)
    assert gated("forward", *halves, first) == 0, gated.core.error()
    want[:, 2:39] = y
    np.testing.assert_array_equal(outputs, want)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_what_is_absent_is_not_looked_at(gated: Any, core_module: ModuleType, dtype: str) -> None:
    grad_y, gate, up = make(core_module, (9, 21), dtype)
    both = [poisoned((9, 21), dtype) for _ in range(2)]
    assert gated("backward", grad_y, gate, up, *both) == 0
    alone = poisoned((9, 21), dtype)
    assert gated("backward", grad_y, gate, up, alone, None) == 0
    np.testing.assert_array_equal(alone, both[0])
    assert gated("backward", grad_y, gate, None, None, alone) == 0
    np.testing.assert_array_equal(alone, both[1])
    assert gated("backward", grad_y, gate, None, None, None) == 0


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "struct_size": ({"struct_size": 8}, "struct_size must be"),
    "threads": ({"num_threads": 0}, "num_threads must be 1"),
    "activation": ({"activation": 5}, "activation must be 0 (identity) to 4 (silu), got 5"),
    "activation-negative": ({"activation": -1}, "activation must be 0"),
    "reserved": ({"reserved": 1}, "reserved must be 0"),
}


@pytest.mark.parametrize(("changes", "sentence"), WRONG.values(), ids=WRONG)
def test_bad_arguments_end_in_a_status_and_change_nothing(
    gated: Any, core_module: ModuleType, changes: dict[str, Any], sentence: str
) -> None:
    grad_y, gate, up = make(core_module, (4, 7), "f32")
    outputs = [poisoned((4, 7)) for _ in range(2)]
    assert gated("forward", gate, up, outputs[0], changes=changes) == 1
    assert gated.core.error().startswith(f"gated_forward: {sentence}")
    assert gated("backward", grad_y, gate, up, *outputs, changes=changes) == 1
    assert gated.core.error().startswith(f"gated_backward: {sentence}")
    assert all(np.isnan(t).all() for t in outputs)


def negative(view: Any) -> None:
    view.rows = -4


def no_columns(view: Any) -> None:
    view.cols = 0


def null(view: Any) -> None:
    view.data = None


def narrow(view: Any) -> None:
    view.dtype = 1


def no_dtype(view: Any) -> None:
    view.dtype = 7


def one_row_less(view: Any) -> None:
    view.rows -= 1


def columns_apart(view: Any) -> None:
    view.col_stride = 2


def rows_on_one_another(view: Any) -> None:
    view.row_stride = 3


def off_by_a_byte(view: Any) -> None:
    view.data += 1


def endless(view: Any) -> None:
    view.row_stride = 2**62


def dirty(view: Any) -> None:
    view.reserved = 3


ANY = (negative, narrow, no_dtype, one_row_less, columns_apart, off_by_a_byte, endless, dirty)
READ, WRITTEN = (*ANY, null), (*ANY, rows_on_one_another)
BAD = [
    *(("forward", field, change) for field in ("gate", "up") for change in READ),
    *(("forward", "y", change) for change in (*WRITTEN, null)),
    *(("backward", field, change) for field in ("grad_y", "gate", "up") for change in READ),
    *(("backward", field, change) for field in ("grad_gate", "grad_up") for change in WRITTEN),
    ("forward", "gate", no_columns),
    ("backward", "grad_y", no_columns),
]


def test_bad_matrices_end_in_a_status_that_names_them(gated: Any, core_module: ModuleType) -> None:
    tensors = dict(zip(("grad_y", "gate", "up"), make(core_module, (4, 7), "f32"), strict=True))
    outputs = {name: poisoned((4, 7)) for name in ("y", "grad_gate", "grad_up")}
    for name, field, change in BAD:
        view = core_module.matrix({**tensors, **outputs}[field])
        change(view)
        given = [{**tensors, **outputs}[f] for f in INPUTS[name]]
        assert gated(name, *given, changes={field: view}) == 1, (name, field, change)
        # the first matrix sets what the others must be: a change of it may show at the next
        sets = change in (narrow, one_row_less) and field in ("gate", "grad_y")
        words = (
            ("K must be",)
            if change is no_columns
            else ("must",)
            if sets
            else (f"{field} ", f"{field}.")
        )
        assert any(word in gated.core.error() for word in words), (
            gated.core.error(),
            field,
            change,
        )
    assert all(np.isnan(t).all() for t in outputs.values())


def test_outputs_stand_apart(gated: Any, core_module: ModuleType) -> None:
    grad_y, gate, up = make(core_module, (4, 7), "f32")
    a, b, memory = poisoned((4, 7)), poisoned((4, 7)), poisoned((8, 7))
    overlaps: list[tuple[str, str, tuple[np.ndarray, ...]]] = [
        ("y", "gate", (gate, up, gate)),
        ("y", "up", (gate, up, up)),
        ("grad_gate", "grad_y", (grad_y, gate, up, grad_y, b)),
        ("grad_gate", "gate", (grad_y, gate, up, gate, b)),
        ("grad_gate", "up", (grad_y, gate, up, up, b)),
        ("grad_up", "grad_y", (grad_y, gate, up, a, grad_y)),
        ("grad_up", "gate", (grad_y, gate, up, a, gate)),
        ("grad_up", "up", (grad_y, gate, up, a, up)),
        ("grad_up", "grad_gate", (grad_y, gate, up, memory[:4], memory[2:6])),
    ]
    for written, other, tensors in overlaps:
        assert gated("forward" if written == "y" else "backward", *tensors) == 1
        error = gated.core.error()  # of two that are written, either may come first
        assert "is written, so it must not overlap" in error
        assert written in error
        assert other in error
    assert np.isnan(memory).all()


def test_null_is_refused(core: Any) -> None:
    for name in INPUTS:
        assert getattr(core.lib, f"deltaops_cpu_gated_{name}")(None) == 1
        assert core.error() == f"gated_{name}: args must not be NULL."
