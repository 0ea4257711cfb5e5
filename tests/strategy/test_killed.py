"""A process that is killed while it trains; another one goes on from what it left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = """
import os, signal, sys
from pathlib import Path
import torch
import deltaops
from deltaops import BitFit, LoRA
from deltaops.strategy import Controller, Monitor, Policy, When, at, disable, weigh
from safetensors.torch import load_file, save_file

out, kill, steps = Path(sys.argv[1]), int(sys.argv[2]), 8
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.ReLU(), torch.nn.Linear(10, 3))
handle = deltaops.attach(model, LoRA(r=2, target_modules=["0", "2"]) + BitFit())
optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)

def loss_of(step):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
    return (model(x) - x[:, :3].cos()).square().mean()

parts = [Monitor(2, path=out / "monitor.csv"),
         Policy(When(at(4), weigh("lora", -20.0), watch=2), When(at(7), disable("bitfit")))]
controller = Controller(parts, log=out / "log.jsonl",
                        evaluate=lambda model: {"loss": float(loss_of(99))}, evaluate_every=1)
states = sorted(out.glob("state-*"))
start = 0
if states:
    start = int(states[-1].name[6])
    controller.begin(handle, optimizer, resume=states[-1])
    saved = load_file(out / f"parameters-{start}")
    with torch.no_grad():
        for key, parameter in handle.named_parameters():
            parameter.copy_(saved[key])
else:
    controller.begin(handle, optimizer)
for step in range(start, steps):
    loss = loss_of(step)
    loss.backward()
    controller.after_backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    controller.after_step()
    if step == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    if step % 2:
        parameters = {k: p.detach().clone() for k, p in handle.named_parameters()}
        save_file(parameters, out / f"parameters-{step + 1}")
        controller.save(out / f"state-{step + 1}")
save_file({k: p.detach().clone() for k, p in handle.named_parameters()}, out / "end")
"""


def start(out: Path, kill: int = -1) -> subprocess.Popen[str]:
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-P", "-W", "error", "-c", PROGRAM, str(out), str(kill)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> None:
    _, told = process.communicate(timeout=120)
    assert process.returncode == code, told


def test_a_killed_process_leaves_what_another_goes_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after step 5, whose roll back the log has, and of which no state was saved."""
    killed = start(tmp_path / "killed", kill=4)
    (tmp_path / "straight").mkdir()
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / "straight"), "-1"])
    exec(PROGRAM, {})  # here, which spares the start of a process
    finish(killed, -9)
    lines = (tmp_path / "straight" / "log.jsonl").read_text().splitlines()
    assert [line.split('"kind": "')[1].split('"')[0] for line in lines] == [
        "start", "weigh", "roll back", "disable",
    ]  # fmt: skip
    cut_off = tmp_path / "killed" / "log.jsonl"
    cut_off.write_text(cut_off.read_text() + '{"step": 5, "mom')
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / "killed"), "-1"])
    exec(PROGRAM, {})
    for name in ("log.jsonl", "state-8", "end"):
        one, other = ((tmp_path / run / name).read_bytes() for run in ("straight", "killed"))
        assert one == other, name
    ends = [load_file(tmp_path / run / "end") for run in ("straight", "killed")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
