"""``delta_linear`` of ``deltaops.jax`` on a real GPU beside the CPU. `make gpu` runs these."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # others share the GPU
jax = pytest.importorskip("jax")
if importlib.util.find_spec("deltaops._xla_cuda") is None:
    pytest.skip("deltaops was built without jax or nvcc", allow_module_level=True)

import jax.numpy as jnp  # noqa: E402 -- where jax is

import deltaops.jax as dj  # noqa: E402 -- so too

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="jax finds no GPU here"),
]


def draw(seed: int, *shape: int, scale: float = 1.0) -> Any:
    # on the CPU: the GPU's normal numbers differ in their last bits
    wide = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(scale * wide, jnp.bfloat16)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(("m", "n", "k", "rank"), [(6, 5, 7, 3), (300, 136, 264, 16)])
def test_a_layer_and_its_gradients_are_those_of_the_cpu(
    m: int, n: int, k: int, rank: int, dropout: float
) -> None:
    operands = [
        draw(0, m, k), draw(1, n, k, scale=k**-0.5), draw(2, n),
        draw(3, rank, k, scale=k**-0.5), draw(4, n, rank), draw(5, m, n),
    ]  # fmt: skip

    def both_ways(x: Any, w: Any, bias: Any, a: Any, b: Any, grad_y: Any) -> list[Any]:
        key = jax.random.key(7) if dropout else None

        def layer(x: Any, bias: Any, a: Any, b: Any) -> Any:
            return dj.delta_linear(x, w, bias, [dj.Branch(a, b, 2.0, dropout)], key=key)

        y, back = jax.vjp(layer, x, bias, a, b)
        return [y, *back(grad_y)]

    found = []
    for device in (jax.devices("gpu")[0], jax.devices("cpu")[0], jax.devices("gpu")[0]):
        given = [jax.device_put(o, device) for o in operands]
        found.append([np.asarray(t, np.float32) for t in jax.jit(both_ways)(*given)])
    for got, want, again in zip(*found, strict=True):
        # S and dS are rounded to bfloat16 on the way, there
        np.testing.assert_allclose(got, want, atol=2**-6 * np.abs(want).max())
        np.testing.assert_array_equal(got, again)
