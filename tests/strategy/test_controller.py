"""The controller: what it logs, that a run resumes with the same decisions, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaops
from deltaops import Adapter, LoRA
from deltaops.errors import AttachError, CheckpointError, ConfigError
from deltaops.strategy import (
    Action,
    Controller,
    DisableUseless,
    Monitor,
    Part,
    Policy,
    Row,
    Run,
    WarmIn,
    When,
    at,
    disable,
    enable,
    freeze,
    grow,
    read_log,
    read_rows,
    weigh,
)
from deltaops.strategy.monitor import CLOCKS
from deltaops.surgery import resize

from .conftest import STEPS, Loop, Net, Watcher, attached, bits, same

Make = Callable[..., Controller]


class Drawn(Watcher):
    """Weighs LoRA by chance: by the run's generator and a count of its own."""

    def __init__(self) -> None:
        super().__init__(self._draw, "drawn")
        self.count = torch.zeros(())

    def _draw(self, run: Run) -> list[Action]:
        self.count += torch.rand((), generator=run.generator)
        factor = round(float(self.count) % 1, 3)
        run.handle.weigh("lora", factor)
        return [Action("weigh", "lora", f"drew {factor}", detail={"to": factor})]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"count": self.count}

    def restore(self, state: Any, tensors: Any) -> None:
        self.count = tensors["count"].clone()


def everything(folder: Path) -> list[Part]:
    """Parts that act at many of the steps, one that is rolled back, and one that fails."""

    def fail(run: Run) -> list[Action]:
        if run.step == 7:
            run.handle.disable("lora")
            raise ValueError("at step 7")
        return []

    harm = When(at(4), weigh("lora", -3.0), watch=2)
    return [
        Monitor(2, path=folder / "monitor.csv"),
        Policy(When(at(2), freeze("bitfit")), harm),
        DisableUseless(start=8),
        Drawn() if folder.name == "drawn" else WarmIn("lora", 2, start=1, levels=2),
        Watcher(fail, "failing"),
    ]


def seen(table: Path) -> list[Row]:
    """What decisions may go by; within a step in any order."""
    return sorted(row for row in read_rows(table) if row.quantity not in CLOCKS)


@pytest.mark.parametrize("kind", ["levels", "drawn"])
def test_a_run_stopped_after_any_step_goes_on_to_the_same_bits(
    steered: Make, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / kind
    folder.mkdir()
    straight = Loop(steered(*everything(folder))).begin()
    saved = []
    for step in range(STEPS):
        saved.append(straight.saved())
        straight.train(step + 1)
    wanted = bits(straight.handle, straight.optimizer)
    log = (tmp_path / "log.jsonl").read_text()
    table = seen(folder / "monitor.csv")
    kinds = [line["kind"] for line in read_log(tmp_path / "log.jsonl")]
    undone = {"levels": {"roll back"}, "drawn": set()}  # where weights are drawn, none stays
    assert {"left alone", "error", "freeze", "disable", "weigh"} | undone[kind] <= set(kinds)
    for one in saved if kind == "levels" else saved[::4]:
        again = Loop(steered(*everything(folder))).resume(copy.deepcopy(one))
        again.train()
        assert same(bits(again.handle, again.optimizer), wanted), one["step"]
        assert (tmp_path / "log.jsonl").read_text() == log, one["step"]
        assert again.handle.history == straight.handle.history
        assert seen(folder / "monitor.csv") == table, one["step"]


def test_the_same_run_writes_the_same_log(steered: Make, tmp_path: Path) -> None:
    texts, ends = [], []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        loop = Loop(steered(*everything(tmp_path / name), log=f"{name}.jsonl")).begin().train()
        texts.append((tmp_path / f"{name}.jsonl").read_bytes())
        ends.append(bits(loop.handle, loop.optimizer))
    assert texts[0] == texts[1]
    assert same(*ends)


def test_history_log_and_report_tell_the_same(steered: Make, tmp_path: Path) -> None:
    controller = steered(Policy(When(at(2), freeze("lora"))))
    loop = Loop(controller).begin().train(3)
    (event,) = loop.handle.history
    assert read_log(tmp_path / "log.jsonl")[1:] == [event]
    assert (event["step"], event["part"], event["kind"]) == (2, "policy", "freeze")
    assert event["reason"] == "step 2 ≥ 2"
    assert "step 2: freeze lora: step 2 ≥ 2" in controller.report()


@pytest.mark.parametrize("announces", [False, True])
def test_a_part_that_raises_is_undone_and_off(
    steered: Make, tmp_path: Path, announces: bool
) -> None:
    before: dict[str, Any] = {}

    def fail(run: Run) -> list[Action]:
        if run.step == 3:
            before.update(bits(run.handle, run.optimizer))
            run.secure()
            run.handle.disable("lora", "bitfit")
            run.handle.weigh("lora", 5.0)
            with torch.no_grad():
                for _, parameter in run.handle.named_parameters():
                    parameter.add_(1)
                    parameter.requires_grad_(False)
                    run.optimizer.state[parameter]["exp_avg"].zero_()
            # new objects in the places of the old ones, as a change of ranks makes them
            place: Any = run.model.get_submodule("one")
            held = place.lora_A["lora"]
            held.weight = torch.nn.Parameter(torch.zeros(1, 6))
            run.optimizer.param_groups[0]["params"].pop()
            raise RuntimeError("half done")
        return []

    controller = steered(Watcher(fail, announces=announces))
    loop = Loop(controller).begin().train(3)
    assert same(bits(loop.handle, loop.optimizer), before)
    assert [event["kind"] for event in loop.handle.history] == ["error"]
    assert "half done" in loop.handle.history[0]["detail"]["traceback"]
    assert "off: RuntimeError: half done (step 3, after_step)" in controller.report()
    loop.train()
    plain = Loop(steered(log="other.jsonl")).begin().train()
    assert same(bits(loop.handle, loop.optimizer), bits(plain.handle, plain.optimizer))
    assert len(read_log(tmp_path / "log.jsonl")) == 2


def test_what_a_part_merged_before_it_raised_is_applied_again() -> None:
    def fail(run: Run) -> list[Action]:
        run.handle.merge()
        raise RuntimeError("merged")

    loop = Loop(Controller([Watcher(fail)])).begin().train(1)
    plain = Loop(Controller([])).begin().train(1)
    assert not loop.handle.merged
    assert loop.controller.failed
    assert same(
        bits(loop.train().handle, loop.optimizer), bits(plain.train().handle, plain.optimizer)
    )


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda run: ["freeze"], "answers with Actions"),
        (lambda run: [Action("grow", "lora", "why", detail={"to": math.nan})], "JSON"),
        (lambda run: 3, "not iterable"),
    ],
)
def test_an_answer_that_is_none_counts_as_a_failure(steered: Make, answer: Any, told: str) -> None:
    controller = steered(Watcher(answer))
    Loop(controller).begin().train(1)
    assert told in controller.failed["watcher"]


def test_a_state_that_cannot_be_saved_does_not_lose_the_run(steered: Make, tmp_path: Path) -> None:
    part = Watcher(lambda run: ())
    part.state = lambda: {"number": object()}  # type: ignore[method-assign]
    controller = steered(part)
    loop = Loop(controller).begin().train(2)
    controller.save(tmp_path / "state.safetensors")
    assert "watcher" in controller.failed
    loop.train(3)


def test_numbers_that_are_none_are_logged_and_decide_nothing(steered: Make, tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    part = Watcher(lambda run: ())
    part.after_evaluation = lambda run: seen.append(dict(run.metrics)) or ()  # type: ignore[method-assign, func-returns-value]
    loop = Loop(Controller([part], log=tmp_path / "log.jsonl")).begin()
    for value in (math.nan, math.nan, 0.5, math.inf):
        loop.controller.after_evaluation({"eval_loss": value, "eval_runtime": 3.0})
    loop.controller.after_evaluation({"loss": math.nan, "accuracy": 0.5})
    assert [one for one in seen if one] == [{"loss": 0.5}, {"accuracy": 0.5}]
    reasons = [event["reason"] for event in loop.handle.history]
    assert reasons[0] == "metric eval_loss is nan, which is no number to go by"
    assert len(reasons) == 3
    loop.controller.after_backward(math.inf)
    assert loop.controller.run is not None
    assert loop.controller.run.loss is None
    json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize(("saved", "end"), [(1, 3), (3, 7)])
def test_recall_gives_back_ranks_switches_and_what_is_off(
    tmp_path: Path, saved: int, end: int
) -> None:
    rules = (
        When(at(2), disable("bitfit")), When(at(4), enable("bitfit")), When(at(5), grow("lora", 2)),
    )  # fmt: skip
    loop = Loop(Controller([Policy(*rules)])).begin().train(saved)
    loop.controller.save(tmp_path / "state")
    wanted = bits(loop.handle, loop.optimizer)
    model = {key: value.clone() for key, value in loop.handle.model.state_dict().items()}
    loop.train(end)
    loop.controller.recall(tmp_path / "state")
    loop.handle.model.load_state_dict(model)
    assert loop.handle.enabled == wanted["enabled"]
    for key, parameter in loop.handle.named_parameters():
        assert torch.equal(parameter, wanted[key]), key
    loop.handle.revert()
    torch.manual_seed(5)
    for (key, one), other in zip(
        loop.handle.model.state_dict().items(), Net().state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), key


def test_recall_puts_back_a_place_that_is_gone(tmp_path: Path) -> None:
    loop = Loop(Controller([])).begin().train(1)
    loop.controller.save(tmp_path / "state")
    shapes = {key: p.shape for key, p in loop.handle.named_parameters()}
    resize(loop.handle, {"one": 5, "two": 0}, part="lora", optimizer=loop.optimizer)
    loop.handle.disable("bitfit")
    loop.controller.recall(tmp_path / "state")
    assert {key: p.shape for key, p in loop.handle.named_parameters()} == shapes
    assert loop.handle.enabled == ("lora", "bitfit")


def test_another_setting_than_the_resumed_runs_is_refused() -> None:
    def loop(scaling: float) -> Loop:
        delta = LoRA(r=2, target_modules=["one"]) + Adapter(
            size=2, scaling=scaling, target_modules=["two"]
        )
        return Loop(Controller([]), delta)

    saved = loop(1.0).begin().train(1).saved()
    other = loop(2.0)
    with pytest.raises(CheckpointError, match=r"adapter with scaling=1.0, and here it has 2.0"):
        other.resume(saved)
    assert other.handle.parts["adapter"] == Adapter(size=2, scaling=2.0, target_modules=["two"])


def test_what_is_no_part_is_refused() -> None:
    for wrong in (object(), Monitor, "no-such-part", Watcher(lambda run: (), "a/b")):
        with pytest.raises(ConfigError):
            Controller([wrong])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="two parts are called 'monitor'"):
        Controller([Monitor(), Monitor(5)])
    with pytest.raises(ConfigError, match="belong together"):
        Controller([], evaluate=lambda model: {})


def test_a_run_that_cannot_be_steered_is_refused(tmp_path: Path) -> None:
    controller = Controller([Monitor()], log=tmp_path / "log.jsonl")
    with pytest.raises(AttachError, match="no run"):
        controller.after_step()
    handle = attached()
    with pytest.raises(ConfigError, match="lacks 7 of the handle's parameters"):
        controller.begin(handle, torch.optim.AdamW(Net().parameters()))
    optimizer = torch.optim.AdamW(handle.parameters())
    handle.revert()
    with pytest.raises(AttachError, match="no longer on the model"):
        controller.begin(handle, optimizer)
    merged = deltaops.attach(Net(), LoRA(r=2, target_modules=["one"]))
    optimizer = torch.optim.AdamW(merged.parameters())
    merged.merge()
    with pytest.raises(AttachError, match="merged"):
        controller.begin(merged, optimizer)
    assert not (tmp_path / "log.jsonl").exists()


def test_what_a_part_refuses_at_the_start_is_raised_and_undone(
    steered: Make, tmp_path: Path
) -> None:
    parts = (WarmIn("lora", start=2), Policy(When(at(2), freeze("lorra"))))
    loop = Loop(steered(*parts))
    loop.handle.history.append({"kind": "of an earlier run"})
    with pytest.raises(ConfigError, match=r"no part of the handle is called 'lorra'.*lora, bitfit"):
        loop.begin()
    assert loop.handle.enabled == ("lora", "bitfit")
    assert loop.handle.history == [{"kind": "of an earlier run"}]
    assert not (tmp_path / "log.jsonl").exists()


def test_the_log_of_another_run_is_refused(steered: Make, tmp_path: Path) -> None:
    policy = Policy(When(at(1), freeze("lora")))
    saved = Loop(steered(policy)).begin().train(3).saved()
    before = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="log of another run"):
        Loop(steered(policy)).begin()
    with pytest.raises(CheckpointError, match="had parts="):
        Loop(steered(Policy(When(at(1), freeze("bitfit"))))).resume(saved)
    assert (tmp_path / "log.jsonl").read_bytes() == before
    (tmp_path / "log.jsonl").write_bytes(
        before.replace(b"2265 1", b"2265 2").replace(b"step 1", b"step 2")
    )
    with pytest.raises(CheckpointError, match="line 2 of log"):
        Loop(steered(policy)).resume(saved)


def test_a_state_of_other_shapes_is_refused_and_changes_nothing(steered: Make) -> None:
    saved = Loop(steered(Policy(When(at(1), weigh("lora", 2.0))))).begin().train(1).saved()
    saved["controller"]["facts"]["form"]["shapes"]["bitfit/one.bias"] = [99]
    other = Loop(steered(Policy(When(at(1), weigh("lora", 2.0)))))
    before = bits(other.handle, other.optimizer)
    with pytest.raises(CheckpointError, match=r"bitfit/one.bias of shape \(99,\)"):
        other.resume(saved)
    assert same(bits(other.handle, other.optimizer), before)


def test_a_file_that_is_no_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"nothing")
    loop = Loop(Controller([Monitor()]))
    with pytest.raises(CheckpointError, match="state of a controller"):
        loop.controller.begin(loop.handle, loop.optimizer, resume=tmp_path / "state.safetensors")


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message")


def test_an_error_whose_message_raises_is_one_more_error(steered: Any) -> None:
    def do(run: Run) -> list[Action]:
        raise Unspeakable

    loop = Loop(steered(Watcher(do))).begin().train()
    assert "off: Unspeakable, whose message raises RuntimeError" in loop.controller.report()
