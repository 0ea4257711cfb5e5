"""What is written lies apart from all else: refused exactly where an element is shared.

The native fuzz does this for every op and every pair of matrices; here are the shapes of overlap.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

Builds = dict[str, tuple[Path, list[Path]]]
M, N, K, R = 6, 8, 5, 2


@pytest.fixture
def core(builds: Builds, core_module: ModuleType) -> Any:
    return core_module.Core(builds["native"][0])


def buffer(rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, cols)).astype(np.float32)


def layer_of(core_module: ModuleType, x: np.ndarray, branches: int = 1) -> Any:
    adapters = [core_module.Adapter(buffer(R, K), buffer(N, R), 1.0, 0) for _ in range(branches)]
    return core_module.Layer(x, buffer(N, K), None, adapters)


def test_columns_of_one_buffer_interleave(core: Any, core_module: ModuleType) -> None:
    both = buffer(M, K + N)
    x, y, want = both[:, :K], both[:, K:], np.zeros((M, N), np.float32)
    layer = layer_of(core_module, x)
    assert core.forward(layer, want, None) == 0, core.error()
    assert core.forward(layer, y, None) == 0, core.error()
    np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize("column", [0, 1, K - 1])
def test_columns_that_share_one_are_refused(
    core: Any, core_module: ModuleType, column: int
) -> None:
    both = buffer(M, K + N)
    before = both.copy()
    layer = layer_of(core_module, both[:, :K])
    assert core.forward(layer, both[:, column : column + N], None) == 1
    assert core.error() == (
        "delta_linear_forward: y is written, so it must not overlap x. Give it memory of its own."
    )
    np.testing.assert_array_equal(both, before)


def test_rows_in_the_gaps_of_another_pitch(core: Any, core_module: ModuleType) -> None:
    """Rows of 5 every 16 and rows of 8 every 32: apart or not is a matter of each row."""
    flat = buffer(1, 400)[0]
    x = np.lib.stride_tricks.as_strided(flat[6:], (M, K), (4 * 16, 4))
    layer = layer_of(core_module, x)
    apart = np.lib.stride_tricks.as_strided(flat[11:], (M, N), (4 * 32, 4))
    assert core.forward(layer, apart, None) == 0, core.error()
    shared = np.lib.stride_tricks.as_strided(flat[15:], (M, N), (4 * 32, 4))
    assert core.forward(layer, shared, None) == 1
    last_row = flat[6 + 16 * (M - 1) + K - 1 :][: M * N].reshape(M, N)
    assert core.forward(layer, last_row, None) == 1
    assert core.forward(layer, flat[6 + 16 * (M - 1) + K :][: M * N].reshape(M, N), None) == 0


@pytest.mark.parametrize(
    ("grad", "other"),
    [("grad_a[0]", "x"), ("grad_a[1]", "grad_a[0]"), ("grad_b[0]", "grad_a[0]"),
     ("grad_b[1]", "grad_y"), ("grad_b[0]", "s"), ("grad_bias", "grad_x"),
     ("grad_a[0]", "branches[0].a"), ("grad_b[1]", "branches[1].b")],
)  # fmt: skip
def test_gradients_of_delta_linear_are_apart(
    core: Any, core_module: ModuleType, grad: str, other: str
) -> None:
    layer = layer_of(core_module, buffer(M, K), branches=2)
    views = {
        "x": layer.x, "grad_y": buffer(M, N), "s": buffer(M, 2 * R), "grad_x": buffer(M, K),
        "grad_bias": buffer(1, N),
        **{f"grad_a[{i}]": buffer(R, K) for i in range(2)},
        **{f"grad_b[{i}]": buffer(N, R) for i in range(2)},
        **{f"branches[{i}].a": adapter.a for i, adapter in enumerate(layer.adapters)},
        **{f"branches[{i}].b": adapter.b for i, adapter in enumerate(layer.adapters)},
    }  # fmt: skip

    def call() -> int:
        lists = [[views[f"grad_{name}[{i}]"] for i in range(2)] for name in "ab"]
        names = ("grad_y", "s", "grad_x", "grad_bias")
        status: int = core.backward(layer, *(views[name] for name in names), *lists)
        return status

    assert call() == 0, core.error()
    shape = views[grad].shape
    # From the other's last element on.
    room = np.zeros(views[other].size + views[grad].size, np.float32)
    if other.startswith("branches"):
        moved = room[: views[other].size].reshape(views[other].shape)
        moved[:] = views[other]
        i, field = int(other[9]), other[-1]
        layer.adapters[i] = layer.adapters[i]._replace(**{field: moved})
    else:
        views[other] = room[: views[other].size].reshape(views[other].shape)
        layer.x = views["x"]
    from_last = room[views[other].size - 1 :]
    views[grad] = from_last[: views[grad].size].reshape(shape)
    assert call() == 1
    assert "must not overlap" in core.error()
    assert grad in core.error()
    assert other in core.error()
