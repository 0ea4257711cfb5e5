"""What chooses the tiles of a sequential adapter, and the pieces that its sums are cut into; and
which tiles the programs of a persistent GEMM take."""

from __future__ import annotations

from collections import Counter
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from deltaops.kernels import configs, group, precision

from deltaops.backends.triton import TritonBackend, core, record, targets

M, K, R = 8192, 256, 16


def rows(apart: int = K) -> Tensor:
    """``[M, K]``, so far apart."""
    return torch.empty(M, apart, dtype=torch.bfloat16, device="meta")[:, :K]


def launches(name: str, direction: str, *arguments: Any) -> list[record.Launch]:
    """Those of this kernel."""
    run = getattr(TritonBackend(), f"bottleneck_{direction}")
    with core.standing_in(targets.TARGETS["sm_90"]), record.recording() as found:
        run(*arguments)
    return [launch for launch in found if launch.kernel == name]


def backward(name: str, x: Tensor | None, norm: str, needs: list[bool]) -> record.Launch:
    """The one launch of this kernel in a backward pass with these gradients."""
    h = torch.empty(M, R, device="meta")
    stats = torch.empty(0 if norm == "none" else M, 2, device="meta")
    down, up = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((R, K), (K, R)))
    given = (rows(), x, h, stats, None, None, down, up, 1.0, "gelu", norm, True, needs)
    (found,) = launches(name, "backward", *given)
    return found


def test_pieces_of_a_sum_do_not_hang_on_which_gradients_are_wanted() -> None:
    one, other = (
        backward("_bottleneck_down_kernel", rows(), "none", [i in wanted for i in range(7)])
        for wanted in ((3, 4), (4,))
    )
    assert one.arguments["WANT_PRODUCT"]
    assert not other.arguments["WANT_PRODUCT"]
    assert one.grid[2] == other.grid[2] > 1
    assert one.arguments["chunk"] == other.arguments["chunk"]


@pytest.mark.parametrize(("norm", "wants_x", "tall"), [
    ("none", True, True), ("layer", False, True), ("layer", True, False),
])  # fmt: skip
def test_strides_of_x_choose_tiles_only_where_it_is_read(
    norm: str, wants_x: bool, tall: bool
) -> None:
    needs = [wants_x, False, False, True, False, False, False]
    found = backward("_bottleneck_grad_kernel", rows(apart=K + 3), norm, needs)
    assert found.arguments["BLOCK_M"] == (32 if tall else 16)


@pytest.mark.parametrize(("apart", "height"), [(K, 32), (K + 3, 16)])
def test_strides_of_the_residual_choose_tiles(apart: int, height: int) -> None:
    down, up = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((R, K), (K, R)))
    given = (rows(), rows(apart=apart), None, None, down, None, up, None, 1.0, 1e-5, "gelu", "none")
    (found,) = launches("_bottleneck_kernel", "forward", *given)
    assert found.arguments["BLOCK_M"] == height


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize(
    ("down", "across", "programs"),
    [(1, 1, 1), (1, 37, 5), (37, 1, 37), (7, 11, 3), (8, 16, 128), (9, 17, 132), (64, 16, 132)],
)
def test_each_tile_is_taken_once(down: int, across: int, programs: int, group: int) -> None:
    # the kernels' own function, on Python's numbers
    code = core.kernels("tiles").grouped_tile.fn.__code__
    place = FunctionType(code, {"tl": SimpleNamespace(minimum=min)})
    walks = [range(first, down * across, programs) for first in range(programs)]
    taken = Counter(place(tile, down, across, group) for walk in walks for tile in walk)
    assert taken == Counter((i, j) for i in range(down) for j in range(across))
    lengths = [len(walk) for walk in walks]
    assert max(lengths) - min(lengths) <= 1  # nobody waits for two tiles of another


@pytest.mark.parametrize(("tiles", "multiprocessors", "stay"), [(1024, 132, 132), (12, 132, 12)])
def test_no_program_is_without_a_tile(tiles: int, multiprocessors: int, stay: int) -> None:
    assert core.kernels("persistent").programs(tiles, multiprocessors) == stay


HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize("rank", [1, 16, 24, 32, 64])
@pytest.mark.parametrize("m", [1, 16, 512, 8192])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
def test_a_group_cuts_its_sums_as_a_branch_alone_does(
    rank: int, m: int, masked: bool, dtype: torch.dtype
) -> None:
    """Rows and columns of a tile decide how many pieces a sum has, and so the bits."""
    wide = dtype == FULL
    alone = configs.project(m, rank, wide, True, masked=masked)
    together = configs.project_group(m, rank, 3 * alone.rank, wide, masked)
    assert (together.rows, together.cols) == (alone.rows, alone.cols)
    alone = configs.grad_down(rank, wide, masked)
    for capability in (80, 90):
        together = configs.grad_down_group(rank, 3 * alone.rank, wide, masked, capability)
        assert (together.rows, together.cols) == (alone.rows, alone.cols)


def test_branches_with_other_tiles_go_in_launches_of_their_own() -> None:
    def part(rank: int, dropout: float = 0.0) -> group.Part:
        a = torch.empty(rank, K, dtype=HALF, device="meta")
        return group.Part(a, 1.0, dropout, None, 0, precision.rank_precision(HALF, [a]))

    def runs(*parts: group.Part, backward: bool) -> list[list[int]]:
        found = group.together(rows(), parts, backward=backward)
        return [[one.rank for one in some] for some in found]

    assert runs(part(16), part(8), part(64), backward=False) == [[16, 8, 64]]
    assert runs(part(16), part(16, 0.1), part(16, 0.1), backward=False) == [[16], [16, 16]]
    assert runs(part(16), part(16, 0.1), backward=True) == [[16, 16]]
    assert runs(part(64), part(64), part(16), backward=True) == [[64, 64], [16]]
