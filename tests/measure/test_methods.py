"""A step of a method beside its eager form, on tiny models; no timing is asserted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltaops
from deltaops.measure import methods, pair
from deltaops.measure.cell import EAGER, OURS
from deltaops.measure.compare.contenders import contenders
from deltaops.measure.compare.reader import Reader
from deltaops.measure.difference import difference
from deltaops.measure.workloads import Workload
from deltaops.testing.architectures import build
from deltaops.tuning.spec import parse_delta

ALL = contenders()


def reader(name: str) -> nn.Module:
    return Reader(build(name, hidden_size=128), 128, 20)


def workload(name: str) -> Workload:
    return Workload(name, lambda: reader(name), 60, 3, 8, classes=20)


@pytest.mark.parametrize("name", ["dora", "prefix-mlp", "prefix-pool", "intrinsic"])
def test_a_decoder_agrees_with_its_eager_form(name: str) -> None:
    cell = methods.measure_method(ALL[name], workload("llama"), "f32", rounds=1)
    assert set(cell.timings) == set(cell.saved) == {OURS, EAGER}
    assert cell.label == f"{ALL[name].title} on llama, 3×8 f32"


def test_what_decodes_a_prompt_is_of_the_eager_model_and_no_bytes_of_a_pass() -> None:
    handle = deltaops.attach(reader("llama"), parse_delta(ALL["intrinsic"].spec))
    twin, _ = pair.eager_twin(reader("llama"), handle, torch.float32)
    assert {"encoder.eager_base", "encoder.eager_projection"} <= dict(twin.named_buffers()).keys()


@pytest.mark.parametrize("name", ["lora", "prefix-mlp"])
def test_halves_are_held_to_what_eager_torch_is_off(name: str) -> None:
    cell = methods.measure_method(ALL[name], workload("bert"), "bf16", rounds=1)
    assert set(cell.timings) == {OURS, EAGER}


def test_another_function_is_stopped_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    right = pair.eager_twin

    def wrong(base: nn.Module, handle: pair.Handle, dtype: torch.dtype) -> object:
        twin, leaves = right(base, handle, dtype)
        if dtype is torch.bfloat16:
            with torch.no_grad():
                for leaf in leaves.values():
                    leaf.mul_(3.0)
        return twin, leaves

    monkeypatch.setattr(pair, "eager_twin", wrong)
    with pytest.raises(AssertionError, match="computes something else; nothing was timed"):
        methods.measure_method(ALL["lora"], workload("bert"), "bf16", rounds=1)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_lost_gradient_is_stopped_however_small(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = pair.answer

    def wrong(model: nn.Module, trained: list[nn.Parameter], batch: pair.Batch) -> pair.Step:
        loss, (first, *others) = right(model, trained, batch)
        ours = hasattr(model, "encoder") and deltaops.surgery.handle_of(model) is not None
        if ours:
            rest = torch.cat([g.flatten() for g in others])
            assert first.norm() < (1e-3 if dtype == "f32" else 1e-2) * rest.norm()
        return loss, [first * 0 if ours else first, *others]

    monkeypatch.setattr(pair, "answer", wrong)
    with pytest.raises(AssertionError, match=r"off by 1.0e\+00 .* in leaf 0 of"):
        methods.measure_method(ALL["intrinsic"], workload("bert"), dtype, rounds=1)


def test_a_model_that_cannot_have_a_method_says_why() -> None:
    short = Workload("bert", lambda: Reader(build("bert", max_position_embeddings=16), 24, 20), 60,
                     3, 8, classes=20)  # fmt: skip
    cell = methods.measure_method(ALL["prompt"], short, "f32", rounds=1)
    assert cell.timings == {}
    assert "positions" in cell.absent[OURS]


def test_a_slower_step_is_explained() -> None:
    x = torch.randn(200, 200)
    said = difference(lambda: (x @ x).exp(), lambda: (x @ x).sin())
    assert "aten::exp +" in said
    assert "aten::sin -" in said
    assert not difference(lambda: x @ x, lambda: None).endswith("; ")


def test_texts_have_lengths_of_their_own() -> None:
    found = workload("bert").inputs()
    assert found["attention_mask"].sum(1).tolist() == [4, 6, 8]
    assert found["labels"].shape == (3,)
