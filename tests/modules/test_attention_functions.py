"""Ours in the place of transformers' functions: when they compute the same, and when not."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaops.modules import attention_functions as ours

pytest.importorskip("transformers")


def tensors(h: int = 4, h_kv: int = 2, l_q: int = 5, l_kv: int = 5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(2, heads, length, 6, generator=generator)
        for heads, length in ((h, l_q), (h_kv, l_kv), (h_kv, l_kv))
    )


def module(groups: int = 2, **settings: Any) -> Any:
    return SimpleNamespace(num_key_value_groups=groups, **settings)


@pytest.fixture
def theirs() -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings of each call of the op."""
    calls: list[dict[str, Any]] = []
    real = ours.attention

    def attention(*given: Tensor, **settings: Any) -> Tensor:
        calls.append(settings)
        return real(*given, **settings)

    monkeypatch.setattr(ours, "attention", attention)
    return calls


def compare(theirs: Any, who: Any, qkv: tuple[Tensor, ...], mask: Any, **settings: Any) -> Tensor:
    got, weights = ours.attend(theirs, "reference", False, who, *qkv, mask, **settings)
    want, _ = theirs(who, *qkv, mask, **settings)
    assert weights is None
    assert got.is_contiguous()
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    return got


MASK = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
SAME = {
    "plain": (module(is_causal=False), {}, None, {}),
    "causal-by-the-module": (module(is_causal=True), {}, None, {}),
    "causal-as-nothing-says-no": (module(), {}, None, {}),
    "not-causal-as-asked": (module(is_causal=True), {}, None, {"is_causal": False}),
    "causal-as-asked": (module(is_causal=False), {}, None, {"is_causal": True}),
    "scale": (module(), {}, None, {"scaling": 0.7}),
    "no-groups": (SimpleNamespace(), {"h": 2}, None, {}),
    "mask": (module(), {}, MASK, {}),
    "mask-of-heads": (module(), {}, MASK.expand(2, 4, 5, 5), {}),
    "mask-for-all": (module(), {}, MASK[:1], {}),
    "one-query": (module(is_causal=True), {"l_q": 1}, None, {}),
    "cache-with-room": (module(is_causal=True), {"l_kv": 8}, None, {}),
    "settings-of-others": (
        module(), {}, MASK, {"sliding_window": 3, "position_ids": torch.arange(5)}
    ),
    "settings-that-are-off": (
        module(), {}, None, {"output_attentions": False, "position_bias": None, "dropout": 0.0}
    ),
}  # fmt: skip


@pytest.mark.parametrize(("who", "shape", "mask", "settings"), SAME.values(), ids=SAME)
def test_the_op_runs_and_gives_the_same(
    who: Any, shape: Any, mask: Any, settings: Any, theirs: Any, ran: list[Any]
) -> None:
    compare(theirs, who, tensors(**shape), mask, **settings)
    assert len(ran) == 1


def test_a_mask_takes_the_place_of_causal(theirs: Any, ran: list[Any]) -> None:
    everything = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    compare(theirs, module(is_causal=True), tensors(), everything)
    compare(theirs, module(is_causal=True), tensors(), None)
    assert [call["causal"] for call in ran] == [False, True]


NOT_OURS = {
    "dropout": ({}, None, {"dropout": 0.5}),
    "numbers": ({}, torch.zeros(2, 1, 5, 5), {}),
    "bias": ({}, None, {"position_bias": torch.zeros(2, 4, 5, 5)}),
    "weights": ({}, None, {"output_attentions": True}),
    "flat-mask": ({}, MASK[0, 0], {}),
    "fewer-keys": ({"l_kv": 4}, None, {"is_causal": True}),
}


@pytest.mark.parametrize(("shape", "mask", "settings"), NOT_OURS.values(), ids=NOT_OURS)
def test_everything_else_is_theirs(
    shape: Any, mask: Any, settings: Any, theirs: Any, ran: list[Any]
) -> None:
    given = tensors(**shape)
    results = []
    for run in (theirs, lambda *a, **k: ours.attend(theirs, "reference", False, *a, **k)):
        torch.manual_seed(0)
        results.append(run(module(), *given, mask, **settings)[0])
    assert torch.equal(*results)
    assert not ran


def test_values_of_another_width_and_one_query_for_all_are_theirs(
    theirs: Any, ran: list[Any]
) -> None:
    q, k, v = tensors()
    for given in ((q, k, v[..., :4]), (q[:1], k, v)):
        got, _ = ours.attend(theirs, "reference", False, module(), *given, None)
        assert torch.equal(got, theirs(module(), *given, None)[0])
    assert not ran


def test_autocast_computes_in_its_own_dtype(theirs: Any, ran: list[Any]) -> None:
    given = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = ours.attend(theirs, "reference", False, module(), *given, None)
        assert got.dtype == torch.bfloat16
        assert not ran
        narrow = [t.bfloat16() for t in given]
        got, _ = ours.attend(theirs, "reference", False, module(), *narrow, None)
    assert got.dtype == torch.bfloat16
    assert len(ran) == 1


class Marked(Tensor):
    """A tensor of a class of its own, as a DTensor is."""


def test_tensors_of_other_classes_are_theirs(theirs: Any, ran: list[Any]) -> None:
    q, k, v = tensors()
    got, _ = ours.attend(theirs, "reference", False, module(), q.as_subclass(Marked), k, v, None)
    assert type(got) is Marked
    assert not ran


def test_what_the_op_does_not_take_is_turned_by_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as turn

    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, h, 5, 6, generator=generator) for h in (4, 2))
    cos, sin = torch.randn(2, 2, 5, 6, generator=generator)
    wide = cos.double(), sin.double()
    trained = cos.clone().requires_grad_(), sin
    for tables, settings in (((cos, sin), {"unsqueeze_dim": 1}), (wide, {}), (trained, {})):
        got = ours.rotate(turn, "auto", False, q, k, *tables, **settings)
        for a, b in zip(got, turn(q, k, *tables, **settings), strict=True):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype


def test_the_table_gives_ours_for_sdpa_alone(theirs: Any) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as real

    table = ours.AttentionTable(real, "auto", False)
    for found in (table["sdpa"], table.get("sdpa"), table.get_interface("sdpa", None)):
        assert found.func is ours.attend
        assert found.args == (theirs, "auto", False)
    assert table["flash_attention_2"] is real["flash_attention_2"]
    assert table.get_interface("eager", compare) is compare
    assert table.get("none") is None
    assert "sdpa" in table
    assert "none" not in table
    assert table.valid_keys() == real.valid_keys()
    with pytest.raises(KeyError, match="none"):
        table.get_interface("none", None)


def test_a_function_of_the_users_own_under_sdpa_is_kept() -> None:
    from transformers.modeling_utils import AttentionInterface

    def own(*_: Any, **__: Any) -> None:
        raise AssertionError

    real = AttentionInterface()
    real["sdpa"] = own
    assert ours.AttentionTable(real, "auto", False)["sdpa"] is own


@pytest.fixture
def _fresh() -> Iterator[None]:
    ours.known_sdpa.cache_clear()
    yield
    ours.known_sdpa.cache_clear()


@pytest.mark.usefixtures("_fresh")
def test_an_sdpa_that_computes_something_else_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if a version of transformers changed it, under the same name."""
    from transformers.integrations import sdpa_attention
    from transformers.models.bert.modeling_bert import BertSelfAttention

    real = sdpa_attention.sdpa_attention_forward

    def capped(module: Any, q: Tensor, *rest: Any, **settings: Any) -> Any:
        return real(module, 2 * q, *rest, **settings)

    assert set(ours.stand_ins(BertSelfAttention.forward, "auto", False)) == {ours.TABLE}
    ours.known_sdpa.cache_clear()
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", capped)
    assert ours.known_sdpa() is None
    assert ours.stand_ins(BertSelfAttention.forward, "auto", False) == {}


def test_what_calls_neither_is_left_alone() -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    assert ours.stand_ins(LlamaMLP.forward, "auto", False) == {}
    assert ours.stand_ins(torch.relu, "auto", False) == {}
