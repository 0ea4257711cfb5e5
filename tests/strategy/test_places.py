"""A search among places in a controller: resumed to the bit, and its end where it raises."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deltaops import Combined, LoRA
from deltaops.modules import FrozenLinear
from deltaops.strategy import Controller, ShiftedSigmoid
from deltaops.strategy.budget import sigmoid
from deltaops.strategy.form import Form
from deltaops.surgery import resize

from .conftest import STEPS, Loop, attached, bits, loss_of, same, validation


def made(loss: Any = loss_of) -> Controller:
    # "one" takes 48 parameters, "two" 39
    part = ShiftedSigmoid(50, [-3, -4], loss, part="lora", until=6, lr=0.3)
    return Controller([part])


def test_a_search_resumes_to_the_same_bits() -> None:
    straight = Loop(made()).begin()
    saved = []
    for step in range(STEPS):
        saved.append(straight.saved())
        straight.train(step + 1)
    kinds = [event["kind"] for event in straight.handle.history]
    assert kinds == ["weigh", "enable", "disable"]
    lora = {site.path for site in straight.handle.places if site.part == "lora"}
    assert lora == {straight.handle.history[1]["place"]}
    wanted = bits(straight.handle, straight.optimizer)
    for one in saved[1::3]:
        again = Loop(made()).resume(copy.deepcopy(one)).train()
        assert same(bits(again.handle, again.optimizer), wanted), one["step"]
        assert again.handle.history == straight.handle.history


def test_a_search_that_raises_gives_every_place_its_own_scale() -> None:
    def fails(model: Any, batch: int) -> Any:
        if loop.controller.run is not None and loop.controller.run.step == 3:
            raise ArithmeticError("no batch")
        return loss_of(model, batch)

    loop = Loop(made(fails))
    delta = loop.handle.delta
    loop.begin().train(2)
    assert loop.handle.delta != delta
    loop.train(3)
    assert "no batch" in loop.controller.report()
    assert loop.handle.delta == delta
    loop.train()
    assert loop.handle.delta == delta


def test_a_choice_that_raises_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise ArithmeticError("no resizing")

    loop = Loop(made())
    delta = loop.handle.delta
    loop.begin().train(5)
    monkeypatch.setattr(sigmoid, "resize", fails)
    loop.train(6)
    assert "no resizing" in loop.controller.report()
    assert loop.handle.delta == delta
    loop.train(7)
    monkeypatch.setattr(sigmoid, "rescale", fails)
    second = Loop(made())
    with pytest.raises(ArithmeticError):
        second.begin()
    assert second.handle.delta == delta


def test_what_is_not_given_back_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise ArithmeticError("no rescaling")

    loop = Loop(made()).begin().train(2)
    monkeypatch.setattr(sigmoid, "rescale", fails)
    loop.train(3)
    assert loop.handle.history[-1]["reason"].endswith(
        "is not all undone (ArithmeticError: no rescaling)"
    )


GATED = Combined([LoRA(r=3, alpha=6, target_modules=["one", "two"])], gated=True)


@pytest.mark.parametrize("wished", [None, GATED], ids=["plain", "gated"])
def test_places_that_were_taken_out_are_recalled(wished: Any, tmp_path: Path) -> None:
    loop = Loop(made(), wished).begin().train(3)
    loop.controller.save(tmp_path / "three")
    saved, delta, places = copy.deepcopy(loop.saved()), loop.handle.delta, loop.handle.places
    with torch.no_grad():
        wanted = validation(loop.handle.model)
    loop.train(7)
    assert loop.handle.places != places
    loop.controller.save(tmp_path / "seven")
    loop.controller.recall(tmp_path / "three")
    assert (loop.handle.delta, loop.handle.places) == (delta, places)
    with torch.no_grad():
        for key, parameter in loop.handle.named_parameters():
            parameter.copy_(saved["parameters"][key])
        assert validation(loop.handle.model) == wanted
    held = [p for group in loop.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in loop.handle.parameters()}
    loop.controller.recall(tmp_path / "seven")
    assert loop.handle.places != places
    loop.controller.recall(tmp_path / "three")
    loop.train(8)
    loop.handle.revert()
    assert [type(one) for one in (loop.handle.model.one, loop.handle.model.two)] == [nn.Linear] * 2


def test_a_place_without_another_delta_comes_back() -> None:
    handle = attached(LoRA(r=3, alpha=6, target_modules=["one", "two"]))
    form, places, delta = Form.of(handle), handle.places, handle.delta
    with torch.no_grad():
        handle.model.one.lora_B["default"].weight.normal_()
        values = {key: p.clone() for key, p in handle.named_parameters()}
        wanted = validation(handle.model)
        resize(handle, {"one": 0, "two": 2})
        assert type(handle.model.one) is FrozenLinear
        form.apply(handle, None)
        for key, parameter in handle.named_parameters():
            parameter.copy_(values[key])
        assert validation(handle.model) == wanted
    assert (handle.places, handle.delta) == (places, delta)
    handle.revert()
    assert type(handle.model.one) is nn.Linear


def test_a_run_that_ends_before_the_choice_gives_every_place_its_own_scale() -> None:
    loop = Loop(made())
    delta = loop.handle.delta
    loop.begin().train(3)
    assert loop.handle.delta != delta
    loop.controller.close()
    assert loop.handle.delta == delta
    assert loop.handle.history[-1]["kind"] == "left alone"
    assert "before the choice at step 6" in loop.handle.history[-1]["reason"]
