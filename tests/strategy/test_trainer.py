"""The controller in a real Trainer: what it sees, and that a run goes on from its checkpoints."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import deltaops
from deltaops import BitFit, LoRA
from deltaops.errors import AttachError, CheckpointError
from deltaops.strategy import (
    Action,
    Controller,
    Monitor,
    Policy,
    Run,
    When,
    at,
    disable,
    grow,
    read_log,
    weigh,
)
from deltaops.strategy.controller import handle_on
from deltaops.strategy.saved import FILE, ahead_of, state_of, tidy
from deltaops.surgery import resize
from deltaops.testing.architectures import build

from .conftest import Watcher

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
pytest.importorskip("accelerate")

STEPS = 5


def examples(count: int) -> list[dict[str, list[int]]]:
    rows = [[(3 + start + i) % 50 for i in range(7)] for start in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder: Path, controller: Controller, delta: Any = None, **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    model: Any = build("gpt2", head="LMHeadModel")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so small a random head hardly moves the loss
    deltaops.attach(
        model,
        LoRA(r=2, alpha=16, dropout=0.1) + BitFit() if delta is None else delta,
        generator=torch.Generator().manual_seed(1),
    )
    defaults: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "use_cpu": True, "seed": 3,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **defaults | settings)
    return Trainer(
        model=model, args=arguments, train_dataset=examples(16), eval_dataset=examples(4),
        callbacks=[controller.callback()],
    )  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {"max_grad_norm": 0.01},
        {"gradient_accumulation_steps": 3, "max_grad_norm": 0.0},
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    ],
    ids=["clipped", "accumulated", "checkpointed"],
)
def test_losses_and_gradients_are_those_of_the_trainer(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    monitor = Monitor(every=1)
    run = trainer(tmp_path, Controller([monitor]), **settings)
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    by_step = {row.step: row.value for row in monitor.table() if row.quantity == "loss"}
    assert [by_step[entry["step"]] for entry in logs] == pytest.approx(
        [entry["loss"] for entry in logs], rel=1e-5
    )
    norms = {r.step: r.value for r in monitor.table() if r[1:4] == ("gradient_norm", "", "")}
    assert [norms[entry["step"]] for entry in logs] == pytest.approx(
        [entry["grad_norm"] for entry in logs], rel=1e-4
    )
    assert len(logs) == STEPS


def parts() -> list[Any]:
    # more of a loss counts as better, so that a model that learns has been harmed
    undone = When(at(3), weigh("lora", 0.5), watch=1, greater=True)
    return [
        Monitor(2),
        Policy(When(at(1), grow("lora", places=["transformer.h.0.attn.c_attn"])), name="growth"),
        Policy(undone, When(at(5), disable("bitfit"))),
    ]


def test_a_run_goes_on_from_each_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    saving = {
        "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2,
    }  # fmt: skip
    log = tmp_path / "log.jsonl"
    straight = trainer(tmp_path / "out", Controller(parts(), log=log), **saving)
    straight.train()
    wanted, text = copy.deepcopy(straight.model.state_dict()), log.read_bytes()
    assert [line["kind"] for line in read_log(log)] == [
        "start", "grow", "weigh", "roll back", "disable",
    ]  # fmt: skip
    for step in (1, 3):
        again = trainer(tmp_path / "out", Controller(parts(), log=log), **saving)
        at_step = tmp_path / "out" / f"checkpoint-{step}" / "controller.safetensors"
        Controller.reshape(handle_on(again.model), at_step)
        again.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        found = again.model.state_dict()
        assert all(torch.equal(value, found[key]) for key, value in wanted.items()), step
        assert log.read_bytes() == text
    state = tmp_path / "out" / "checkpoint-5" / "controller.safetensors"
    broken = trainer(tmp_path / "out", Controller(parts(), log=log), **saving)
    Controller.reshape(handle_on(broken.model), state)
    state.unlink()
    with pytest.raises(CheckpointError, match="decisions before step 5 are not known"):
        broken.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))


class TakeOut:
    """Off one place, as budgets do."""

    place = "transformer.h.0.mlp.c_fc"

    def names(self) -> tuple[str, ...]:
        return ("lora",)

    def __call__(self, run: Run, reason: str) -> list[Action]:
        resize(run.handle, {self.place: 0}, part="lora", optimizer=run.optimizer)
        return [Action("take out", "lora", reason, self.place)]


def test_the_best_checkpoint_comes_back_with_places_ranks_and_switches(tmp_path: Path) -> None:
    """A bias that is off at the end has left its place to the base's, which stays as it is."""
    grown = grow("lora", places=["transformer.h.0.attn.c_attn"])
    controller = Controller([Policy(When(at(2), [grown, TakeOut(), disable("bitfit")]))])
    run = trainer(
        tmp_path, controller, max_steps=2, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="loss",
    )  # fmt: skip
    handle = handle_on(run.model)
    with handle.disabled():
        base = {key: value.clone() for key, value in run.model.state_dict().items()}
    run.train()
    assert run.state.best_global_step == 1
    assert [event["kind"] for event in handle.history] == [
        "grow", "take out", "disable", "roll back",
    ]  # fmt: skip
    assert handle.enabled == ("lora", "bitfit")
    wanted = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    found = run.model.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())
    with handle.disabled():
        after = run.model.state_dict()
    assert all(torch.equal(v, after[key]) for key, v in base.items() if "lora_" not in key)


def test_gradients_scaled_by_mixed_precision_are_told_whole() -> None:
    """The loss's scale is in them when they are seen, and is out when they are clipped."""
    callback: Any = Controller([Monitor()]).callback()
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 1024.0)
    callback._see_gradient(parameter)
    parameter.grad.div_(1024.0).mul_(0.25)
    assert callback._clipped(1024.0) == 0.25


def test_a_part_that_raises_does_not_lose_the_run(tmp_path: Path) -> None:
    """Nor does a loss that no model returns."""

    def fail(run: Run) -> list[Action]:
        raise ArithmeticError("always")

    controller = Controller([Monitor(1), Watcher(fail)])
    run = trainer(tmp_path, controller, label_smoothing_factor=0.1, max_steps=2)
    run.train()
    assert run.state.global_step == 2
    assert controller.failed.keys() == {"watcher"}
    assert "off: ArithmeticError: always (step 1, after_step)" in controller.report()
    assert "note: the model returns no loss" in controller.report()


def test_a_trainer_without_a_delta_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, Controller([Monitor()]))
    handle_on(run.model).revert()
    with pytest.raises(AttachError, match="no delta is attached to the GPT2LMHeadModel"):
        run.train()


class Killed(BaseException):
    """What nothing catches; the files are as a signal would have left them."""


def test_a_run_that_is_killed_while_a_checkpoint_is_written_goes_on(tmp_path: Path) -> None:
    """When that of step 4 is whole, and that of step 2 is deleted already."""
    saving = {
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1,
        "save_total_limit": 1,
    }  # fmt: skip
    log, out = tmp_path / "log.jsonl", tmp_path / "out"
    straight = trainer(tmp_path / "straight", Controller(parts(), log=tmp_path / "one"), **saving)
    straight.train()
    killed = trainer(out, Controller(parts(), log=log), **saving)
    written = killed._save_checkpoint

    def save(*args: Any, **kwargs: Any) -> None:
        written(*args, **kwargs)
        if killed.state.global_step == 4:
            raise Killed

    killed._save_checkpoint = save
    with pytest.raises(Killed):
        killed.train()
    last = out / "checkpoint-4"
    assert [p.name for p in out.glob("checkpoint-*") if p.is_dir()] == [last.name]
    assert not (last / FILE).exists()
    again = trainer(out, Controller(parts(), log=log), **saving)
    Controller.reshape(handle_on(again.model), last / FILE)
    again.train(resume_from_checkpoint=str(last))
    assert not list(out.glob(f"*-{FILE}"))  # its checkpoint is deleted
    assert log.read_bytes() == (tmp_path / "one").read_bytes()
    wanted = straight.model.state_dict()
    assert all(torch.equal(wanted[key], now) for key, now in again.model.state_dict().items())


@pytest.mark.parametrize(
    "saving",
    [
        {"save_strategy": "epoch"},
        # a loss that falls is the best but once
        {
            "save_strategy": "best", "metric_for_best_model": "loss", "greater_is_better": True,
            "eval_strategy": "steps", "eval_steps": 1,
        },
    ],
    ids=["epoch", "best"],
)  # fmt: skip
def test_the_state_is_there_before_a_checkpoint_whatever_asks_for_it(
    saving: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"max_steps": 2, "per_device_train_batch_size": 8, **saving}
    run = trainer(tmp_path, Controller([Monitor()]), **settings)
    written, there = run._save_checkpoint, list[bool]()

    def save(*args: Any, **kwargs: Any) -> None:
        there.append(ahead_of(tmp_path / f"checkpoint-{run.state.global_step}").is_file())
        written(*args, **kwargs)

    run._save_checkpoint = save
    run.train()
    assert there == [True]
    assert not list(tmp_path.glob(f"*-{FILE}"))


def test_of_two_states_a_checkpoint_has_that_of_the_run_that_wrote_it(tmp_path: Path) -> None:
    """One that exists, and that a run from an older one is about to write again."""
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    inside, last, ahead = checkpoint / FILE, checkpoint / "trainer_state.json", ahead_of(checkpoint)
    assert state_of(checkpoint) == inside
    for second, file in enumerate((last, inside, ahead)):
        file.touch()
        os.utime(file, (second, second))
    assert state_of(checkpoint) == inside
    os.utime(last, (3, 3))
    assert state_of(checkpoint) == ahead
    tidy(tmp_path)
    shutil.rmtree(checkpoint)
    tidy(tmp_path, but=checkpoint)
    assert ahead.is_file()
    tidy(tmp_path)
    assert not ahead.exists()
