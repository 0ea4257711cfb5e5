"""The sm_80 passes over x and dy against float64: S, dS, dB, db and dA, in a fixed order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaops.reference import philox

from . import ampere, emulated
from .ampere import random
from .emulated import Bordered

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SEED = torch.tensor([-0x1234_5678_9ABC_DEF0])
STREAM = 2
M, N, K = 150, 270, 100
# each rank with one dtype: the emulated grid takes its time
RANKS = pytest.mark.parametrize(
    ("rank", "dtype"),
    [(1, BF16), (8, F16), (16, BF16), (24, F16), (64, BF16), (100, F16)],
    ids=["1-bf16", "8-f16", "16-bf16", "24-f16", "64-bf16", "100-f16"],
)


def given(t: Tensor, pad: int) -> Tensor:
    """``t`` amid NaN, and known to the grid."""
    kept = Bordered(t, pad)
    kept.allow()
    return kept.t


def dropped(x: Tensor, threshold: int) -> Tensor:
    """drop(x) in float64."""
    kept = philox.draws(*x.shape, SEED, STREAM) >= threshold
    return torch.where(kept, x.double() * philox.keep_scale(threshold), 0.0)


def close(got: Tensor, expected: Tensor) -> bool:
    """Within the rounding of the output and of sums in float32."""
    bound = expected.abs() * torch.finfo(got.dtype).eps + 2e-5 * expected.abs().max()
    return bool(((got.double() - expected).abs() <= bound).all())


def run(
    name: str,
    shape: tuple[int, int, int],
    inputs: dict[str, Tensor],
    outputs: dict[str, Bordered],
    settings: dict[str, Tensor | int | float | None],
    *,
    pad: int = 0,
    order: int = emulated.ASCENDING,
) -> list[Tensor]:
    """The outputs of a pass that must succeed and write nowhere else."""
    with emulated.grid(order) as lib:
        space = ampere.workspace(lib, name, *shape)
        everything = {key: given(t, pad) for key, t in inputs.items()} | settings
        everything |= {key: out.t for key, out in outputs.items()}
        assert ampere.run_pass(lib, name, space, everything) == 0, emulated.error()
    assert all(buffer.intact() for buffer in (space, *outputs.values()))
    return [out.t.clone() for out in outputs.values()]


def project(
    x: Tensor, a: Tensor, p: float = 0.0, *, pad: int = 0, order: int = 0
) -> tuple[list[Tensor], Tensor]:
    """``(S, S rounded)`` and S in float64."""
    shape = (x.shape[0], x.shape[1], a.shape[0])
    threshold = philox.drop_threshold(p)
    outputs = {
        "s": Bordered.empty(shape[0], shape[2], F32, 3),
        "s_narrow": Bordered.empty(shape[0], shape[2], x.dtype, pad),
    }
    settings: dict[str, Tensor | int | float | None] = {
        "scaling": 1.7,
        "drop_threshold": threshold,
        "branch_stream": STREAM,
        "seed": SEED if threshold else None,
    }
    found = run("project", shape, {"x": x, "a": a}, outputs, settings, pad=pad, order=order)
    scaling = torch.tensor(1.7).double()  # as a float
    return found, scaling * dropped(x, threshold) @ a.double().T


@RANKS
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_project(dtype: torch.dtype, rank: int, p: float) -> None:
    x, a = random(M, K, dtype=dtype), random(rank, K, dtype=dtype, seed=1)
    found, expected = project(x, a, p, pad=4)
    assert all(close(s, expected) for s in found)


def test_project_of_few_rows_is_cut_and_says_so_in_its_workspace() -> None:
    x, a = random(3, 1101, dtype=BF16), random(20, 1101, dtype=BF16, seed=1)
    with emulated.grid() as lib:
        assert ampere.workspace(lib, "project", 3, 1101, 20).t.numel() >= 2 * 3 * 20
        assert ampere.workspace(lib, "project", 3 * 64 * 256, 1101, 20).t.numel() == 0
    found, expected = project(x, a, 0.25)
    assert all(close(s, expected) for s in found)


def test_project_drops_nan_and_everything() -> None:
    x, a = random(M, K, dtype=BF16), random(4, K, dtype=BF16)
    x[~(philox.draws(M, K, SEED, STREAM) >= philox.drop_threshold(0.5))] = float("nan")
    kept = x.nan_to_num(0.0)
    (s, _), _ = project(x, a, 0.5)
    assert close(s, project(kept, a, 0.5)[1])
    assert not project(x, a, 1.0)[0][0].any()


def grad_up(
    grad_y: Tensor,
    b: Tensor,
    s: Tensor,
    *,
    wanted: tuple[str, ...] = ("grad_s", "grad_s_narrow", "grad_b", "grad_bias"),
    wide: bool = False,
    pad: int = 0,
    order: int = 0,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Each wanted gradient, and what it is in float64."""
    (m, n), rank = grad_y.shape, b.shape[1]
    dtype = grad_y.dtype
    of_b = F32 if wide else dtype
    outputs = {
        "grad_s": Bordered.empty(m, rank, F32, 5),
        "grad_s_narrow": Bordered.empty(m, rank, dtype, pad),
        "grad_b": Bordered.empty(n, rank, of_b, pad),
        "grad_bias": Bordered.empty(1, n, of_b),
    }
    dy, scaling = grad_y.double(), torch.tensor(0.3).double()
    expected = {
        "grad_s": scaling * dy @ b.double(),
        "grad_s_narrow": scaling * dy @ b.double(),
        "grad_b": dy.T @ s.double(),
        "grad_bias": dy.sum(0, keepdim=True),
    }
    outputs = {name: out for name, out in outputs.items() if name in wanted}
    inputs = {"grad_y": grad_y, "b": b, "s_narrow": s}
    shape = (m, n, rank)
    found = run("grad_up", shape, inputs, outputs, {"scaling": 0.3}, pad=pad, order=order)
    return {name: (got, expected[name]) for name, got in zip(outputs, found, strict=True)}


def up_tensors(dtype: torch.dtype, rank: int, m: int = M) -> tuple[Tensor, Tensor, Tensor]:
    dy, b = random(m, N, dtype=dtype), random(N, rank, dtype=dtype, seed=1)
    return dy, b, random(m, rank, dtype=dtype, seed=2)


@RANKS
def test_grad_up(dtype: torch.dtype, rank: int) -> None:
    found = grad_up(*up_tensors(dtype, rank), pad=2 if rank % 8 else 8)
    assert len(found) == 4
    assert all(close(got, expected) for got, expected in found.values())


@pytest.mark.parametrize("wanted", [("grad_s",), ("grad_b",), ("grad_bias",)], ids=str)
def test_grad_up_of_one(wanted: tuple[str, ...]) -> None:
    (pair,) = grad_up(*up_tensors(BF16, 9, 300), wanted=wanted, wide=True).values()
    assert close(*pair)


def grad_down(x: Tensor, grad_s: Tensor, p: float, *, order: int = 0) -> tuple[Tensor, Tensor]:
    """dA, and what it is in float64."""
    threshold, rank = philox.drop_threshold(p), grad_s.shape[1]
    outputs = {"grad_a": Bordered.empty(rank, x.shape[1], x.dtype, 1)}
    settings: dict[str, Tensor | int | float | None] = {
        "drop_threshold": threshold,
        "branch_stream": STREAM,
        "seed": SEED,
    }
    inputs, shape = {"x": x, "grad_s_narrow": grad_s}, (*x.shape, rank)
    (found,) = run("grad_down", shape, inputs, outputs, settings, order=order)
    return found, grad_s.double().T @ dropped(x, threshold)


@RANKS
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_grad_down(dtype: torch.dtype, rank: int, p: float) -> None:
    # 300 rows make two pieces
    x, grad_s = random(300, 140, dtype=dtype), random(300, rank, dtype=dtype, seed=1)
    assert close(*grad_down(x, grad_s, p))


def test_every_order_of_threads_gives_the_same_bits() -> None:
    x, a = random(70, 300, dtype=BF16), random(10, 300, dtype=BF16, seed=1)
    dy, b, s = up_tensors(BF16, 20, 300)
    runs = []
    for order in range(3):
        ups = grad_up(dy, b, s, order=order).values()
        down = grad_down(dy, s, 0.5, order=order)[0]
        runs.append([*project(x, a, 0.5, order=order)[0], *(got for got, _ in ups), down])
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], other, strict=True))


def test_no_rows_give_gradients_of_zero() -> None:
    dy, b, s = up_tensors(BF16, 6, 0)
    found = grad_up(dy, b, s, wanted=("grad_b", "grad_bias"))
    assert not any(got.any() for got, _ in found.values())
    assert not grad_down(dy, s, 0.5)[0].any()
    (s, _), _ = project(torch.empty(5, 0, dtype=BF16), torch.empty(2, 0, dtype=BF16))
    assert s.shape == (5, 2)
    assert not s.any()


def test_refusals() -> None:
    x, a, out = random(M, K, dtype=BF16), random(8, K, dtype=BF16), torch.empty(M, 8)

    def says(name: str, changed: dict[str, Tensor | int | float | None]) -> str:
        inputs: dict[str, dict[str, Tensor | int | float | None]] = {
            "project": {"x": x, "a": a, "s": out},
            "grad_up": {"grad_y": x, "b": a.T.contiguous(), "grad_s": out},
            "grad_down": {"x": x, "grad_s_narrow": out.bfloat16(), "grad_a": a.clone()},
        }
        with emulated.grid() as lib:
            space = Bordered.empty(1, 2, F32)
            assert ampere.run_pass(lib, name, space, inputs[name] | changed) != 0
        return emulated.error()

    assert "project: x must be bf16 (1) or f16 (2), got 0" in says("project", {"x": x.float()})
    assert "project: a must be [8, 99]" in says("project", {"x": x[:, 1:]})
    assert "s must be [150, 8] of dtype 0" in says("project", {"s": out.bfloat16()})
    assert "seed must point" in says("project", {"drop_threshold": 3})
    assert "b must have col_stride 1" in says("grad_up", {"b": a.T})
    assert "grad_up: workspace must have" in says("grad_up", {})
    assert "grad_a must be [8, 100] of dtype 1" in says("grad_down", {"grad_a": a.half()})
    assert "grad_s_narrow must be [150, 8]" in says("grad_down", {"grad_s_narrow": x})
