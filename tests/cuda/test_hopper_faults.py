"""The emulated copy engine, mbarriers and wgmma tell a mistake from its right twin."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from . import emulated
from .hopper import matrix

BF16 = torch.bfloat16
FAULTS = {
    "no_wait_for_bytes": None,
    "refilled_early": None,
    "read_while_running": None,
    "no_fence": "no wgmma_fence since registers may have been written",
    "no_init": "mbarrier: used before mbarrier_init",
    "not_visible": "its barrier was not followed by mbarrier_init_done",
    "too_few_bytes": "bytes landed that nobody announced",
    "too_many_bytes": "deadlock: threads 0-127 wait at an mbarrier",
    "arrives_twice": "more arrivals than were promised",
    "descriptors_differ": "warp 0 passes other descriptors than its warpgroup",
    "tile_off_its_place": "a tile starts amid the 1024 bytes of its permutation",
    "base_offset": "the descriptor has a base offset, or bits that mean nothing",
    "wrong_stride": None,
    "lanes_apart": "is at wgmma.wait_group, and earlier lanes are at wgmma.fence",
}
"""The faults of the enum, in its order: what is said of each; None: the numbers are wrong."""

STORE_FAULTS = {
    "no_proxy_fence": None,
    "stored_too_early": None,
    "overwritten": None,
    "no_wait_for_the_reader": None,
    "not_committed": None,
    "ends_early": None,
    "wrong_piece": None,
    "box_off_its_place": "is not on 1024 bytes",
}
"""Those of the kernel that writes by the copy engine."""

FLAG_FAULTS = {
    "no_publish_fence": None,
    "set_too_early": None,
    "no_wait": None,
    "never_set": "deadlock: threads 0-127 have ended; 128-128 wait at a flag; 129-255",
}
"""Those of a block that makes what another one reads."""

CLUSTER_FAULTS = {
    "refilled_for_others": None,
    "half_expected": "bytes landed that nobody announced",
    "no_start": "its barrier was not followed by mbarrier_init_done",
    "no_end": "block 0 of the cluster is asked for something, and has ended",
}
"""Those of two blocks that fill each other's shared memory."""


def run_product(number: int, order: int) -> tuple[int, bool]:
    """The status, and whether the output is right."""
    left, right = matrix(64, 128, BF16, 1), matrix(128, 128, BF16, 2)
    out = emulated.Bordered.empty(64, 128, torch.float32)
    with emulated.grid(order, seed=5, capability=90) as lib:
        left.allow(), right.allow()
        views = (ctypes.byref(emulated.view(one.t)) for one in (left, right))
        status = lib.deltaops_test_hopper_fault(number, *views, ctypes.c_void_p(out.t.data_ptr()))
    oracle = left.t.double() @ right.t.double().t()
    return status, torch.allclose(out.t.double(), oracle, rtol=1e-4, atol=1e-4)


def run_store(number: int, order: int) -> tuple[int, bool]:
    given, out = matrix(64, 128, BF16, 1), emulated.Bordered.empty(64, 128, BF16)
    with emulated.grid(order, seed=5, capability=90) as lib:
        given.allow(), out.allow()
        views = (ctypes.byref(emulated.view(one.t)) for one in (given, out))
        status = lib.deltaops_test_hopper_store(number, *views)
    assert out.intact()
    return status, torch.equal(out.t, given.t)


def run_cluster(number: int, order: int) -> tuple[int, bool]:
    """Right is what both blocks read."""
    given = matrix(384, 64, BF16, 1)
    out = torch.full((2, 384, 64), float("nan"), dtype=BF16)
    with emulated.grid(order, seed=5, capability=90) as lib:
        given.allow()
        view, to = ctypes.byref(emulated.view(given.t)), ctypes.c_void_p(out.data_ptr())
        status = lib.deltaops_test_hopper_cluster(number, view, to)
    return status, torch.equal(out, given.t.expand_as(out))


def run_flag(number: int, order: int) -> tuple[int, bool]:
    """Right is what the second block read, which the first one wrote."""
    given, middle = matrix(128, 64, BF16, 1), emulated.Bordered.empty(128, 64, BF16)
    out = torch.full((128, 64), float("nan"), dtype=BF16)
    flag = torch.zeros(1, dtype=torch.int32)
    with emulated.grid(order, seed=5, capability=90) as lib:
        given.allow(), middle.allow(), emulated.allow(flag)
        views = (ctypes.byref(emulated.view(one.t)) for one in (given, middle))
        places = (ctypes.c_void_p(t.data_ptr()) for t in (flag, out))
        status = lib.deltaops_test_hopper_flag(number, *views, *places)
    return status, torch.equal(out, given.t)


Run = Callable[[int, int], tuple[int, bool]]
"""Of a fault's number, 0 for none, in an order of threads."""
KINDS: dict[str, tuple[Run, dict[str, str | None]]] = {
    "product": (run_product, FAULTS),
    "store": (run_store, STORE_FAULTS),
    "cluster": (run_cluster, CLUSTER_FAULTS),
    "flag": (run_flag, FLAG_FAULTS),
}


@pytest.mark.parametrize("order", range(3), ids=["ascending", "descending", "shuffled"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_right_kernel_runs(kind: str, order: int) -> None:
    assert KINDS[kind][0](0, order) == (0, True), emulated.error()


@pytest.mark.parametrize(
    ("kind", "fault"), [(kind, fault) for kind, (_, faults) in KINDS.items() for fault in faults]
)
def test_mistakes_are_seen(kind: str, fault: str) -> None:
    run, faults = KINDS[kind]
    number, says = 1 + list(faults).index(fault), faults[fault]
    if says is None:
        found = [run(number, order) for order in range(3)]
        assert [status for status, _ in found] == [0, 0, 0], emulated.error()
        assert not all(right for _, right in found)
    else:
        assert run(number, emulated.ASCENDING)[0] != 0
        assert says in emulated.error()
