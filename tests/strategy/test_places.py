"""A search among places in a controller: resumed to the bit, and its end where it raises."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from deltaops.errors import CheckpointError
from deltaops.strategy import Controller, ShiftedSigmoid
from deltaops.strategy.budget import sigmoid

from .conftest import STEPS, Loop, bits, loss_of, same


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


def test_places_that_were_taken_out_are_not_recalled(tmp_path: Path) -> None:
    loop = Loop(made()).begin().train(3)
    loop.controller.save(tmp_path / "three")
    loop.train(7)
    with pytest.raises(CheckpointError, match="taken out do not come back"):
        loop.controller.recall(tmp_path / "three")
    loop.controller.save(tmp_path / "seven")
    loop.controller.recall(tmp_path / "seven")


def test_a_run_that_ends_before_the_choice_gives_every_place_its_own_scale() -> None:
    loop = Loop(made())
    delta = loop.handle.delta
    loop.begin().train(3)
    assert loop.handle.delta != delta
    loop.controller.close()
    assert loop.handle.delta == delta
    assert loop.handle.history[-1]["kind"] == "left alone"
    assert "before the choice at step 6" in loop.handle.history[-1]["reason"]
