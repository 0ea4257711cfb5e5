"""Which of torch's attentions a prefix is merged into: what of it no GPU is needed for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from deltaops.backends import PrefixAttentionCall
from deltaops.backends.triton import TritonBackend, core, library_attention
from deltaops.backends.triton.library_attention import CUDNN, FLASH, Choice, choose

pytest.importorskip("triton")

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
Pick = Callable[..., None]


@pytest.fixture
def pick(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pick]:
    """Sets what torch would say on a GPU; tensors on "cuda" are fake ones."""

    def say(picked: SDPBackend, capability: int = 90, flash: bool = True) -> None:
        monkeypatch.setattr(library_attention, "can_use_flash_attention", lambda asked: flash)
        can = picked is SDPBackend.CUDNN_ATTENTION
        monkeypatch.setattr(library_attention, "can_use_cudnn_attention", lambda asked: can)
        monkeypatch.setattr(library_attention, "SDPAParams", lambda *asked: asked)
        monkeypatch.setattr(core, "capability", lambda tensor: capability)

        def choice(q: Tensor, *rest: Any, enable_gqa: bool, **more: Any) -> int:
            assert flash or can, "torch might raise"
            assert enable_gqa == (q.shape[1] != rest[0].shape[1])
            return int(picked.value)

        monkeypatch.setattr(torch, "_fused_sdp_choice", choice)

    with FakeTensorMode():
        yield say


def asked(d: int = 128, dtype: torch.dtype = BRAIN) -> Choice:
    q = torch.empty(2, 64, 8, d, dtype=dtype, device="cuda").transpose(1, 2)
    k = torch.empty(2, 64, 2, d, dtype=dtype, device="cuda").transpose(1, 2)
    return choose(q, k, k, True, 0.1)


@pytest.mark.parametrize(
    ("picked", "d", "capability", "library"),
    [
        (SDPBackend.CUDNN_ATTENTION, 128, 90, CUDNN),
        (SDPBackend.CUDNN_ATTENTION, 256, 90, FLASH),
        (SDPBackend.FLASH_ATTENTION, 128, 80, FLASH),
        (SDPBackend.FLASH_ATTENTION, 192, 89, FLASH),
        (SDPBackend.FLASH_ATTENTION, 256, 89, None),
        (SDPBackend.EFFICIENT_ATTENTION, 128, 90, None),
        (SDPBackend.MATH, 128, 90, None),
    ],
)
def test_torch_chooses_and_our_limits_are_kept(
    pick: Pick, picked: SDPBackend, d: int, capability: int, library: Any
) -> None:
    pick(picked, capability)
    assert asked(d).library is library


def test_torch_is_not_asked_where_it_might_raise(pick: Pick) -> None:
    pick(SDPBackend.MATH, flash=False)
    assert asked() == Choice(None, "torch would take neither flash nor cuDNN attention")


@pytest.mark.parametrize(("d", "dtype"), [(128, FULL), (100, BRAIN), (36, HALF)], ids=str)
def test_what_torchs_do_not_take_as_it_is(pick: Pick, d: int, dtype: torch.dtype) -> None:
    pick(SDPBackend.FLASH_ATTENTION)
    assert asked(d, dtype).library is None


CALL = PrefixAttentionCall("cuda", BRAIN, FULL, 2, 32, 8, 2048, 2048, 32, 128, False, True)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (CALL, "merged, own keys by torch's cuDNN attention: as torch chooses"),
        (CALL._replace(masked=True), "fused: a mask is for these kernels alone"),
        (CALL._replace(prefix=0), "fused: there is nothing to merge"),
        (CALL._replace(l_kv=0, causal=False), "fused: there is nothing to merge"),
        (CALL._replace(dtype=FULL, d=64), "fused: torch's flash and cuDNN attention take no"),
    ],
    ids=str,
)
def test_the_plan_says_which_way_and_why(pick: Pick, call: PrefixAttentionCall, said: str) -> None:
    pick(SDPBackend.CUDNN_ATTENTION)
    assert (TritonBackend().planned(call) or "").startswith(said)


@pytest.mark.parametrize("library", [FLASH, CUDNN], ids=lambda one: one.title)
def test_torchs_ops_take_what_they_are_given(library: Any) -> None:
    def heads(count: int, length: int, first: bool = False) -> Tensor:
        if first:
            return torch.empty(2, count, length, 64, dtype=BRAIN, device="meta")
        return torch.empty(2, length, count, 64, dtype=BRAIN, device="meta").transpose(1, 2)

    for first in (False, True):
        q, k = heads(8, 70, first), heads(2, 90, first)
        y, lse = library.forward(q, k, k, False, 0.1)
        assert (y.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:3], FULL)
        grads = library.backward(y, q, k, k, heads(8, 70), lse, False, 0.1)
        assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]
        if library is CUDNN:
            assert y.transpose(1, 2).is_contiguous()
            assert grads[0].transpose(1, 2).is_contiguous()
