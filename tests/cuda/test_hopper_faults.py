"""The emulated copy engine, mbarriers and wgmma tell a mistake from its right twin."""

from __future__ import annotations

import ctypes

import pytest
import torch

from . import emulated
from .hopper import matrix

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
    "half_expected": None,
    "no_start": "its barrier was not followed by mbarrier_init_done",
    "no_end": "block 0 of the cluster is asked for something, and has ended",
}
"""Those of two blocks that fill each other's shared memory."""


def run(fault: str | None, order: int) -> tuple[int, bool]:
    """The status, and whether the output is right."""
    left, right = matrix(64, 128, torch.bfloat16, 1), matrix(128, 128, torch.bfloat16, 2)
    out = emulated.Bordered.empty(64, 128, torch.float32)
    number = 0 if fault is None else 1 + list(FAULTS).index(fault)
    with emulated.grid(order, seed=5, capability=90) as lib:
        left.allow(), right.allow()
        views = (ctypes.byref(emulated.view(one.t)) for one in (left, right))
        status = lib.deltaops_test_hopper_fault(number, *views, ctypes.c_void_p(out.t.data_ptr()))
    oracle = left.t.double() @ right.t.double().t()
    return status, torch.allclose(out.t.double(), oracle, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", range(3), ids=["ascending", "descending", "shuffled"])
def test_the_right_kernel_runs(order: int) -> None:
    assert run(None, order) == (0, True), emulated.error()


@pytest.mark.parametrize("fault", FAULTS)
def test_mistakes_are_seen(fault: str) -> None:
    says = FAULTS[fault]
    if says is None:
        assert not all(run(fault, order)[1] for order in range(3))
    else:
        assert run(fault, emulated.ASCENDING)[0] != 0
        assert says in emulated.error()


def run_store(fault: str | None, order: int) -> tuple[int, bool]:
    """The status, and whether the output is right."""
    given, out = (
        matrix(64, 128, torch.bfloat16, 1),
        emulated.Bordered.empty(64, 128, torch.bfloat16),
    )
    number = 0 if fault is None else 1 + list(STORE_FAULTS).index(fault)
    with emulated.grid(order, seed=5, capability=90) as lib:
        given.allow(), out.allow()
        views = (ctypes.byref(emulated.view(one.t)) for one in (given, out))
        status = lib.deltaops_test_hopper_store(number, *views)
    assert out.intact()
    return status, torch.equal(out.t, given.t)


@pytest.mark.parametrize("order", range(3), ids=["ascending", "descending", "shuffled"])
def test_the_right_store_runs(order: int) -> None:
    assert run_store(None, order) == (0, True), emulated.error()


@pytest.mark.parametrize("fault", STORE_FAULTS)
def test_mistakes_of_a_store_are_seen(fault: str) -> None:
    says = STORE_FAULTS[fault]
    if says is None:
        assert not all(run_store(fault, order)[1] for order in range(3))
    else:
        assert run_store(fault, emulated.ASCENDING)[0] != 0
        assert says in emulated.error()


def run_cluster(fault: str | None, order: int) -> tuple[int, bool]:
    """The status, and whether both blocks read all."""
    given = matrix(384, 64, torch.bfloat16, 1)
    out = torch.full((2, 384, 64), float("nan"), dtype=torch.bfloat16)
    number = 0 if fault is None else 1 + list(CLUSTER_FAULTS).index(fault)
    with emulated.grid(order, seed=5, capability=90) as lib:
        given.allow()
        view, to = ctypes.byref(emulated.view(given.t)), ctypes.c_void_p(out.data_ptr())
        status = lib.deltaops_test_hopper_cluster(number, view, to)
    return status, torch.equal(out, given.t.expand_as(out))


@pytest.mark.parametrize("order", range(3), ids=["ascending", "descending", "shuffled"])
def test_the_right_cluster_runs(order: int) -> None:
    assert run_cluster(None, order) == (0, True), emulated.error()


@pytest.mark.parametrize("fault", CLUSTER_FAULTS)
def test_mistakes_of_a_cluster_are_seen(fault: str) -> None:
    says = CLUSTER_FAULTS[fault]
    if says is None:
        assert not all(run_cluster(fault, order)[1] for order in range(3))
    else:
        assert run_cluster(fault, emulated.ASCENDING)[0] != 0
        assert says in emulated.error()


def run_flag(fault: str | None, order: int) -> tuple[int, bool]:
    """The status, and whether the second block read what the first one wrote."""
    given = matrix(128, 64, torch.bfloat16, 1)
    middle = emulated.Bordered.empty(128, 64, torch.bfloat16)
    out = torch.full((128, 64), float("nan"), dtype=torch.bfloat16)
    flag = torch.zeros(1, dtype=torch.int32)
    number = 0 if fault is None else 1 + list(FLAG_FAULTS).index(fault)
    with emulated.grid(order, seed=5, capability=90) as lib:
        given.allow(), middle.allow(), emulated.allow(flag)
        views = (ctypes.byref(emulated.view(one.t)) for one in (given, middle))
        places = (ctypes.c_void_p(t.data_ptr()) for t in (flag, out))
        status = lib.deltaops_test_hopper_flag(number, *views, *places)
    return status, torch.equal(out, given.t)


@pytest.mark.parametrize("order", range(3), ids=["ascending", "descending", "shuffled"])
def test_the_right_flag_runs(order: int) -> None:
    assert run_flag(None, order) == (0, True), emulated.error()


@pytest.mark.parametrize("fault", FLAG_FAULTS)
def test_mistakes_of_a_flag_are_seen(fault: str) -> None:
    says = FLAG_FAULTS[fault]
    if says is None:
        assert not all(run_flag(fault, order)[1] for order in range(3))
    else:
        assert run_flag(fault, emulated.ASCENDING)[0] != 0
        assert says in emulated.error()
