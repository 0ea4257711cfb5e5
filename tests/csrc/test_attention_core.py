"""``attention`` of the ABI against numpy float64, for every instruction set that can run here."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_float, c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

# B, H, Hkv, Lq, Lk, D: odd ones, more keys and queries than a block has, none of either, groups
SHAPES = [
    (2, 2, 2, 16, 16, 64),
    (1, 4, 2, 37, 53, 17),
    (2, 2, 1, 139, 139, 20),
    (1, 1, 1, 150, 300, 80),
    (1, 6, 2, 7, 260, 33),
    (1, 1, 1, 70, 5, 3),
    (1, 2, 2, 9, 9, 300),
    (2, 3, 3, 1, 1, 1),
    (2, 2, 1, 0, 4, 8),
    (2, 2, 1, 4, 0, 8),
    (0, 2, 1, 4, 4, 8),
    (2, 0, 0, 4, 4, 8),
]
DTYPES = ["f32", "bf16"]
ROUNDING = {"f32": 2.0**-24, "bf16": 2.0**-9}
WAYS = ["all", "causal", "mask", "mask-causal", "rows", "shared", "bias"]
# A prefix's length, its dtype, sizes and way: shorter and longer than a tile's columns and a block
# of keys, nothing but it to see, queries and keys of many blocks, runs of several sequences
PREFIXED = [
    (1, "f32", (2, 2, 2, 16, 16, 64), "all"),
    (16, "f32", (2, 4, 2, 97, 97, 20), "causal"),
    (16, "f32", (2, 2, 1, 130, 260, 33), "mask"),
    (33, "f32", (1, 6, 2, 37, 53, 17), "shared"),
    (33, "bf16", (1, 6, 2, 37, 37, 17), "mask-causal"),
    (64, "bf16", (2, 2, 1, 139, 139, 20), "causal"),
    (100, "f32", (2, 3, 3, 29, 29, 16), "rows"),
    (130, "f32", (1, 2, 2, 140, 140, 9), "mask-causal"),
    (128, "bf16", (2, 4, 1, 7, 300, 8), "shared"),
    (300, "f32", (1, 2, 1, 70, 5, 3), "rows"),
    (7, "f32", (9, 33, 33, 3, 4, 5), "mask"),
    (5, "f32", (70, 1, 1, 2, 2, 3), "all"),
    (20, "f32", (2, 4, 2, 130, 260, 33), "mask-bias"),
    (5, "bf16", (2, 2, 1, 150, 150, 20), "causal-bias"),
    (3, "f32", (2, 2, 2, 37, 53, 9), "bias-rows"),
    (130, "f32", (2, 2, 1, 37, 37, 9), "mask-causal-bias-whole"),
    (7, "bf16", (1, 2, 2, 9, 0, 9), "bias-whole"),
    (9, "f32", (2, 2, 1, 4, 0, 8), "mask"),
    (9, "f32", (2, 2, 1, 4, 0, 8), "bias"),
    (9, "f32", (2, 2, 1, 0, 4, 8), "all"),
    (9, "f32", (0, 2, 1, 4, 4, 8), "all"),
    (9, "f32", (2, 0, 0, 4, 4, 8), "all"),
]  # fmt: skip
GRADS = ("grad_q", "grad_k", "grad_v")
PREFIX_GRADS = ("grad_prefix_k", "grad_prefix_v")


class Heads(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("strides", c_int64 * 3)]


def _fields(*, backward: bool) -> list[tuple[str, Any]]:
    before = ["grad_y", "q", "k", "v"] if backward else ["q", "k", "v"]
    after = [(name, Heads) for name in (*GRADS, *PREFIX_GRADS)] if backward else []
    return [
        ("struct_size", c_uint32),
        ("num_threads", c_int32),
        ("sizes", c_int64 * 6),
        *((name, Heads) for name in before),
        ("mask", c_void_p),
        ("mask_strides", c_int64 * 4),
        ("bias", c_void_p),
        ("bias_strides", c_int64 * 4),
        ("bias_from", c_int64),
        ("prefix_k", Heads),
        ("prefix_v", Heads),
        ("prefix_length", c_int64),
        ("y", Heads),
        ("lse", c_void_p),
        *after,
        ("scale", c_float),
        *((name, c_int32) for name in ("causal", "dtype", "prefix_dtype")),
    ]


class ForwardArgs(ctypes.Structure):
    _fields_ = _fields(backward=False)


class BackwardArgs(ctypes.Structure):
    _fields_ = _fields(backward=True)


@dataclass
class Case:
    """Arrays of one call and of its results. Memory is [B, L, H, D], as transformers has it."""

    sizes: tuple[int, ...]
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    grad_y: np.ndarray
    mask: np.ndarray | None
    causal: bool
    scale: float
    prefix_k: np.ndarray  # [1, Hkv, P, D]
    prefix_v: np.ndarray
    bias: np.ndarray | None = None
    y: np.ndarray = field(init=False)
    lse: np.ndarray = field(init=False)
    grad_q: np.ndarray = field(init=False)
    grad_k: np.ndarray = field(init=False)
    grad_v: np.ndarray = field(init=False)
    grad_prefix_k: np.ndarray = field(init=False)
    grad_prefix_v: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        b, h, hkv, lq, lk, d = self.sizes
        kind = "bf16" if self.q.dtype == np.uint16 else "f32"
        self.y, self.grad_q = (
            poisoned((b, lq, h, d), kind).transpose(0, 2, 1, 3) for _ in range(2)
        )
        self.grad_k, self.grad_v = (
            poisoned((b, lk, hkv, d), kind).transpose(0, 2, 1, 3) for _ in range(2)
        )
        self.lse = poisoned((b, h, lq))
        kind = "bf16" if self.prefix_k.dtype == np.uint16 else "f32"
        self.grad_prefix_k, self.grad_prefix_v = (
            poisoned(self.prefix_k.shape, kind) for _ in range(2)
        )

    @property
    def prefix(self) -> int:
        return self.prefix_k.shape[2]

    @property
    def bias_from(self) -> int:
        """The first key that the bias has a column for."""
        whole = self.bias is not None and self.bias.shape[3] == self.prefix + self.sizes[4]
        return 0 if whole else self.prefix

    def results(self) -> dict[str, np.ndarray]:
        names = ("y", *GRADS, *(PREFIX_GRADS if self.prefix else ()))
        return {name: getattr(self, name) for name in names}


def poisoned(shape: tuple[int, ...], dtype: str = "f32") -> np.ndarray:
    if dtype == "bf16":
        return np.full(shape, 0x7FC0, np.uint16)
    return np.full(shape, np.nan, np.float32)


def make(
    helper: ModuleType,
    sizes: tuple[int, ...],
    dtype: str,
    way: str = "all",
    prefix: int = 0,
    prefix_dtype: str = "f32",
) -> Case | None:
    """None where a way has no meaning for the sizes."""
    b, h, hkv, lq, lk, d = sizes
    if "causal" in way and lq != lk:
        return None
    rng = np.random.default_rng(sum(sizes))

    def heads(count: int, tokens: int) -> np.ndarray:
        t = rng.standard_normal((b, tokens, count, d)).astype(np.float32)
        return (helper.to_bf16(t) if dtype == "bf16" else t).transpose(0, 2, 1, 3)

    q, k, v, grad_y = heads(h, lq), heads(hkv, lk), heads(hkv, lk), heads(h, lq)
    mask = None
    if way.startswith("mask"):  # one for all heads
        mask = (rng.random((b, 1, lq, lk)) < 0.6).astype(np.uint8)
    elif way == "rows":  # queries that see nothing at all, by one byte each
        mask = (rng.random((b, h, lq, 1)) < 0.6).astype(np.uint8)
    elif way == "shared":  # padding: the same keys for all queries of a sequence
        mask = (rng.random((b, 1, 1, lk)) < 0.6).astype(np.uint8)
    bias = None
    if "bias" in way:  # T5's: of a head, the same for all sequences; or a number for each query
        columns = lk + prefix * ("whole" in way)
        shape = (b, 1, lq, 1) if "rows" in way else (1, h, lq, columns)
        bias = rng.standard_normal(shape).astype(np.float32)
    shared = rng.standard_normal((2, 1, hkv, prefix, d)).astype(np.float32)
    if prefix_dtype == "bf16":
        shared = helper.to_bf16(shared)
    return Case(
        sizes, q, k, v, grad_y, mask, "causal" in way, float(np.float32(d**-0.5)), *shared, bias
    )  # fmt: skip


class Attention:
    """The two functions of a library, with arguments from a case."""

    def __init__(self, core: Any) -> None:
        self.core = core

    @staticmethod
    def _args(
        kind: type[ctypes.Structure], case: Case, threads: int, changes: dict[str, Any]
    ) -> Any:
        args = kind()
        args.struct_size, args.num_threads = ctypes.sizeof(kind), threads
        args.sizes = case.sizes
        for name, of in kind._fields_:
            if of is Heads:
                t = getattr(case, name)
                strides = tuple(s // t.itemsize for s in t.strides[:3])
                setattr(args, name, Heads(t.ctypes.data, strides))
        for name, m in (("mask", case.mask), ("bias", case.bias)):
            if m is not None:
                setattr(args, name, m.ctypes.data)
                strides = [
                    0 if n == 1 else s // m.itemsize
                    for n, s in zip(m.shape, m.strides, strict=True)
                ]
                setattr(args, f"{name}_strides", tuple(strides))
        args.bias_from = case.bias_from
        args.lse = case.lse.ctypes.data
        args.scale, args.causal = case.scale, case.causal
        args.dtype = int(case.q.dtype == np.uint16)
        args.prefix_length = case.prefix
        args.prefix_dtype = int(case.prefix_k.dtype == np.uint16)
        for name, value in changes.items():
            setattr(args, name, value)
        return args

    def forward(self, case: Case, threads: int = 2, **changes: Any) -> int:
        args = self._args(ForwardArgs, case, threads, changes)
        return int(self.core.lib.deltaops_cpu_attention_forward(ctypes.byref(args)))

    def backward(self, case: Case, threads: int = 2, **changes: Any) -> int:
        args = self._args(BackwardArgs, case, threads, changes)
        return int(self.core.lib.deltaops_cpu_attention_backward(ctypes.byref(args)))

    def both(self, case: Case, threads: int = 2) -> None:
        assert self.forward(case, threads) == 0, self.core.error()
        assert self.backward(case, threads) == 0, self.core.error()


@pytest.fixture
def attention(core: Any) -> Attention:
    return Attention(core)


def seen(case: Case) -> np.ndarray:
    """[B, H, Lq, P + Lk]."""
    b, h, _, lq, lk, _ = case.sizes
    out = np.ones((b, h, lq, lk), bool)
    if case.causal:
        out = np.tril(out)
    if case.mask is not None:
        out = out & (case.mask != 0)
    return np.concatenate([np.ones((b, h, lq, case.prefix), bool), out], -1)


def formula(
    case: Case, wide: Callable[[np.ndarray], np.ndarray], round_y: Callable[[np.ndarray], Any]
) -> dict[str, np.ndarray]:
    """The formula of deltaops.h in the type that ``wide`` gives; y is rounded before its use."""
    q, grad_y = wide(case.q), wide(case.grad_y)
    b, h, hkv, _, lk, d = case.sizes
    k, v = (
        np.concatenate([np.repeat(wide(shared), b, 0), wide(own)], 2)
        for shared, own in ((case.prefix_k, case.k), (case.prefix_v, case.v))
    )
    lk += case.prefix
    group = h // hkv if hkv else 1
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    visible, scale = seen(case), q.dtype.type(case.scale)
    scores = q @ k.swapaxes(2, 3) * scale
    if case.bias is not None:
        scores[..., case.bias_from :] += case.bias
    scores = np.where(visible, scores, -np.inf)
    top = np.max(scores, -1, keepdims=True, initial=-np.finfo(q.dtype).max)
    e = np.exp(scores - top)
    total = e.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.where(total == 0, np.inf, top + np.log(total))[..., 0]
    p = e / np.where(total == 0, 1, total)
    y = round_y(p @ v)
    ds = p * (grad_y @ v.swapaxes(2, 3) - (grad_y * wide(y)).sum(-1, keepdims=True)) * scale

    def shared(t: np.ndarray) -> np.ndarray:
        return t.reshape(b, hkv, group, lk, d).sum(2) if hkv else t.reshape(b, hkv, lk, d)

    grad_k, grad_v = shared(ds.swapaxes(2, 3) @ q), shared(p.swapaxes(2, 3) @ grad_y)
    return {
        "y": wide(y),
        "lse": lse,
        "grad_q": ds @ k,
        "grad_k": grad_k[:, :, case.prefix :],
        "grad_v": grad_v[:, :, case.prefix :],
        "grad_prefix_k": grad_k[:, :, : case.prefix].sum(0, keepdims=True),
        "grad_prefix_v": grad_v[:, :, : case.prefix].sum(0, keepdims=True),
    }


def exact(helper: ModuleType, case: Case) -> dict[str, np.ndarray]:
    return formula(case, helper.to_f64, lambda y: y)


def rounded(helper: ModuleType, case: Case) -> dict[str, np.ndarray]:
    """The formula in float32, y rounded to the type of the case."""
    bf16 = case.q.dtype == np.uint16

    def wide(t: np.ndarray) -> np.ndarray:
        return helper.to_f64(t).astype(np.float32)

    return formula(case, wide, helper.to_bf16 if bf16 else lambda y: y)


@functools.cache
def known(
    helper: ModuleType, *given: Any
) -> tuple[Case, dict[str, np.ndarray], dict[str, np.ndarray]] | None:
    """A case, exact and rounded results: made once for all instruction sets."""
    case = make(helper, *given)
    return None if case is None else (case, exact(helper, case), rounded(helper, case))


def off(got: np.ndarray, want: np.ndarray) -> float:
    """Relative L2 error."""
    norm = float(np.linalg.norm(want))
    return float(np.linalg.norm(got - want)) / (norm or 1.0)


def holds_for_any_team(attention: Attention, helper: ModuleType, *given: Any) -> None:
    """As tolerances.py has it: twice what the formula is off in float32, and one rounding."""
    found = known(helper, *given)
    if found is None:
        return
    first, want, low = found
    bits = set()
    for threads in (1, 2, 3, 2):
        case = replace(first)  # with results of its own, poisoned
        attention.both(case, threads)
        bits.add(b"".join(t.tobytes() for t in (*case.results().values(), case.lse)))
    sizes = f"{case.sizes} after {case.prefix}"
    assert len(bits) == 1, f"{sizes}: neither the team nor a second run may change a bit"
    for name, result in case.results().items():
        rounding = ROUNDING["bf16" if result.dtype == np.uint16 else "f32"]
        bound = 2 * (off(low[name], want[name]) + rounding)
        error = off(helper.to_f64(result), want[name])
        assert error <= bound, f"{sizes} {name}: {error} > {bound}"
    np.testing.assert_allclose(case.lse, want["lse"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_matches_float64_for_any_team(
    attention: Attention, core_module: ModuleType, way: str, dtype: str
) -> None:
    for sizes in SHAPES:
        holds_for_any_team(attention, core_module, sizes, dtype, way)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prefix_matches_float64_for_any_team(
    attention: Attention, core_module: ModuleType, dtype: str
) -> None:
    for prefix, kind, sizes, way in PREFIXED:
        holds_for_any_team(attention, core_module, sizes, dtype, way, prefix, kind)


def test_a_query_that_sees_nothing_gets_zeros(
    attention: Attention, core_module: ModuleType
) -> None:
    """Unless there is a prefix: that is seen by all, and by these alone."""
    case, beside = (make(core_module, (2, 2, 1, 60, 60, 20), "f32", "rows", p) for p in (0, 3))
    assert case is not None
    attention.both(case)
    blind = ~seen(case).any(-1)
    attention.both(beside)
    assert all(np.isfinite(t).all() for t in (*beside.results().values(), beside.lse))
    assert beside.y[blind].any()
    assert blind.any()
    assert not case.y[blind].any()
    assert np.isposinf(case.lse[blind]).all()
    assert not case.grad_q[blind].any()
    assert np.isfinite(case.grad_k).all()


@pytest.mark.parametrize("way", ["all", "causal", "mask"])
def test_large_scores_do_not_overflow(
    attention: Attention, core_module: ModuleType, way: str
) -> None:
    """The largest score wins all; beside it exp(-10000) is 0, and no difference is infinite."""
    case = make(core_module, (1, 2, 2, 140, 140, 16), "f32", way)
    assert case is not None
    case.q *= np.float32(3e4)
    attention.both(case)
    for name, result in case.results().items():
        assert np.isfinite(result).all(), name
    visible = seen(case)
    scores = np.where(visible, case.q.astype(float) @ case.k.swapaxes(2, 3).astype(float), -np.inf)
    first, second = np.sort(scores, -1)[..., -1], np.sort(scores, -1)[..., -2]
    clear = (first - second) * case.scale > 100
    best = np.take_along_axis(case.v, scores.argmax(-1)[..., None], 2)
    np.testing.assert_allclose(case.y[clear], best[clear], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_comes_out_where_it_is_seen(
    attention: Attention, core_module: ModuleType, dtype: str
) -> None:
    nan = 0x7FC0 if dtype == "bf16" else np.nan
    for name, row in (("q", 30), ("k", 140), ("v", 140)):
        case = make(core_module, (1, 1, 1, 150, 150, 20), dtype, "causal")
        assert case is not None
        getattr(case, name)[0, 0, row, 7] = nan
        attention.both(case)
        y, grad_q = core_module.to_f64(case.y), core_module.to_f64(case.grad_q)
        hit = np.arange(150) == row if name == "q" else np.arange(150) >= row
        assert np.isnan(y[0, 0, hit]).any(-1).all(), name
        assert np.isnan(grad_q[0, 0, hit]).any(-1).all(), name
        far = np.arange(150) < row - 16 if name != "q" else ~hit
        assert not np.isnan(y[0, 0, far]).any(), name
        assert not np.isnan(grad_q[0, 0, far]).any(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_and_nothing_around_them_is_touched(
    attention: Attention, core_module: ModuleType, dtype: str
) -> None:
    sizes = 2, 3, 3, 23, 23, 22
    plain = make(core_module, sizes, dtype, "causal")
    case = make(core_module, sizes, dtype, "causal")
    assert plain is not None
    assert case is not None
    attention.both(plain)
    # Gradients side by side in one buffer, as those of a merged projection; y among gaps.
    wide = poisoned((2, 23, 5, 3, 3, 22), dtype)
    for i, name in enumerate(GRADS):
        setattr(case, name, wide[:, :, 1, i].transpose(0, 2, 1, 3))
    gaps = poisoned((2, 5, 23, 24), dtype)
    case.y = gaps[:, 1:4, :, 1:23][:, ::-1]
    for name in ("q", "k", "v", "grad_y"):
        setattr(case, name, np.ascontiguousarray(getattr(case, name)[:, ::-1])[:, ::-1])
    # y is written, so its heads may not run backwards; what is read may.
    case.y = gaps[:, 1:4, :, 1:23]
    attention.both(case)
    for name in ("y", *GRADS):
        np.testing.assert_array_equal(getattr(case, name), getattr(plain, name), err_msg=name)
    touched = np.ones(wide.shape, bool)
    touched[:, :, 1] = False
    np.testing.assert_array_equal(wide[touched], poisoned(wide.shape, dtype)[touched])
    gaps[:, 1:4, :, 1:23] = poisoned((1,), dtype)
    np.testing.assert_array_equal(gaps, poisoned(gaps.shape, dtype))


WANTED = [(), ("grad_q",), ("grad_k",), ("grad_v",), ("grad_prefix_k",), PREFIX_GRADS]


@pytest.mark.parametrize("wanted", WANTED, ids="-".join)
def test_only_what_is_wanted_is_written(
    attention: Attention, core_module: ModuleType, wanted: tuple[str, ...]
) -> None:
    sizes = 2, 4, 2, 50, 140, 20
    full, case = (make(core_module, sizes, "f32", prefix=30) for _ in range(2))
    assert full is not None
    assert case is not None
    attention.both(full)
    assert attention.forward(case) == 0
    absent = {name: Heads() for name in (*GRADS, *PREFIX_GRADS) if name not in wanted}
    assert attention.backward(case, **absent) == 0, attention.core.error()
    for name in (*GRADS, *PREFIX_GRADS):
        want = getattr(full, name) if name in wanted else poisoned((1,))
        np.testing.assert_array_equal(
            getattr(case, name), np.broadcast_to(want, getattr(case, name).shape)
        )


def test_lse_may_be_absent(attention: Attention, core_module: ModuleType) -> None:
    case, other = (make(core_module, (1, 2, 2, 20, 20, 8), "f32") for _ in range(2))
    assert case is not None
    assert other is not None
    assert attention.forward(case, lse=None) == 0
    assert attention.forward(other) == 0
    np.testing.assert_array_equal(case.y, other.y)
    assert np.isnan(case.lse).all()


S6, S4, ENDLESS = c_int64 * 6, c_int64 * 4, 2**62
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "struct_size": ({"struct_size": 8}, "struct_size must be"),
    "threads": ({"num_threads": 0}, "num_threads must be 1"),
    "negative": ({"sizes": S6(2, 2, 1, -1, 5, 6)}, "Lq must be 0 to 2^40, got -1"),
    "no-columns": ({"sizes": S6(2, 2, 1, 5, 5, 0)}, "D must be at least 1, got 0"),
    "group": ({"sizes": S6(2, 3, 2, 5, 5, 6)}, "H must be a multiple of Hkv, got H=3, Hkv=2"),
    "no-keys-heads": ({"sizes": S6(2, 2, 0, 5, 5, 6)}, "H must be a multiple of Hkv"),
    "long": ({"sizes": S6(1, 1, 1, 2**35, 2**35, 6)}, "(Lq H / Hkv + P + Lk) D must be at most"),
    "wide": ({"sizes": S6(1, 2**40, 1, 2**40, 5, 6)}, "(Lq H / Hkv + P + Lk) D must be at most"),
    "prefix": ({"prefix_length": -1}, "prefix_length must be 0 to 2^40, got -1"),
    "long-prefix": (
        {"sizes": S6(1, 2**20, 2**20, 5, 5, 6), "prefix_length": 2**20},
        "Hkv P D must be at most 2^36",
    ),
    "prefix-dtype": ({"prefix_dtype": -1}, "prefix_dtype must be 0 (f32) or 1 (bf16), got -1"),
    **{
        f"prefix-{n}-null": ({f"prefix_{n}": Heads()}, f"prefix_{n} must point to its elements")
        for n in "kv"
    },
    "huge": ({"sizes": S6(2**30, 2, 1, 2**20, 5, 6)}, "the sizes must stay below 2^56"),
    "dtype": ({"dtype": 7}, "dtype must be 0 (f32) or 1 (bf16), got 7"),
    "causal": ({"causal": 2}, "causal must be 0 or 1, got 2"),
    "oblong": (
        {"causal": 1, "sizes": S6(2, 2, 1, 4, 5, 6)},
        "causal needs as many queries as keys, got Lq=4, Lk=5",
    ),
    **{f"{n}-null": ({n: Heads()}, f"{n} must point to its elements") for n in "qkvy"},
    "mask-stride": ({"mask_strides": S4(25, 0, 5, 2)}, "mask must have stride 1 along the keys"),
    "mask-far": ({"mask_strides": S4(ENDLESS, 0, 5, 1)}, "mask must span at most 2^56 bytes"),
}  # fmt: skip
SIZES = 2, 2, 1, 5, 5, 6


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("changes", "sentence"), WRONG.values(), ids=WRONG)
def test_bad_arguments_end_in_a_status_and_change_nothing(
    attention: Attention,
    core_module: ModuleType,
    changes: dict[str, Any],
    sentence: str,
    backward: bool,
) -> None:
    case = make(core_module, SIZES, "f32", "mask", 3)
    assert case is not None
    call, name = (
        (attention.backward, "attention_backward")
        if backward
        else (attention.forward, "attention_forward")
    )
    assert call(case, **changes) == 1
    assert attention.core.error().startswith(f"{name}: {sentence}")
    for result in case.results().values():
        assert np.isnan(result).all()
    assert np.isnan(case.lse).all()


def test_backward_needs_its_own(attention: Attention, core_module: ModuleType) -> None:
    case = make(core_module, SIZES, "f32")
    assert case is not None
    for name, nothing in (("grad_y", Heads()), ("y", Heads()), ("lse", None)):
        assert attention.backward(case, **{name: nothing}) == 1
        assert f"{name} must point to its elements" in attention.core.error()


def test_addresses_must_be_aligned(attention: Attention, core_module: ModuleType) -> None:
    case = make(core_module, SIZES, "f32", prefix=3)
    assert case is not None
    for name in ("q", "k", "v", "prefix_k", "prefix_v", "y", "grad_y", *GRADS, *PREFIX_GRADS):
        t = getattr(case, name)
        moved = Heads(t.ctypes.data + 2, tuple(s // 4 for s in t.strides[:3]))
        assert attention.backward(case, **{name: moved}) == 1
        assert f"{name} must be aligned to 4 bytes" in attention.core.error()
    assert attention.forward(case, lse=case.lse.ctypes.data + 2) == 1
    assert "lse must be aligned to 4 bytes" in attention.core.error()


def test_outputs_stand_apart(attention: Attention, core_module: ModuleType) -> None:
    case = make(core_module, SIZES, "f32", "mask", 3)
    assert case is not None
    assert case.mask is not None
    grads, read = (*GRADS, *PREFIX_GRADS), ("q", "k", "v", "prefix_k", "prefix_v")

    def at(t: np.ndarray, like: np.ndarray) -> Heads:
        return Heads(t.ctypes.data, tuple(s // like.itemsize for s in like.strides[:3]))

    for name in (*read, "lse"):
        assert attention.forward(case, y=at(getattr(case, name), case.y)) == 1
        assert "written, so it must not overlap" in attention.core.error(), name
    for grad in grads:
        for name in (*read, "y", "grad_y", "lse", *(g for g in grads if g != grad)):
            changes = {grad: at(getattr(case, name), getattr(case, grad))}
            assert attention.backward(case, **changes) == 1
            assert "written, so it must not overlap" in attention.core.error(), (grad, name)
    mask = case.mask.ctypes.data & ~3  # the word in which the mask begins
    assert attention.forward(case, lse=mask) == 1
    assert "lse is written, so it must not overlap mask" in attention.core.error()
    for strides in ((60, 5, 12), (60, 6, 11), (59, 30, 6), (0, 6, 12)):
        assert attention.forward(case, y=Heads(case.y.ctypes.data, strides)) == 1
        assert "y is written, so its heads must not overlap" in attention.core.error()


def test_null_is_refused(core: Any) -> None:
    for name in ("forward", "backward"):
        assert getattr(core.lib, f"deltaops_cpu_attention_{name}")(None) == 1
        assert core.error() == f"attention_{name}: args must not be NULL."
