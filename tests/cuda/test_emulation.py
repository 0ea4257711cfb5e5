"""The emulated grid tells a kernel with a mistake from its right twin, in some order of threads."""

from __future__ import annotations

import ctypes

import pytest
import torch

from . import emulated

FAULTS = {
    "no_barrier": None,
    "no_wait": None,
    "refilled_early": None,
    "half_at_the_barrier": "deadlock: threads 0-63 wait at barrier 0 (__syncthreads); 64-127 have",
    "lanes_apart": "is at __syncwarp, and earlier lanes are at ldmatrix",
    "beyond_shared": "wrote outside its 512 bytes of dynamic shared memory",
    "beyond_global": "lie outside every buffer",
    "unaligned": "is not on 16 bytes",
}


def run(fault: str, wrong: bool, order: int) -> tuple[int, bool]:
    """The status, and whether the output is right."""
    given = emulated.Bordered(torch.arange(128.0).view(1, -1))
    out = emulated.Bordered.empty(1, 128, torch.float32)
    with emulated.grid(order, seed=7) as lib:
        given.allow()
        pointers = (ctypes.c_void_p(t.t.data_ptr()) for t in (given, out))
        status = lib.deltaops_test_fault(list(FAULTS).index(fault), int(wrong), *pointers)
    return status, bool(torch.equal(out.t, given.t.flip(1)))


@pytest.mark.parametrize("order", range(3), ids=["ascending", "descending", "shuffled"])
@pytest.mark.parametrize("fault", FAULTS)
def test_right_kernels_run(fault: str, order: int) -> None:
    assert run(fault, False, order) == (0, True), emulated.error()


@pytest.mark.parametrize("fault", FAULTS)
def test_mistakes_are_seen(fault: str) -> None:
    says = FAULTS[fault]
    if says is None:
        assert not all(run(fault, True, order)[1] for order in range(3))
    else:
        assert run(fault, True, emulated.ASCENDING)[0] != 0
        assert says in emulated.error()
