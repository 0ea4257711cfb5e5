"""Groups through the C ABI: every instruction set's answer, and each refusal."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

Builds = dict[str, tuple[Path, list[Path]]]
M, K, WIDTHS, R = 21, 700, (60, 9, 130), 5  # of one block of k, and of three, on baseline


@pytest.fixture(params=["native", "emulated"])
def core(request: pytest.FixtureRequest, builds: Builds, core_module: ModuleType) -> Any:
    return core_module.Core(builds[request.param][0])


class Group:
    """Arrays of one group and of its gradients, as float32 or bfloat16 bits."""

    def __init__(
        self,
        core_module: ModuleType,
        bf16: bool,
        m: int = M,
        threshold: int = 0,
        layout: str = "row",
    ) -> None:
        rng = np.random.default_rng(0)
        store = core_module.to_bf16 if bf16 else (lambda a: a)

        def draw(rows: int, cols: int) -> np.ndarray:
            return (rng.standard_normal((rows, cols)) / 8).astype(np.float32)

        def weight(n: int) -> np.ndarray:
            return store(draw(n, K)) if layout == "row" else store(draw(K, n)).T

        x = store(draw(m, K))
        self.layers = [
            core_module.Layer(
                x, weight(n), None,
                [core_module.Adapter(draw(R, K), draw(n, R), 1.5, threshold)], seed=7 + n,
            )
            for n in WIDTHS
        ]  # fmt: skip
        self.grad_y = [store(draw(m, n)) for n in WIDTHS]
        self.y = [np.zeros((m, n), x.dtype) for n in WIDTHS]
        self.s = [np.zeros((m, R), np.float32) for _ in WIDTHS]
        self.grad_x = np.zeros_like(x)
        self.grad_a = [np.zeros((R, K), np.float32) for _ in WIDTHS]
        self.grad_b = [np.zeros((n, R), np.float32) for n in WIDTHS]


def forward(core: Any, c: ModuleType, group: Group, threads: int = 2, **changes: Any) -> int:
    branches = [layer.branches() for layer in group.layers]
    calls = (c.Forward * len(group.layers))(
        *(
            c.Forward(
                ctypes.sizeof(c.Forward), threads, c.matrix(layer.x), c.matrix(layer.weight),
                c.matrix(None), c.matrix(y), c.matrix(s), b, 1, 0, layer.seed,
            )
            for layer, y, s, b in zip(group.layers, group.y, group.s, branches, strict=True)
        )
    )  # fmt: skip
    count = changes.pop("count", len(calls))
    for name, value in changes.items():
        setattr(calls[1], name, value)
    return core.lib.deltaops_cpu_delta_linear_group_forward(calls, ctypes.c_int32(count))


def backward(core: Any, c: ModuleType, group: Group, threads: int = 2, **changes: Any) -> int:
    branches = [layer.branches() for layer in group.layers]
    grads = [
        ((c.Matrix * 1)(c.matrix(a)), (c.Matrix * 1)(c.matrix(b)), (c.Matrix * 1)())
        for a, b in zip(group.grad_a, group.grad_b, strict=True)
    ]
    calls = (c.Backward * len(group.layers))(
        *(
            c.Backward(
                ctypes.sizeof(c.Backward), threads, c.matrix(group.grad_y[i]), c.matrix(layer.x),
                c.matrix(layer.weight), c.matrix(group.s[i]), branches[i], 1, 0, layer.seed,
                c.matrix(None if i else group.grad_x), c.matrix(None), *grads[i],
            )
            for i, layer in enumerate(group.layers)
        )
    )  # fmt: skip
    for name, value in changes.items():
        setattr(calls[1], name, value)
    return core.lib.deltaops_cpu_delta_linear_group_backward(calls, ctypes.c_int32(len(calls)))


@pytest.mark.parametrize(
    ("threshold", "layout"),
    [(0, "row"), (20000, "row"), (0, "col")],
    ids=["Linear", "dropout", "Conv1D"],
)
@pytest.mark.parametrize("m", [3, M])
@pytest.mark.parametrize("bf16", [False, True], ids=["f32", "bf16"])
def test_a_group_is_its_layers(
    core: Any, core_module: ModuleType, bf16: bool, m: int, threshold: int, layout: str
) -> None:
    for isa, runs in core.isas():
        if not runs:
            continue
        assert core.set_isa(isa) == 0
        group, alone = (Group(core_module, bf16, m, threshold, layout) for _ in range(2))
        assert forward(core, core_module, group) == 0, core.error()
        assert backward(core, core_module, group) == 0, core.error()
        total = np.zeros((m, K))
        for i, layer in enumerate(alone.layers):
            assert core.forward(layer, alone.y[i], alone.s[i]) == 0, core.error()
            status = core.backward(
                layer, alone.grad_y[i], alone.s[i], alone.grad_x, None, [alone.grad_a[i]],
                [alone.grad_b[i]],
            )  # fmt: skip
            assert status == 0, core.error()
            total += core_module.to_f64(alone.grad_x)
        for name in ("y", "s", "grad_a", "grad_b"):
            for got, want in zip(getattr(group, name), getattr(alone, name), strict=True):
                np.testing.assert_array_equal(got, want, f"{isa} {name}")
        bound = 2.0**-6 if bf16 else 1e-5  # the sum of the layers' own gradients is rounded more
        np.testing.assert_allclose(core_module.to_f64(group.grad_x), total, atol=bound, rtol=bound)


@pytest.mark.parametrize("threads", [1, 3, 5])
def test_same_bits_for_any_team(core: Any, core_module: ModuleType, threads: int) -> None:
    two, other = (Group(core_module, False) for _ in range(2))
    for group, team in ((two, 2), (other, threads)):
        assert forward(core, core_module, group, team) == 0, core.error()
        assert backward(core, core_module, group, team) == 0, core.error()
    np.testing.assert_array_equal(two.grad_x, other.grad_x)
    for name in ("y", "grad_a", "grad_b"):
        for one, again in zip(getattr(two, name), getattr(other, name), strict=True):
            np.testing.assert_array_equal(one, again)


def test_refusals_name_the_layer_and_leave_outputs_alone(
    core: Any, core_module: ModuleType
) -> None:
    group = Group(core_module, False)
    ahead = "delta_linear_group_forward: "
    other = core_module.matrix(np.zeros((M, K), np.float32))
    for changes, sentence in (
        ({"count": 0}, "count must be 1 to 16, got 0."),
        ({"count": 17}, "count must be 1 to 16, got 17."),
        ({"x": other}, "layers[1]: x must be that of the layers before, got another matrix. Run"),
        ({"num_threads": 3}, "layers[1]: num_threads must be 2, as in layers[0], got 3."),
        ({"struct_size": 8}, "layers[1]: struct_size must be"),
        ({"y": core_module.matrix(group.y[0][:, 3 : 3 + WIDTHS[1]])},
         "layers[0].y is written, so it must not overlap layers[1].y. Give it memory"),
    ):  # fmt: skip
        assert forward(core, core_module, group, **changes) == 1
        assert core.error().startswith(ahead + sentence), core.error()
    assert not any(y.any() for y in group.y)
    assert forward(core, core_module, group) == 0
    ahead = "delta_linear_group_backward: "
    for changes, sentence in (
        ({"x": other}, "layers[1]: x must be that of the layers before, got another matrix."),
        ({"grad_x": core_module.matrix(np.zeros((M, K), np.float32))},
         "layers[1]: grad_x must be absent: the sum goes to layers[0].grad_x."),
        ({"weight": core_module.matrix(None)}, "layers[1]: weight (needed for grad_x) must"),
        ({"grad_y": core_module.matrix(group.grad_y[1][:3])}, "layers[1]: "),
    ):  # fmt: skip
        assert backward(core, core_module, group, **changes) == 1
        assert core.error().startswith(ahead + sentence), core.error()
    assert not group.grad_x.any()
