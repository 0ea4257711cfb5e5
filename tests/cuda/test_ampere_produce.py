"""The producers of x and S against float64: RMSNorm and SwiGLU, ragged, masked, and too long for
shared memory."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from deltaops.reference import philox

from . import ampere, emulated
from .ampere import Branch, random
from .emulated import Bordered

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SEED = torch.tensor([0x0FED_CBA9_8765_4321])
EPS = 1e-5
SCALING = 0.7
M = 19
"""Of two blocks, the second with three rows."""
KINDS = pytest.mark.parametrize("kind", ["rms_norm", "swiglu"])


class Down(NamedTuple):
    """A branch: ``scaling * drop(y) Aᵀ``."""

    rank: int
    p: float = 0.0
    stream: int = 0


class Produced(NamedTuple):
    y: Tensor
    rstd: Tensor | None
    s: list[Tensor]
    """In float32."""
    narrow: list[Tensor]
    """In the dtype of y."""


def downs_of(k: int, downs: list[Down], dtype: torch.dtype) -> list[Tensor]:
    return [random(down.rank, k, dtype=dtype, seed=5 + i) for i, down in enumerate(downs)]


def given(t: Tensor, pad: int) -> Tensor:
    """``t`` amid NaN, and known to the grid."""
    kept = Bordered(t, pad)
    kept.allow()
    return kept.t


def produce(
    kind: str, k: int, downs: list[Down], dtype: torch.dtype, *, m: int = M, pad: int = 0,
    order: int = 0, gamma: bool = True,
) -> Produced:  # fmt: skip
    """What a call writes, which must succeed and write nowhere else."""
    y = Bordered.empty(m, k, dtype, pad)
    rstd = Bordered.empty(m, 1, F32, 1)  # a column of the statistics that norm_bias keeps
    s = [Bordered.empty(m, down.rank, F32, 3) for down in downs]
    narrow = [Bordered.empty(m, down.rank, dtype, pad) for down in downs]
    with emulated.grid(order) as lib:
        y.allow()
        a = [given(t, pad) for t in downs_of(k, downs, dtype)]
        branches = [
            Branch(
                *(emulated.view(t) for t in (a[i], s[i].t, narrow[i].t)),
                *(SCALING, philox.drop_threshold(down.p), down.stream, 0),
                SEED.data_ptr() if down.p else None,
            )
            for i, down in enumerate(downs)
        ]
        rows = {name: given(t, pad) for name, t in inputs(kind, m, k, dtype).items()}
        if kind == "rms_norm":
            rows["rstd"] = rstd.t
            if not gamma:
                del rows["gamma"]
        status = ampere.produce(lib, kind, {**rows, "y": y.t}, branches, EPS)
        assert status == 0, emulated.error()
    assert all(one.intact() for one in (y, rstd, *s, *narrow))
    outs = [[one.t.clone() for one in group] for group in (s, narrow)]
    return Produced(y.t.clone(), rstd.t.clone() if kind == "rms_norm" else None, *outs)


def inputs(kind: str, m: int, k: int, dtype: torch.dtype) -> dict[str, Tensor]:
    names = {"rms_norm": ("x", "gamma"), "swiglu": ("gate", "up")}[kind]
    sizes = [m, 1 if kind == "rms_norm" else m]
    return {
        name: 3 * random(size, k, dtype=dtype, seed=i)
        for i, (name, size) in enumerate(zip(names, sizes, strict=True))
    }


def wide(kind: str, m: int, k: int, dtype: torch.dtype, gamma: bool = True) -> Tensor:
    """y in float64."""
    one, other = (t.double() for t in inputs(kind, m, k, dtype).values())
    if kind == "rms_norm":
        normed = one / (one.square().mean(1, keepdim=True) + EPS).sqrt()
        return normed * other if gamma else normed
    return one * one.sigmoid() * other


def close(got: Tensor, expected: Tensor) -> bool:
    """Within the rounding of the output and of sums in float32."""
    bound = expected.abs() * torch.finfo(got.dtype).eps + 2e-5 * expected.abs().max()
    return bool(((got.double() - expected).abs() <= bound).all())


def check(
    kind: str, k: int, downs: list[Down], dtype: torch.dtype, *, m: int = M, pad: int = 0,
    gamma: bool = True,
) -> None:  # fmt: skip
    found = produce(kind, k, downs, dtype, m=m, pad=pad, gamma=gamma)
    assert close(found.y, wide(kind, m, k, dtype, gamma))
    if found.rstd is not None:
        x = inputs(kind, m, k, dtype)["x"].double()
        assert close(found.rstd, (x.square().mean(1, keepdim=True) + EPS).rsqrt())
    for i, (a, down) in enumerate(zip(downs_of(k, downs, dtype), downs, strict=True)):
        kept = philox.draws(m, k, SEED, down.stream) >= philox.drop_threshold(down.p)
        scale = torch.tensor(SCALING).double() * philox.keep_scale(philox.drop_threshold(down.p))
        expected = scale * torch.where(kept, found.y.double(), 0.0) @ a.double().T
        assert close(found.s[i], expected)
        assert torch.equal(found.narrow[i], found.s[i].to(dtype))


@KINDS
@pytest.mark.parametrize(("dtype", "k", "pad"), [(BF16, 104, 8), (F16, 101, 4)], ids=str)
def test_y_and_s_of_a_group(kind: str, dtype: torch.dtype, k: int, pad: int) -> None:
    """Whole chunks (but for the last step) and single elements; a mask of its own each."""
    check(kind, k, [Down(1), Down(16, 0.4, 2), Down(24, 0.1, 7)], dtype, pad=pad)


@KINDS
def test_more_ranks_than_a_pass(kind: str) -> None:
    check(kind, 264, [Down(72, 0.25, 1)], BF16, m=5, pad=8)


@KINDS
def test_rows_that_shared_memory_does_not_hold(kind: str) -> None:
    """The emulated GPU keeps 19 rounds of 256 columns."""
    check(kind, 5400, [Down(8), Down(3)], BF16, m=3)


@KINDS
def test_no_branch_leaves_y(kind: str) -> None:
    check(kind, 40, [], F16, gamma=False)


def test_every_order_of_threads_gives_the_same_bits() -> None:
    runs = [produce("rms_norm", 264, [Down(9, 0.5)], BF16, m=5, order=order) for order in range(3)]
    for other in runs[1:]:
        assert torch.equal(runs[0].y, other.y)
        assert torch.equal(runs[0].s[0], other.s[0])


def test_dropped_nan_does_not_reach_s() -> None:
    """All is dropped, NaN too."""
    gate, up = torch.ones(1, 8, dtype=BF16), torch.ones(1, 8, dtype=BF16)
    a = random(2, 8, dtype=BF16)
    up[0, 3] = float("nan")
    y, s = torch.empty(1, 8, dtype=BF16), torch.empty(1, 2)
    branch = Branch(emulated.view(a), emulated.view(s), emulated.view(None), 1.0, 65536, 0, 0,
                    SEED.data_ptr())  # fmt: skip
    with emulated.grid() as lib:
        rows = {"gate": gate, "up": up, "y": y}
        assert ampere.produce(lib, "swiglu", rows, [branch], 0.0) == 0, emulated.error()
    assert y.isnan().sum() == 1
    assert not s.any()


def test_refusals() -> None:
    y = torch.full((M, 40), 3.0, dtype=BF16)
    rows = {"x": y.clone(), "gamma": y[:1].clone(), "y": y}

    def says(changed: dict[str, Tensor], *branches: Branch) -> str:
        with emulated.grid() as lib:
            assert ampere.produce(lib, "rms_norm", rows | changed, list(branches), EPS) != 0
        return emulated.error()

    def branch(a: Tensor, s: Tensor | None = None, drop: int = 0) -> Branch:
        kept.extend(t for t in (a, s) if t is not None)
        return Branch(*(emulated.view(t) for t in (a, s, None)), 1.0, drop, 0, 0, None)

    kept: list[Tensor] = []  # the structures hold their addresses alone
    a = random(8, 40, dtype=BF16)
    assert "y must be bf16 (1) or f16 (2), got 0" in says({"y": y.float()})
    assert "x must be [19, 40] of dtype 1" in says({"x": y.half()})
    assert "gamma must be [1, 40]" in says({"gamma": y})
    assert "rstd must be [19, 1] of dtype 0" in says({"rstd": torch.empty(M, 2)})
    assert "y must have at least 1 column" in says({"y": y[:, :0]})
    assert "a of branch 1 must be [8, 40]" in says({}, branch(a), branch(a[:, 1:]))
    assert "s of branch 0 must be [19, 8]" in says({}, branch(a, torch.empty(M, 9)))
    assert "seed must point" in says({}, branch(a, drop=9))
    assert "must be at most 1024 together" in says({}, *[branch(a)] * 17)
    assert bool((y == 3.0).all())
