"""The order of tiles: each once, whatever the outputs and however many blocks there are."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence

import pytest

from . import emulated

BAND = 8


def tiles(rows: int, columns: Sequence[int], band: int = 0) -> list[tuple[int, int, int]]:
    """(output, row, column) by number; 0 is the usual ``band``."""
    run = emulated.library().deltaops_test_schedule
    run.restype = ctypes.c_int64
    given = (ctypes.c_int32 * len(columns))(*columns)
    count = run(rows, band, len(columns), given, None)
    found = (ctypes.c_int32 * (3 * count))()
    assert run(rows, band, len(columns), given, found) == count
    return [(found[i], found[i + 1], found[i + 2]) for i in range(0, 3 * count, 3)]


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 35])
@pytest.mark.parametrize("columns", [(1,), (5,), (1, 1), (16, 4, 4), (3, 1, 2, 7), (0, 2)])
def test_each_tile_once(rows: int, columns: tuple[int, ...]) -> None:
    wanted = {(i, r, c) for i, n in enumerate(columns) for r in range(rows) for c in range(n)}
    found = tiles(rows, columns)
    assert len(found) == len(wanted)
    assert set(found) == wanted


@pytest.mark.parametrize("blocks", [1, 3, 132, 1000])
def test_blocks_share_the_tiles_evenly(blocks: int) -> None:
    """A block takes every ``blocks``-th number: as kernels do."""
    found = tiles(19, (6, 2))
    shares = [found[block::blocks] for block in range(blocks)]
    assert sorted(itertools.chain(*shares)) == sorted(found)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("band", [BAND, 4])
def test_bands_are_finished_one_by_one(band: int) -> None:
    """That of 4 is of clusters of two blocks, where some make S."""
    found = tiles(2 * band + 3, (5, 2), 0 if band == BAND else band)
    assert sorted(set(found)) == sorted(found)
    assert len(found) == (2 * band + 3) * 7
    assert [row // band for _, row, _ in found] == sorted(row // band for _, row, _ in found)
    assert [row for _, row, _ in found[:band]] == list(range(band))
    assert len({(output, column) for output, _, column in found[:band]}) == 1
