"""A run that takes milliseconds: a small network, data by the step, and a plain loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops import BitFit, LoRA
from deltaops.strategy import Action, Controller, Part, Run
from deltaops.surgery import Handle

STEPS = 12


class Net(nn.Module):
    """Two linear layers, and a norm, whose trained bias leaves the model while it is off."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.two = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.two(torch.relu(self.norm(self.one(x))))
        return found


def attached(delta: Any = None) -> Handle:
    """The same bits every time."""
    torch.manual_seed(5)
    wanted = (
        LoRA(r=3, alpha=6, target_modules=["one", "two"]) + BitFit() if delta is None else delta
    )
    return deltaops.attach(Net(), wanted, generator=torch.Generator().manual_seed(7))


def loss_of(model: nn.Module, step: int) -> Tensor:
    random = torch.Generator().manual_seed(100 + step)
    x = torch.randn(16, 6, generator=random)
    return (model(x) - x[:, :3].cos()).square().mean()


def validation(model: nn.Module) -> dict[str, float]:
    return {"loss": float(loss_of(model, -1)), "runtime": 1.0}


class Loop:
    """A run by hand, which can be stopped and saved after any step."""

    def __init__(self, controller: Controller, delta: Any = None, lr: float = 0.05) -> None:
        self.controller = controller
        self.handle = attached(delta)
        groups = self.handle.parameter_groups(lr)
        self.optimizer: Any = torch.optim.AdamW(groups, weight_decay=0.0)
        self.step = 0

    def begin(self) -> Loop:
        self.controller.begin(self.handle, self.optimizer, steps=STEPS)
        return self

    def train(self, until: int = STEPS) -> Loop:
        while self.step < until:
            loss = loss_of(self.handle.model, self.step)
            loss.backward()
            self.controller.after_backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.controller.after_step()
            self.step += 1
        return self

    def saved(self) -> dict[str, Any]:
        parameters = {k: p.detach().clone() for k, p in self.handle.named_parameters()}
        return {
            "controller": self.controller.state_dict(),
            "parameters": parameters,
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "step": self.step,
        }

    def resume(self, saved: dict[str, Any]) -> Loop:
        self.controller.begin(self.handle, self.optimizer, steps=STEPS, resume=saved["controller"])
        self.optimizer.load_state_dict(saved["optimizer"])
        with torch.no_grad():
            for key, parameter in self.handle.named_parameters():
                parameter.copy_(saved["parameters"][key])
        self.step = saved["step"]
        return self


def bits(handle: Handle, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a roll back gives back."""
    found: dict[str, Any] = {"enabled": handle.enabled, "weights": handle.weights}
    for key, parameter in handle.named_parameters():
        found[key] = parameter.detach().clone()
        found[f"{key} trains"] = parameter.requires_grad
        for name, value in optimizer.state[parameter].items():
            found[f"{key} {name}"] = value.clone()
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(v, other[k]) if isinstance(v, Tensor) else v == other[k] for k, v in one.items()
    )


class Watcher:
    """A part that does what a test tells it to, when the optimizer has stepped."""

    def __init__(
        self, do: Callable[[Run], Sequence[Action]], name: str = "watcher", announces: bool = False
    ) -> None:
        self.do, self.name, self.announces = do, name, announces

    def begin(self, run: Run) -> Sequence[Action]:
        return ()

    def after_backward(self, run: Run) -> Sequence[Action]:
        return ()

    def after_step(self, run: Run) -> Sequence[Action]:
        return self.do(run)

    def after_evaluation(self, run: Run) -> Sequence[Action]:
        return ()

    def state(self) -> dict[str, Any]:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: Any, tensors: Any) -> None:
        return None


@pytest.fixture(autouse=True)
def small(one_thread: None) -> None:
    """Nothing here is large enough for two threads."""


@pytest.fixture
def steered(tmp_path: Path) -> Callable[..., Controller]:
    """A controller with a log and a validation every two steps."""

    def make(*parts: Part, log: str = "log.jsonl") -> Controller:
        return Controller(parts, seed=3, log=tmp_path / log, evaluate=validation, evaluate_every=2)

    return make
