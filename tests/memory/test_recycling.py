"""Large outputs on recycled memory: whose it is, when it goes back, and that nobody can tell."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaops import memory
from deltaops.backends.cpu import native
from deltaops.errors import ConfigError
from deltaops.ops import Branch, cross_entropy, delta_linear, norm_bias

CORE: Any = native()
if isinstance(CORE, str):
    pytest.skip(CORE, allow_module_level=True)
ROWS, COLUMNS = 1024, 512  # 2 MiB of float32: one block of the smallest class
BLOCK = 2 << 20


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    """No idle block before, the usual limit after."""
    gc.collect()
    memory.release()
    yield
    memory.start(CORE)


def large(rows: int = ROWS, columns: int = COLUMNS, dtype: torch.dtype = torch.float32) -> Tensor:
    return memory.large(rows, columns, dtype, int(dtype is torch.bfloat16))


def test_a_block_waits_for_the_next_tensor_of_its_class() -> None:
    first = large()
    address, view = first.data_ptr(), first[7:9]
    assert address % 64 == 0
    del first
    assert memory.idle() == 0  # the view holds it
    del view
    assert memory.idle() == BLOCK
    second = large(COLUMNS, 2 * ROWS - 8, torch.bfloat16)  # a little smaller: the same class
    assert (second.data_ptr(), second.dtype) == (address, torch.bfloat16)
    assert second.shape == (COLUMNS, 2 * ROWS - 8)
    assert second.is_contiguous()
    assert memory.idle() == 0
    assert large(2 * ROWS).data_ptr() != address


def test_small_outputs_are_left_to_torch() -> None:
    for shape in ((0, COLUMNS), (ROWS, 0), (3, 5)):
        out = large(*shape)
        assert out.shape == shape
        del out
    assert memory.idle() == 0


def test_idle_blocks_stay_below_the_limit_and_go_back_on_demand() -> None:
    CORE.recycle_limit(3 * BLOCK)
    tensors = [large() for _ in range(5)]
    kept = [t.data_ptr() for t in tensors[2:]]
    while tensors:
        del tensors[0]  # the oldest two have to make room
    assert memory.idle() == 3 * BLOCK
    assert large().data_ptr() == kept[-1]
    CORE.recycle_limit(BLOCK)
    assert memory.idle() == BLOCK
    memory.release()
    assert memory.idle() == 0


def test_blocks_that_nobody_wants_any_more_go_back() -> None:
    big = large(4 * ROWS)
    del big
    assert memory.idle() == 4 * BLOCK
    for _ in range(4096):
        large()
    assert memory.idle() == 4 * BLOCK + BLOCK
    large()
    assert memory.idle() == BLOCK


def test_a_capsule_that_nobody_takes_gives_its_block_back() -> None:
    capsule = CORE.recycled(0, ROWS, COLUMNS)
    assert memory.idle() == 0
    del capsule
    assert memory.idle() == BLOCK


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_steps_of_many_lengths_leave_nothing_behind() -> None:
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    lengths = random.Random(0)
    CORE.recycle_limit(64 << 20)  # most blocks go back at once
    before, pinned = resident(), []
    for _ in range(10):
        step, others = [], []
        for _ in range(40):
            out = large(lengths.randrange(200, 6000))
            out[::2] = 1.0  # a page is two rows
            step.append(out)
            others.append(torch.ones(lengths.randrange(1000, 300_000)))  # torch's own in between
        live = sum(out.nbytes for out in step)
        pinned += [t[:1].clone() for t in others]
        del step, out, others
    memory.release()
    assert resident() - before < live // 2


@pytest.mark.parametrize("shape", [(0, 4), (4, -1), (1 << 62, 4), (1 << 40, 1 << 40)])
def test_sizes_that_cannot_be_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="recycled: rows and cols must be positive"):
        CORE.recycled(0, *shape)


def test_memory_that_the_system_has_not_got_is_an_error() -> None:
    with pytest.raises(MemoryError):
        CORE.recycled(0, 1 << 30, 1 << 29)  # 2 EiB


def test_such_a_tensor_is_like_any_other() -> None:
    t = large().normal_()
    leaf = t.requires_grad_()
    (leaf * 2).sum().backward()
    assert leaf.grad is not None
    for twin in (copy.deepcopy(t), pickle.loads(pickle.dumps(t.detach())), t.detach().clone()):
        assert torch.equal(twin, t)
        assert twin.data_ptr() != t.data_ptr()
    shared = t.detach()
    before = shared.clone()
    shared.share_memory_()
    assert torch.equal(shared, before)


def test_threads_never_share_a_block() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(60):
            mine = large().fill_(number)
            other = large(2 * ROWS).fill_(-number)
            if not (mine == number).all() or not (other == -number).all():
                wrong.append(number)
            del mine

    threads = [threading.Thread(target=work, args=(i + 1,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def results() -> list[Tensor]:
    """Outputs and gradients, each past a megabyte, of ops that take recycled memory."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, weight = normal(700, 500).requires_grad_(), normal(600, 500)
    branch = Branch(normal(4, 500).requires_grad_(), normal(600, 4).requires_grad_(), 0.5, 0.1)
    torch.manual_seed(3)
    y = delta_linear(x, weight, normal(600), [branch])
    z = norm_bias(y, normal(600).requires_grad_(), normal(600), norm="rms")
    loss = cross_entropy(z, torch.arange(700) % 600)
    grads = torch.autograd.grad(loss, [y, z, x, branch.a, branch.b])
    return [y.detach(), z.detach(), loss.detach(), *grads]


def test_what_lay_in_a_block_is_never_seen() -> None:
    CORE.recycle_limit(0)
    fresh = results()
    memory.start(CORE)
    for shape in ((700, 600), (700, 500)):
        poison = [large(*shape).fill_(float("nan")) for _ in range(4)]
        del poison
    assert memory.idle() > 0
    for got, want in zip(results(), fresh, strict=True):
        assert torch.equal(got, want)


def test_it_can_be_switched_off_and_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(memory.SWITCH, "0")
    memory.start(CORE)
    out = large()
    del out
    assert memory.idle() == 0
    monkeypatch.setenv(memory.SWITCH, "4")
    memory.start(CORE)
    outs = [large() for _ in range(3)]
    outs.clear()
    assert memory.idle() == 4 << 20
    monkeypatch.setenv(memory.SWITCH, "lots")
    with pytest.raises(ConfigError, match=r"a number of megabytes .* got 'lots'"):
        memory.start(CORE)
    monkeypatch.delenv(memory.SWITCH)
