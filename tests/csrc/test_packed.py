"""A weight packed once gives the bits of the weight itself, and a wrong one is refused."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

SHAPES = [(1, 1, 1), (5, 7, 3), (13, 33, 70), (70, 64, 1029), (200, 129, 130)]


def layer_of(helper: ModuleType, shape: tuple[int, int, int], dtype: str, layout: str) -> Any:
    generator = np.random.default_rng(sum(shape))

    def random(rows: int, cols: int) -> np.ndarray:
        values = generator.standard_normal((rows, cols)).astype(np.float32)
        return helper.to_bf16(values) if dtype == "bf16" else values

    m, n, k = shape
    weight = random(n, k) if layout == "row" else random(k, n).T
    x, adapter = random(m, k), helper.Adapter(random(3, k), random(n, 3), 0.5, 9000)
    return helper.Layer(x, weight, None, [adapter])


def use(packed: np.ndarray) -> dict[str, object]:
    return {"packed_weight": packed.ctypes.data, "packed_bytes": packed.size}


@pytest.mark.parametrize("layout", ["row", "col"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_packed_or_not(
    core: Any, core_module: ModuleType, shape: tuple[int, int, int], dtype: str, layout: str
) -> None:
    m, n, k = shape
    layer = layer_of(core_module, shape, dtype, layout)
    kind = np.uint16 if dtype == "bf16" else np.float32
    forward, backward = core.pack(layer.weight), core.pack(layer.weight.T)
    np.testing.assert_array_equal(forward, core.pack(layer.weight, threads=1))
    results = []
    for packed in (None, "both"):
        y, s = np.zeros((m, n), kind), np.zeros((m, 3), np.float32)
        changes = use(forward) if packed else {}
        assert core.forward(layer, y, s, changes=changes) == 0, core.error()
        grads = [np.zeros(shape, kind) for shape in ((m, k), (3, k), (n, 3))]
        changes = use(backward) if packed else {}
        status = core.backward(layer, y, s, grads[0], None, [grads[1]], [grads[2]], changes=changes)
        assert status == 0, core.error()
        results.append([array.tobytes() for array in (y, s, *grads)])
    assert results[0] == results[1]


def test_a_packed_weight_that_does_not_fit_is_refused(core: Any, core_module: ModuleType) -> None:
    layer = layer_of(core_module, (4, 20, 9), "f32", "row")
    y, s = np.full((4, 20), np.nan, np.float32), np.full((4, 3), np.nan, np.float32)
    transposed, short = use(core.pack(layer.weight.T)), use(core.pack(layer.weight)[:-4])
    damaged = core.pack(layer.weight)
    damaged[3] ^= 1
    for change in (transposed, short, use(damaged)):
        assert core.forward(layer, y, s, changes=change) == 1
        assert "packed_weight" in core.error()
    assert np.isnan(y).all()
    assert np.isnan(s).all()
