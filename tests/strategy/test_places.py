"""A search among places in a controller: resumed to the bit, and undone where it raises."""

from __future__ import annotations

import copy
from typing import Any

from deltaops.strategy import Controller, ShiftedSigmoid

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


def test_a_search_that_raises_leaves_the_step_as_it_was() -> None:
    def fails(model: Any, batch: int) -> Any:
        if loop.controller.run is not None and loop.controller.run.step == 3:
            raise ArithmeticError("no batch")
        return loss_of(model, batch)

    loop = Loop(made(fails))
    loop.begin().train(2)
    delta = loop.handle.delta
    loop.train(3)
    assert "no batch" in loop.controller.report()
    assert loop.handle.delta == delta
    loop.train()
