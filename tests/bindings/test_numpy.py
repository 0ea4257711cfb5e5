"""``deltaops.numpy``: results go where they are asked to, and no array is copied or crashes it.

Values are held to torch's bits in test_conformance.py.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deltaops.numpy as dn
from deltaops.bindings.numpy import linear
from deltaops.errors import ConfigError, DeltaopsError, DtypeError, LayoutError, ShapeError

M, N, K, R = 6, 5, 8, 3
RANDOM = np.random.default_rng(0)


def draw(*shape: int) -> Any:
    return RANDOM.standard_normal(shape, np.float32)


X, W, BIAS, BRANCH = draw(M, K), draw(N, K), draw(N), dn.Branch(draw(R, K), draw(N, R), 2.0)


def misaligned(a: Any) -> Any:
    raw = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    raw[...] = a
    return raw


def read_only(a: Any) -> Any:
    a = a.copy()
    a.flags.writeable = False
    return a


def test_it_is_the_layer() -> None:
    y = dn.delta_linear(X, W, BIAS, [BRANCH])
    np.testing.assert_allclose(y, X @ W.T + BIAS + 2 * (X @ BRANCH.a.T) @ BRANCH.b.T, rtol=1e-4)


def test_results_go_where_out_says() -> None:
    y, s = np.full((M, N), np.nan, np.float32), np.full((M, R), np.nan, np.float32)
    got = dn.delta_linear_forward(X, W, BIAS, [BRANCH], out=(y, s))
    assert got[0] is y
    assert got[1] is s
    into = {"a.0": np.full((R, K), np.nan, np.float32)}
    grads = dn.delta_linear_backward(y, X, W, s, [BRANCH], wanted=["x", "a.0"], out=into)
    assert list(grads) == ["x", "a.0"]
    assert grads["a.0"] is into["a.0"]
    assert not any(np.isnan(a).any() for a in (y, s, *grads.values()))


@pytest.mark.parametrize("order", ["C", "F"])
def test_packed_weights_follow_their_weight(order: Any) -> None:
    weight = np.array(draw(70, 64), order=order)
    x, packed = draw(9, 64), dn.PackedWeight(weight)
    for _ in range(2):
        y, s = dn.delta_linear_forward(x, packed)
        np.testing.assert_array_equal(y, dn.delta_linear(x, weight))
        grads = [dn.delta_linear_backward(y, None, w, s, wanted=["x"]) for w in (packed, weight)]
        np.testing.assert_array_equal(grads[0]["x"], grads[1]["x"])
        weight *= 2  # noticed: the next round packs again
    assert packed.nbytes > 0
    packed.renew()
    assert packed.nbytes == 0


def test_packed_memory_outlives_its_renewal_while_it_is_read() -> None:
    packed = dn.PackedWeight(W)
    layer = linear.Checked(packed, [])
    layer.packed_memory(False)
    alive = weakref.ref(packed.memory(False))
    packed.renew()  # as another thread may
    assert alive() is not None
    del layer
    assert alive() is None


def test_rows_may_lie_apart_and_weights_be_transposed() -> None:
    wide, conv = draw(M, K + 5), np.asfortranarray(W)
    expected = dn.delta_linear(wide[:, :K].copy(), W, BIAS, [BRANCH])
    got = dn.delta_linear(wide[:, :K], conv, BIAS, [BRANCH])
    np.testing.assert_allclose(got, expected, rtol=1e-5)  # few rows add in the order of the memory


def test_a_group_is_its_layers_with_one_gradient_of_x() -> None:
    layers = [
        dn.Layer(W, BIAS, [BRANCH._replace(dropout=0.5)], seed=3),
        dn.Layer(dn.PackedWeight(np.asfortranarray(draw(9, K)))),
    ]
    out = [(np.full((M, N), np.nan, np.float32), None), (None, None)]
    found = dn.delta_linear_group_forward(X, layers, out=out)
    assert found[0][0] is out[0][0]
    y, s = zip(*found, strict=True)
    grads = dn.delta_linear_group_backward(y, X, layers, s)
    assert list(grads) == ["x", "0.bias", "0.a.0", "0.b.0", "1.bias"]
    total = np.zeros_like(X)
    for i, (layer, mine) in enumerate(zip(layers, found, strict=True)):
        weight, bias, branches, seed, _ = layer
        alone = dn.delta_linear_forward(X, weight, bias, branches, seed=seed)
        for one, other in zip(mine, alone, strict=True):
            np.testing.assert_array_equal(one, other)
        own = dn.delta_linear_backward(y[i], X, weight, s[i], branches, seed=seed)
        total += own.pop("x")
        for name, grad in own.items():
            np.testing.assert_array_equal(grads[f"{i}.{name}"], grad)
    np.testing.assert_allclose(grads["x"], total, rtol=1e-4, atol=1e-5)
    alone = dn.delta_linear_group_backward(y, None, layers, s, wanted=["1.bias"])
    np.testing.assert_array_equal(alone["1.bias"], grads["1.bias"])


def test_elementwise_and_heads() -> None:
    gate, up, grad = draw(M, K), draw(M, K), draw(M, K)
    act = gate / (1 + np.exp(-gate))
    np.testing.assert_allclose(dn.gated(gate, up), act * up, rtol=1e-5)
    found = dn.gated_backward(grad, gate, up, wanted=["up"])
    np.testing.assert_allclose(found["up"], grad * act, rtol=1e-5)
    np.testing.assert_allclose(dn.gated(gate, None), act, rtol=1e-5)
    alone = dn.gated_backward(grad, gate, None)
    ones = dn.gated_backward(grad, gate, np.ones_like(gate), wanted=["gate"])
    assert list(alone) == ["gate"]
    np.testing.assert_array_equal(alone["gate"], ones["gate"])
    target = np.array([0, 1, -100, 3, 2, 7])
    loss, state = dn.cross_entropy_forward(X, target)
    rows = np.arange(M)[target >= 0]
    p = np.exp(X) / np.exp(X).sum(1, keepdims=True)
    np.testing.assert_allclose(loss, -np.log(p[rows, target[rows]]).mean(), rtol=1e-5)
    p[rows, target[rows]] -= 1
    p[target < 0] = 0
    np.testing.assert_allclose(
        dn.cross_entropy_backward(X, target, state), p / len(rows), rtol=1e-4, atol=1e-7
    )
    x, angle = draw(2, 3, 4, 6), draw(1, 4, 6)
    cos, sin = np.cos(angle), np.sin(angle)
    turned = np.concatenate([-x[..., 3:], x[..., :3]], -1)
    np.testing.assert_allclose(
        dn.rotary(x, cos, sin), x * cos[:, None] + turned * sin[:, None], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: dn.delta_linear(X.astype(np.float64), W), DtypeError, "x must be float32, got"),
        (lambda: dn.delta_linear(X.astype(">f4"), W), DtypeError, "foreign byte order"),
        (lambda: dn.delta_linear(X.tolist(), W), DtypeError, "plain numpy.ndarray, got list"),
        (lambda: dn.delta_linear(np.ma.array(X), W), DtypeError, "got MaskedArray"),
        (lambda: dn.delta_linear(X[0], W), ShapeError, r"x must be \[any, 8\], got \[8\]"),
        (lambda: dn.delta_linear(X[:, :3], W), ShapeError, r"got \[6, 3\]"),
        (lambda: dn.delta_linear(X[:, ::2], draw(N, 4)), LayoutError, "adjacent elements"),
        (lambda: dn.delta_linear(X, draw(9, 20)[::2, ::2][:, :8]), LayoutError, "weight must"),
        (lambda: dn.delta_linear(X, W, draw(2 * N)[::2]), LayoutError, "bias must be contiguous"),
        (lambda: dn.delta_linear(misaligned(X), W), LayoutError, "misaligned"),
        (lambda: dn.delta_linear(X, W, out=read_only(draw(M, N))), LayoutError, "read-only"),
        (lambda: dn.delta_linear(X, W, out=draw(N, M).T), LayoutError, "out must be contiguous"),
        (lambda: dn.delta_linear(X, draw(8, 8), out=X), LayoutError, "overlap"),
        (lambda: dn.delta_linear(X, W, None, [(BRANCH.b, BRANCH.a)]), ShapeError, r"\[0\].a must"),
        (lambda: dn.delta_linear(X, W, adapter=np.zeros(M, np.int64)), DtypeError, "int32"),
        (lambda: dn.delta_linear(X, W, adapter=np.ones(M, np.int32)), LayoutError, "adapter"),
        (lambda: dn.delta_linear(X, W, num_threads=0), ConfigError, "num_threads"),
        (lambda: dn.delta_linear_group_forward(X, []), ShapeError, "layers must be 1 to 16, got 0"),
        (lambda: dn.delta_linear_group_forward(X, [(W,), (draw(N, 9),)]), ShapeError,
         r"layers\[1\]\.weight must be \[any, 8\], got \[5, 9\]"),
        (lambda: dn.delta_linear_group_backward([X], X, [(W,), (W,)], [None]), ShapeError,
         "grad_y must be one for each of 2 layers, got 1"),
        (lambda: dn.delta_linear_group_forward(X, [(draw(8, K),)], out=[(X, None)]), LayoutError,
         "overlap"),
        (lambda: dn.gated_backward(X, X, None, wanted=["gate", "up"]), LayoutError, r"up \(needed"),
        (lambda: dn.gated(X, X, activation="swish"), ConfigError, "must be one of identity"),
        (lambda: dn.cross_entropy_forward(X, np.full(M, 9)), LayoutError, "target"),
        (lambda: dn.attention_forward(*[draw(2, 2, 3, 0)] * 3), ShapeError, "D ≥ 1"),
        (lambda: dn.rotary(draw(1, 1, 2, 5), draw(1, 2, 5), draw(1, 2, 5)), ShapeError, "D even"),
        (lambda: dn.attention_forward(draw(2, 3, 5, 8), *HEADS[1:]), ShapeError, "multiple of the"),
        (lambda: dn.attention_forward(*HEADS, scale=np.inf), ConfigError, "scale must be finite"),
        (lambda: dn.norm_bias_backward(X, X, draw(M, 2), wanted=["gamma"]), ConfigError, "gamma"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(
    call: Callable[[], Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        call()


def far_apart(a: Any) -> Any:
    """One row, and a stride to the next that leaves memory."""
    return np.lib.stride_tricks.as_strided(a, (1, *a.shape[1:]), (2**40, *a.strides[1:]))


def odd(a: Any, how: str) -> Any:
    """An array made unfit, or fit in an unusual way."""
    return {
        "as it is": lambda: a,
        "double": lambda: a.astype(np.float64),
        "swapped": lambda: a.astype(a.dtype.newbyteorder()),
        "transposed": lambda: a.T,
        "reversed": lambda: a[::-1],
        "backwards": lambda: a[..., ::-1],
        "every second": lambda: a[::2],
        "repeated": lambda: np.broadcast_to(a[:1], a.shape),
        "misaligned": lambda: misaligned(a),
        "read-only": lambda: read_only(a),
        "empty": lambda: a[:0],
        "deeper": lambda: a[None],
        "flat": lambda: a.reshape(-1),
        "text": lambda: a.astype(str),
        "none": lambda: None,
        "list": lambda: a.tolist(),
        "huge strides": lambda: far_apart(a),
    }[how]()  # fmt: skip


HOWS = st.sampled_from([
    "as it is", "double", "swapped", "transposed", "reversed", "backwards", "every second",
    "repeated", "misaligned", "read-only", "empty", "deeper", "flat", "text", "none", "list",
    "huge strides",
])  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(how=st.tuples(*[HOWS] * 7))
def test_no_array_crashes_it(how: tuple[str, ...]) -> None:
    """Right and the same again, or one of our errors."""
    x, w, bias, a, b, out, s = (
        odd(array, kind)
        for array, kind in zip(
            (X, W, BIAS, BRANCH.a, BRANCH.b, np.zeros((M, N), np.float32), draw(M, R)),
            how,
            strict=True,
        )
    )
    branches = [dn.Branch(a, b)]
    with contextlib.suppress(DeltaopsError):
        first = dn.delta_linear(x, w, bias, branches, num_threads=1, out=out).copy()
        again = dn.delta_linear(x, w, bias, branches, num_threads=1)
        np.testing.assert_array_equal(first, again)
        expected = np.asarray(x) @ np.asarray(w).T + (0 if bias is None else bias)
        np.testing.assert_allclose(first, expected + (x @ a.T) @ b.T, rtol=1e-3, atol=1e-4)
    with contextlib.suppress(DeltaopsError):
        dn.delta_linear_backward(out, x, w, s, branches, num_threads=1)


HEADS = [draw(2, 4, 5, 8), draw(2, 2, 5, 8), draw(2, 2, 5, 8)]
OTHERS: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "bottleneck": (dn.bottleneck_forward, [X, draw(R, K), draw(K, R), draw(R), draw(K)]),
    "norm_bias": (dn.norm_bias_forward, [X, draw(K), draw(K)]),
    "gated": (dn.gated, [X, draw(M, K)]),
    "gated_backward": (dn.gated_backward, [X, draw(M, K), draw(M, K)]),
    "cross_entropy": (dn.cross_entropy_forward, [X, np.arange(M)]),
    "rotary": (dn.rotary, [HEADS[0], draw(1, 5, 8), draw(1, 5, 8)]),
    "attention": (dn.attention_forward, HEADS),
}


@pytest.mark.parametrize("op", OTHERS)
def test_no_array_crashes_the_others(op: str) -> None:
    call, arrays = OTHERS[op]
    choice = st.one_of(st.just("as it is"), HOWS)

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(choice, min_size=len(arrays), max_size=len(arrays)))
    def check(hows: list[str]) -> None:
        given = [odd(array, how) for array, how in zip(arrays, hows, strict=True)]
        with contextlib.suppress(DeltaopsError):
            got = call(*given, num_threads=1)
            plain = [None if a is None else np.array(a, order="C") for a in given]
            want = call(*plain, num_threads=1)
            for one, other in zip(results(got), results(want), strict=True):
                np.testing.assert_array_equal(one, other)

    check()


def results(found: Any) -> list[Any]:
    """Of an op: one, several, or by name."""
    if isinstance(found, dict):
        return list(found.values())
    return list(found) if isinstance(found, tuple) else [found]
