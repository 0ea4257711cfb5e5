"""What ``delta_linear`` of ``deltaops.jax`` is on CUDA: lowered as such, and its parts, each as its
definition says, together what the CPU's calls are. No GPU has run the handlers yet."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
if importlib.util.find_spec("deltaops._xla") is None:
    pytest.skip("deltaops was built without jax", allow_module_level=True)

import jax.numpy as jnp  # noqa: E402 -- where jax is

import deltaops.jax as dj  # noqa: E402 -- so too
from deltaops.bindings.jax import layers, on_cuda  # noqa: E402 -- so too
from deltaops.bindings.jax.ffi import like  # noqa: E402 -- so too

M, N, K, R = 6, 5, 7, 3
P = 16384  # of 65536


def draw(seed: int, *shape: int) -> Any:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def drop(x: Any, seed: Any, threshold: int, branch: int) -> Any:
    if threshold == 0:
        return x
    keep = dj.dropout_mask(seed, x.shape, threshold / 65536, branch=branch)
    return x * keep * (65536 / (65536 - threshold))


def parts(name: str, results: Any, operands: Any, **given: Any) -> list[Any]:
    """Each part in float32, rounded once."""
    wide = [o if o.dtype == jnp.uint32 else o.astype(jnp.float32) for o in operands]
    threshold, branch = given.get("threshold"), given.get("branch")
    if name == "gemm":
        count = len(threshold)
        out, seed = 0.0, wide[-1]
        for i in range(count):
            right = wide[count + i] if given["across"] else wide[count + i].T
            out += drop(wide[i] @ right, seed, int(threshold[i]), int(branch[i]))
        found = [out + (wide[2 * count] if given["biased"] else 0.0)]
    elif name == "project":
        x, a = wide[:2]
        s = given["scaling"] * drop(x, wide[-1], int(threshold), int(branch)) @ a.T
        found = [s, s]
    elif name == "grad_up":
        rest = iter(wide[1:])
        makers = [
            lambda: given["scaling"] * wide[0] @ next(rest),
            lambda: wide[0].T @ next(rest),
            lambda: wide[0].sum(0),
        ]
        found = [make() for make, flag in zip(makers, given["wanted"], strict=True) if flag]
    else:
        ds, x = wide[:2]
        found = [ds.T @ drop(x, wide[-1], int(threshold), int(branch))]
    assert [f.shape for f in found] == [r.shape for r in results[: len(found)]]
    padding = [jnp.zeros(r.shape, r.dtype) for r in results[len(found) :]]
    return [f.astype(r.dtype) for f, r in zip(found, results, strict=False)] + padding


@pytest.mark.parametrize("transposed", [(False, True), (True, True)], ids=["mixed", "flax"])
@pytest.mark.parametrize("threshold", [0, P])
def test_parts_make_what_the_cpu_computes(
    transposed: tuple[bool, bool], threshold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_cuda, "ffi_call", parts)
    monkeypatch.setattr(on_cuda, "_workspace", lambda *_: like((0,), jnp.uint8))
    settings = [
        layers.Settings((2.0, 0.5), (0, threshold), (0, 0), transposed[0], 1),
        layers.Settings((3.0,), (0,), (0,), transposed[1], 1),
    ]
    given: list[Any] = []
    for i, mine in enumerate(settings):
        shape = (K, N) if mine.transposed else (N, K)
        layer = {"weight": draw(i, *shape), "bias": draw(2 + i, N)}
        for j in range(len(mine.scaling)):
            layer |= {f"a.{j}": draw(4 + i + j, R, K), f"b.{j}": draw(7 + i + j, N, R)}
        given.append(layer)
    if threshold:
        given[0]["seed"] = jax.random.key_data(jax.random.key(9))
    x, grads = draw(10, M, K), [draw(11, M, N), draw(12, M, N)]
    assert on_cuda.takes(settings, [x], given)
    y, s = on_cuda.forward(settings, x, given)
    want_y, want_s = layers._forward_on_cpu(settings, True, x, given)
    close([*y, *s], [*want_y, *want_s])

    kept = [layer | {"s": state} for layer, state in zip(given, want_s, strict=True)]
    wanted = [["x", "bias", "a.0", "b.0", "a.1", "b.1"], ["bias", "b.0"]]
    got_x, got = on_cuda.backward(settings, grads, x, kept, wanted, True)
    want_x, want = layers._backward_on_cpu(settings, wanted, True, grads, x, kept)
    assert [set(one) for one in got] == [{*names} - {"x"} for names in wanted]
    close([got_x, *(g[n] for g in got for n in sorted(g))],
          [want_x, *(g[n] for g in want for n in sorted(g))])  # fmt: skip
    none, (frozen, _) = on_cuda.backward(settings, grads, None, kept, [["bias"], []], False)
    assert none is None
    close([frozen["bias"]], [want[0]["bias"]])


def close(got: list[Any], want: list[Any]) -> None:
    for one, other in zip(got, want, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        a, b = np.asarray(one, np.float32), np.asarray(other, np.float32)
        # S and dS are rounded to bfloat16 on the way, there
        np.testing.assert_allclose(a, b, atol=2**-6 * np.abs(b).max())


def test_a_program_for_cuda_calls_the_parts() -> None:
    if importlib.util.find_spec("deltaops._xla_cuda") is None:
        pytest.skip("deltaops was built without jax or nvcc")
    x, w, a, b = draw(0, M, K), draw(1, N, K), draw(2, R, K), draw(3, N, R)

    def loss(x: Any, a: Any, b: Any) -> Any:
        return dj.delta_linear(x, w, None, [dj.Branch(a, b, 2.0)]).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, a, b)
    parts = {"gemm", "project", "grad_up", "grad_down"}
    whole = {"delta_linear_forward", "delta_linear_backward"}
    for platform, calls in (("cuda", parts), ("cpu", whole)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert set(re.findall(r"custom_call @deltaops_(\w+)", text)) == calls


def test_the_cpu_gives_the_same_bits_where_cuda_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("deltaops._xla_cuda") is None:
        pytest.skip("deltaops was built without jax or nvcc")
    w, bias, key = draw(1, N, K), draw(2, N), jax.random.key(3)

    def layer(x: Any, a: Any, b: Any) -> Any:
        return dj.delta_linear(x, w, bias, [dj.Branch(a, b, 2.0, 0.25)], key=key)

    def loss(*given: Any) -> Any:
        return layer(*given).astype(jnp.float32).sum()

    given, found = (draw(0, M, K), draw(4, R, K), draw(5, N, R)), []
    for built in (True, False):
        monkeypatch.setattr(layers, "cuda_built", lambda built=built: built)
        each = jax.vmap(layer, (0, None, None))(given[0][:, None], *given[1:])
        found.append([layer(*given), each, *jax.grad(loss, (0, 1, 2))(*given)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize(
    "branch",
    [
        dj.Branch(draw(0, R, K), draw(1, N, R), activation="relu"),
        dj.Branch(draw(0, R, K).astype(jnp.float32), draw(1, N, R).astype(jnp.float32)),
        dj.Branch(draw(0, R, K), draw(1, N, R), bias=draw(2, R)),
    ],
    ids=["activation", "float32", "bias"],
)
def test_what_cuda_has_no_call_for_is_not_made_of_parts(branch: dj.Branch) -> None:
    layer = jax.jit(lambda x, branch: dj.delta_linear(x, draw(3, N, K), None, [branch]))
    text = layer.trace(draw(4, M, K), branch).lower(lowering_platforms=("cuda",)).as_text()
    assert "@deltaops_delta_linear_forward" in text  # for which XLA has no handler there
    assert "@deltaops_gemm" not in text
