"""``cross_entropy`` through the C ABI, for every instruction set that can run here."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_uint32
from types import ModuleType
from typing import Any

import numpy as np
import pytest

SHAPES = [(1, 1), (3, 7), (2, 65), (5, 1000), (2, 32003), (41, 130), (0, 9)]
IGNORED = -100


@pytest.fixture
def entropy(core: Any, core_module: ModuleType) -> Any:
    """``forward`` and ``backward`` of a library, with arguments from arrays."""
    return Entropy(core, core_module)


class Entropy:
    def __init__(self, core: Any, helper: ModuleType) -> None:
        self.core, self.helper = core, helper
        common = [
            ("struct_size", c_uint32),
            ("num_threads", c_int32),
            ("logits", helper.Matrix),
            ("target", POINTER(c_int64)),
            ("ignore_index", c_int64),
            ("reduction", c_int32),
            ("reserved", c_int32),
            ("state", helper.Matrix),
        ]

        class Forward(ctypes.Structure):
            _fields_ = [*common, ("loss", POINTER(c_float))]

        class Backward(ctypes.Structure):
            _fields_ = [
                *common,
                ("grad_loss", POINTER(c_float)),
                ("grad_logits", helper.Matrix),
            ]

        self.Forward, self.Backward = Forward, Backward

    def _common(self, kind: Any, logits: np.ndarray, target: np.ndarray, state: np.ndarray) -> Any:
        args = kind(ctypes.sizeof(kind), 2, self.helper.matrix(logits))
        args.target = target.ctypes.data_as(POINTER(c_int64))
        args.ignore_index, args.reduction = IGNORED, 1
        args.state = self.helper.matrix(state)
        return args

    def forward(
        self,
        logits: np.ndarray,
        target: np.ndarray,
        state: np.ndarray,
        loss: np.ndarray,
        changes: dict[str, Any] | None = None,
    ) -> int:
        args = self._common(self.Forward, logits, target, state)
        args.loss = loss.ctypes.data_as(POINTER(c_float))
        for name, value in (changes or {}).items():
            setattr(args, name, value)
        return int(self.core.lib.deltaops_cpu_cross_entropy_forward(ctypes.byref(args)))

    def backward(
        self,
        logits: np.ndarray,
        target: np.ndarray,
        state: np.ndarray,
        grad: np.ndarray,
        scale: float,
        changes: dict[str, Any] | None = None,
    ) -> int:
        args = self._common(self.Backward, logits, target, state)
        args.grad_loss = POINTER(c_float)(c_float(scale))
        args.grad_logits = self.helper.matrix(grad)
        for name, value in (changes or {}).items():
            setattr(args, name, value)
        return int(self.core.lib.deltaops_cpu_cross_entropy_backward(ctypes.byref(args)))


def make(helper: ModuleType, shape: tuple[int, int], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(sum(shape))
    logits = (rng.standard_normal(shape) * 4 + 2).astype(np.float32)
    target = rng.integers(0, shape[1], shape[0])
    target[1::3] = IGNORED
    return helper.to_bf16(logits) if dtype == "bf16" else logits, target


def poisoned(shape: tuple[int, ...], dtype: str = "f32") -> np.ndarray:
    if dtype == "bf16":
        return np.full(shape, 0x7FC0, np.uint16)
    return np.full(shape, np.nan, np.float32)


def oracle(x: np.ndarray, target: np.ndarray, scale: float, mean: bool) -> tuple[Any, np.ndarray]:
    """Loss and gradient in float64."""
    counted = target != IGNORED
    shifted = x - x.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    rows = np.arange(len(x))[counted]
    count = counted.sum() if mean else 1
    grad = np.exp(logs)
    grad[rows, target[counted]] -= 1
    grad[~counted] = 0
    loss = -logs[rows, target[counted]].sum()
    return loss / count if count else np.nan, grad * (scale / count if count else 0)


@pytest.mark.parametrize("reduction", [0, 1], ids=["sum", "mean"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(
    entropy: Any, core_module: ModuleType, shape: tuple[int, int], dtype: str, reduction: int
) -> None:
    logits, target = make(core_module, shape, dtype)
    bits = set()
    for threads in (1, 2, 5):
        state, loss, grad = poisoned((shape[0], 2)), poisoned((1,)), poisoned(shape, dtype)
        changes = {"reduction": reduction, "num_threads": threads}
        assert entropy.forward(logits, target, state, loss, changes) == 0, entropy.core.error()
        assert entropy.backward(logits, target, state, grad, 1.5, changes) == 0
        bits.add((loss.tobytes(), state.tobytes(), grad.tobytes()))
    assert len(bits) == 1, "the team must not change a bit"
    want_loss, want_grad = oracle(core_module.to_f64(logits), target, 1.5, reduction == 1)
    np.testing.assert_allclose(loss[0], want_loss, rtol=2e-6)
    # a probability is off by a few roundings of float, and by the one of its own store
    rtol = 2.0**-8 if dtype == "bf16" else 2e-6
    np.testing.assert_allclose(
        core_module.to_f64(grad), want_grad, rtol=rtol, atol=1e-7 * np.abs(want_grad).max(initial=0)
    )


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_rows_apart_and_nothing_around_them_is_touched(
    entropy: Any, core_module: ModuleType, dtype: str
) -> None:
    logits, target = make(core_module, (5, 37), dtype)
    wide, grads = poisoned((5, 45), dtype), poisoned((5, 50), dtype)
    wide[:, 3:40] = logits
    state, loss, grad = poisoned((5, 2)), poisoned((1,)), poisoned((5, 37), dtype)
    assert entropy.forward(logits, target, state, loss) == 0
    assert entropy.backward(logits, target, state, grad, 1.0) == 0
    strided, again = poisoned((5, 2)), poisoned((1,))
    assert entropy.forward(wide[:, 3:40], target, strided, again) == 0
    assert entropy.backward(wide[:, 3:40], target, strided, grads[:, 6:43], 1.0) == 0
    assert loss.tobytes() == again.tobytes()
    np.testing.assert_array_equal(grads[:, 6:43], grad)
    outside = poisoned((5, 50), dtype)
    outside[:, 6:43] = grad
    np.testing.assert_array_equal(grads, outside)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "struct_size": ({"struct_size": 8}, "struct_size must be"),
    "threads": ({"num_threads": 0}, "num_threads must be 1"),
    "reduction": ({"reduction": 2}, "reduction must be 0"),
    "reserved": ({"reserved": 1}, "reserved must be 0"),
    "target-null": ({"target": None}, "target must point"),
    "ignore": ({"ignore_index": -1}, r"target[1] must be a class from 0 to 6"),
}


@pytest.mark.parametrize(("changes", "sentence"), WRONG.values(), ids=WRONG)
def test_bad_arguments_end_in_a_status_and_change_nothing(
    entropy: Any, core_module: ModuleType, changes: dict[str, Any], sentence: str
) -> None:
    logits, target = make(core_module, (4, 7), "f32")
    state, loss, grad = poisoned((4, 2)), poisoned((1,)), poisoned((4, 7))
    assert entropy.forward(logits, target, state, loss, changes) == 1
    assert sentence in entropy.core.error()
    assert entropy.backward(logits, target, state, grad, 1.0, changes) == 1
    assert sentence in entropy.core.error()
    assert all(np.isnan(t).all() for t in (state, loss, grad))


def test_bad_matrices_end_in_a_status(entropy: Any, core_module: ModuleType) -> None:
    logits, target = make(core_module, (4, 7), "f32")
    state, loss, grad = poisoned((4, 2)), poisoned((1,)), poisoned((4, 7))
    for name, matrix in {
        "state": poisoned((3, 2)),
        "state must be contiguous": poisoned((4, 5))[:, :2],
        "logits must have col_stride": poisoned((7, 4)).T,
    }.items():
        field = name.split()[0]
        changes = {field: core_module.matrix(matrix)}
        assert entropy.forward(logits, target, state, loss, changes) == 1
        assert name in entropy.core.error()
    for matrix in (poisoned((4, 6)), poisoned((4, 7), "bf16"), poisoned((1, 7)).repeat(4, 0)):
        view = core_module.matrix(matrix)
        if matrix.shape == (4, 7) and matrix.dtype == np.float32:
            view.row_stride = 3
        assert entropy.backward(logits, target, state, grad, 1.0, {"grad_logits": view}) == 1
        assert "grad_logits" in entropy.core.error()
    assert entropy.forward(logits, target, state, loss, {"loss": None}) == 1
    assert entropy.backward(logits, target, state, grad, 1.0, {"grad_loss": None}) == 1
    for function in ("forward", "backward"):
        assert getattr(entropy.core.lib, f"deltaops_cpu_cross_entropy_{function}")(None) == 1
        assert "args must not be NULL" in entropy.core.error()
    assert np.isnan(grad).all()


def test_huge_pages_are_advice(core: Any) -> None:
    memory = np.arange(3 << 20, dtype=np.float32)
    advise = core.lib.deltaops_cpu_advise_huge_pages
    for pointer, size in (
        (memory.ctypes.data, memory.nbytes),
        (memory.ctypes.data, 5),
        (0, 1 << 30),
    ):
        advise(ctypes.c_void_p(pointer), c_int64(size))
    np.testing.assert_array_equal(memory, np.arange(3 << 20, dtype=np.float32))
