"""A task of which it is known where the change has to be: layers side by side, and two to learn."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import deltaops
from deltaops import LoRA
from deltaops.strategy.parts import Action, Part, Run
from deltaops.surgery import Handle

LAYERS, K, N = 6, 16, 12
PLANTED = ("layers.1", "layers.4")
"""Of ranks 3 and 1."""


class Beside(nn.Module):
    """``x [M, LAYERS, K]`` → the sum of ``Wᵢ xᵢ`` ``[M, N]``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(K, N, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        return sum((layer(x[:, i]) for i, layer in enumerate(self.layers)), torch.zeros(()))


def model() -> Beside:
    """The same bits every time."""
    torch.manual_seed(0)
    return Beside()


def batches(count: int, seed: int = 3) -> list[dict[str, Tensor]]:
    """Inputs, and what the model says of them once the planted layers have changed."""
    random = torch.Generator().manual_seed(seed)
    changed = model()
    plant = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for path, rank in zip(PLANTED, (3, 1), strict=True):
            up, down = torch.randn(N, rank, generator=plant), torch.randn(rank, K, generator=plant)
            changed.get_submodule(path).weight.add_(up @ down * 0.3)
        found = []
        for _ in range(count):
            x = torch.randn(64, LAYERS, K, generator=random)
            found.append({"x": x, "y": changed(x)})
    return found


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])


def attached(rank: int = 4, **settings: Any) -> Handle:
    random = torch.Generator().manual_seed(1)
    return deltaops.attach(model(), LoRA(r=rank, alpha=rank, **settings), generator=random)


def count(handle: Handle) -> int:
    return sum(p.numel() for p in handle.parameters())


def start(handle: Handle, steps: int) -> Run:
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    return Run(handle.model, handle, optimizer, torch.Generator().manual_seed(5), 0, steps)


def train(run: Run, part: Part, until: int) -> list[tuple[int, Action]]:
    """Steps of a plain loop, as a controller takes them; the step and the action of each."""
    data = batches(8)
    told = []
    if run.step == 0:
        told += [(0, action) for action in part.begin(run)]
    while run.step < until:
        run.optimizer.zero_grad()
        value = loss(run.model, data[run.step % len(data)])
        value.backward()
        run.loss = value.item()
        told += [(run.step, action) for action in part.after_backward(run)]
        run.optimizer.step()
        run.step += 1
        told += [(run.step, action) for action in part.after_step(run)]
    return told


def resumed(run: Run, part: Part, fresh: Part, folder: Any) -> Run:
    """The run in a new process, as far as files can say: the model, the optimizer, the part."""
    run.handle.save(folder, format="deltaops")
    handle = deltaops.load(model(), folder)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    optimizer.load_state_dict(in_order(run, handle))
    generator = torch.Generator()
    generator.set_state(run.generator.get_state())
    fresh.restore(part.state(), {key: t.clone() for key, t in part.tensors().items()})
    return Run(handle.model, handle, optimizer, generator, run.step, run.steps)


def in_order(run: Run, handle: Handle) -> dict[str, Any]:
    """The optimizer's state with the parameters numbered as ``handle`` names them."""
    saved = copy.deepcopy(run.optimizer.state_dict())
    numbers = {id(p): i for i, p in enumerate(run.optimizer.param_groups[0]["params"])}
    state = [saved["state"][numbers[id(p)]] for p in run.handle.parameters()]
    group = saved["param_groups"][0] | {"params": list(range(len(state)))}
    return {"state": dict(enumerate(state)), "param_groups": [group]}
