"""``rotary`` of the ABI against numpy float64, for every instruction set that can run here."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_uint32, c_void_p
from types import ModuleType
from typing import Any

import numpy as np
import pytest

SHAPES = [(0, 2, 3, 4), (1, 1, 1, 2), (2, 3, 7, 6), (2, 5, 1, 64), (3, 2, 5, 80), (1, 9, 33, 128)]
DTYPES = [("f32", "f32"), ("bf16", "bf16"), ("bf16", "f32")]
dtypes = pytest.mark.parametrize(("dtype", "table"), DTYPES, ids="-".join)


class Args(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("num_threads", c_int32),
        ("sizes", c_int64 * 4),
        ("x", c_void_p),
        ("x_strides", c_int64 * 3),
        ("y", c_void_p),
        ("y_strides", c_int64 * 3),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("table_strides", c_int64 * 2),
        *((name, c_int32) for name in ("dtype", "table_dtype", "backward", "reserved")),
    ]


def strides(t: np.ndarray, count: int) -> list[int]:
    return [s // t.itemsize for s in t.strides[:count]]


class Rotary:
    """The function of a library, with arguments from arrays."""

    def __init__(self, core: Any) -> None:
        self.core = core

    def __call__(
        self,
        x: np.ndarray,
        cos: np.ndarray,
        sin: np.ndarray,
        y: np.ndarray,
        backward: int = 0,
        threads: int = 2,
        changes: dict[str, Any] | None = None,
    ) -> int:
        b, h, l, d = x.shape  # noqa: E741
        args = Args(
            ctypes.sizeof(Args), threads, (b, h, l, d), x.ctypes.data, tuple(strides(x, 3)),
            y.ctypes.data, tuple(strides(y, 3)), cos.ctypes.data, sin.ctypes.data,
            (0 if cos.shape[0] == 1 else strides(cos, 1)[0], strides(cos, 2)[1]),
            int(x.dtype == np.uint16), int(cos.dtype == np.uint16), backward, 0,
        )  # fmt: skip
        for field, value in (changes or {}).items():
            setattr(args, field, value)
        return int(self.core.lib.deltaops_cpu_rotary(ctypes.byref(args)))


@pytest.fixture
def rotary(core: Any) -> Rotary:
    return Rotary(core)


def poisoned(shape: tuple[int, ...], dtype: str = "f32") -> np.ndarray:
    if dtype == "bf16":
        return np.full(shape, 0x7FC0, np.uint16)
    return np.full(shape, np.nan, np.float32)


def make(
    helper: ModuleType, shape: tuple[int, ...], dtype: str, table: str, shared: bool
) -> list[np.ndarray]:
    """x in [B, L, H, D] memory, cos and sin whose halves differ."""
    b, h, l, d = shape  # noqa: E741
    rng = np.random.default_rng(sum(shape))
    x = rng.standard_normal((b, l, h, d)).astype(np.float32)
    angles = rng.standard_normal((1 if shared else b, l, d)).astype(np.float32)
    x, cos, sin = (
        helper.to_bf16(t) if kind == "bf16" else t
        for t, kind in ((x, dtype), (np.cos(angles), table), (np.sin(angles), table))
    )
    return [x.transpose(0, 2, 1, 3), cos, sin]


def turned(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, backward: int) -> np.ndarray:
    """The formula in float64."""
    cos, sin = cos[:, None], sin[:, None]

    def rot(t: np.ndarray) -> np.ndarray:
        first, second = np.split(t, 2, -1)
        return np.concatenate((-second, first), -1)

    return x * cos - rot(x * sin) if backward else x * cos + rot(x) * sin


@dtypes
@pytest.mark.parametrize("backward", [0, 1])
def test_matches_float64_for_any_team(
    rotary: Rotary, core_module: ModuleType, dtype: str, table: str, backward: int
) -> None:
    for shape in SHAPES:
        x, cos, sin = make(core_module, shape, dtype, table, shared=shape[3] != 80)
        bits = set()
        for threads in (1, 2, 5):
            y = poisoned(shape, dtype)
            assert rotary(x, cos, sin, y, backward, threads) == 0, rotary.core.error()
            bits.add(y.tobytes())
        assert len(bits) == 1, "the team must not change a bit"
        want = turned(*(core_module.to_f64(t) for t in (x, cos, sin)), backward)
        # two products of a few units and their sum in float, and the rounding of the store
        rtol = 2.0**-8 if dtype == "bf16" else 2.0**-24
        np.testing.assert_allclose(core_module.to_f64(y), want, rtol=rtol, atol=1e-6)


@dtypes
def test_any_strides_and_nothing_around_them_is_touched(
    rotary: Rotary, core_module: ModuleType, dtype: str, table: str
) -> None:
    shape = 2, 3, 5, 22
    x, cos, sin = make(core_module, shape, dtype, table, shared=False)
    plain = poisoned(shape, dtype)
    assert rotary(x, cos, sin, plain) == 0
    wide = poisoned((2, 5, 9, 24), dtype)  # heads of a merged projection, with gaps
    slot = wide[:, :, 3:6, 1:23].transpose(0, 2, 1, 3)
    assert rotary(x[::-1, :, ::-1], cos[::-1, ::-1], sin[::-1, ::-1], slot) == 0
    want = poisoned((2, 5, 9, 24), dtype)
    want[:, :, 3:6, 1:23] = plain[::-1, :, ::-1].transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(wide, want)


def test_the_end_of_the_memory_is_the_end(rotary: Rotary, core_module: ModuleType) -> None:
    """D elements and not a vector's: what follows a head's last element is not looked at."""
    shape = 1, 1, 1, 6
    x, cos, sin = make(core_module, shape, "f32", "f32", shared=True)
    y = poisoned((16,))
    assert rotary(x, cos, sin, y[5:11].reshape(shape)) == 0
    assert np.isnan(y[:5]).all()
    assert np.isnan(y[11:]).all()
    assert not np.isnan(y[5:11]).any()


S3, S2 = c_int64 * 3, c_int64 * 2
NULL, ENDLESS = None, 2**62
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "struct_size": ({"struct_size": 8}, "struct_size must be"),
    "threads": ({"num_threads": 0}, "num_threads must be 1"),
    "reserved": ({"reserved": 1}, "reserved must be 0"),
    "negative": ({"sizes": (c_int64 * 4)(2, -1, 4, 6)}, "H must be 0 to 2^40, got -1"),
    "huge": ({"sizes": (c_int64 * 4)(2**39, 2**39, 4, 6)}, "the sizes must stay below 2^52"),
    "odd": ({"sizes": (c_int64 * 4)(2, 3, 4, 5)}, "D must be even and at least 2, got 5"),
    "no-columns": ({"sizes": (c_int64 * 4)(2, 3, 4, 0)}, "D must be even and at least 2, got 0"),
    "dtype": ({"dtype": 7}, "dtype must be 0 (f32) or 1 (bf16), got 7"),
    "table-narrower": ({"table_dtype": 1}, "table_dtype must be 0 (f32) or that of x, 0, got 1"),
    "backward": ({"backward": 2}, "backward must be 0 or 1, got 2"),
    **{f"{name}-null": ({name: NULL}, f"{name} must point") for name in ("x", "y", "cos", "sin")},
    "x-far": ({"x_strides": S3(ENDLESS, 6, 18)}, "x must span at most 2^56 bytes, got 2 at"),
    "x-least": ({"x_strides": S3(-(2**63), 6, 18)}, "x must span at most 2^56 bytes"),
    "y-far": ({"y_strides": S3(72, ENDLESS, 18)}, "y must span at most 2^56 bytes, got 3 at"),
    "cos-far": ({"table_strides": S2(0, ENDLESS)}, "cos must span at most 2^56 bytes, got 4 at"),
    "heads-overlap": ({"y_strides": S3(72, 5, 18)}, "y is written, so its heads must not overlap"),
    "tokens-overlap": ({"y_strides": S3(72, 6, 17)}, "y is written, so its heads must not overlap"),
    "batches-overlap": ({"y_strides": S3(71, 24, 6)}, "y is written, so its heads must not"),
    "broadcast": ({"y_strides": S3(0, 24, 6)}, "y is written, so its heads must not overlap"),
    "backwards": ({"y_strides": S3(-72, 24, 6)}, "y is written, so its heads must not overlap"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "sentence"), WRONG.values(), ids=WRONG)
def test_bad_arguments_end_in_a_status_and_change_nothing(
    rotary: Rotary, core_module: ModuleType, changes: dict[str, Any], sentence: str
) -> None:
    x, cos, sin = make(core_module, (2, 3, 4, 6), "f32", "f32", shared=True)
    y = poisoned((2, 3, 4, 6))
    assert rotary(x, cos, sin, y, changes=changes) == 1
    assert rotary.core.error().startswith(f"rotary: {sentence}")
    assert np.isnan(y).all()


def test_addresses_must_be_aligned(rotary: Rotary, core_module: ModuleType) -> None:
    x, cos, sin = make(core_module, (2, 3, 4, 6), "f32", "f32", shared=True)
    y = poisoned((2, 3, 4, 6))
    for name, t in (("x", x), ("y", y), ("cos", cos), ("sin", sin)):
        assert rotary(x, cos, sin, y, changes={name: t.ctypes.data + 1}) == 1
        assert rotary.core.error().startswith(f"rotary: {name} must be aligned to 4 bytes")


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "each"])
def test_the_output_stands_apart(rotary: Rotary, core_module: ModuleType, shared: bool) -> None:
    shape = 2, 3, 4, 6
    x, cos, sin = make(core_module, shape, "f32", "f32", shared)
    for name, t in (("x", x), ("cos", cos), ("sin", sin)):
        changes = {"y": t.ctypes.data}
        assert rotary(x, cos, sin, poisoned(shape), changes=changes) == 1
        assert f"y is written, so it must not overlap {name}." in rotary.core.error()


def test_nothing_to_do_needs_no_memory(rotary: Rotary, core_module: ModuleType) -> None:
    x, cos, sin = make(core_module, (2, 3, 0, 6), "f32", "f32", shared=True)
    nothing = dict.fromkeys(("x", "y", "cos", "sin"))
    assert rotary(x, cos, sin, poisoned((2, 3, 0, 6)), changes=nothing) == 0, rotary.core.error()


def test_null_is_refused(core: Any) -> None:
    assert core.lib.deltaops_cpu_rotary(None) == 1
    assert core.error() == "rotary: args must not be NULL."
