"""What a monitor measures, against the same by hand, and where it keeps it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from deltaops import BitFit, LoRA
from deltaops.errors import CheckpointError, ConfigError
from deltaops.strategy import Controller, Monitor, Table, read_rows
from deltaops.strategy.effective_rank import effective_rank, effective_ranks
from deltaops.strategy.monitor import CLOCKS
from deltaops.strategy.noise import Noise

from .conftest import Loop, loss_of, validation


def test_losses_norms_and_metrics_are_what_they_are(tmp_path: Path) -> None:
    monitor = Monitor(3, path=tmp_path / "monitor.csv")
    controller = Controller([monitor], evaluate=validation, evaluate_every=4)
    loop = Loop(controller).begin().train(2)
    loss = loss_of(loop.handle.model, 2)
    loss.backward()
    norms: dict[str, float] = {}
    for key, parameter in loop.handle.named_parameters():
        assert parameter.grad is not None
        square = float(parameter.grad.double().square().sum())
        part, place = key.split("/")[0], key.split("/")[1].split(".")[0]
        for name in (f"{part} {place}", f"{part} ", " "):
            norms[name] = norms.get(name, 0.0) + square
    loop.handle.model.zero_grad()
    loop.train(5)
    rows = monitor.table()
    assert sorted({row.step for row in rows}) == [1, 3, 4]
    (seen,) = (row.value for row in rows if row.quantity == "loss" and row.step == 3)
    assert seen == float(loss.detach())
    found = {
        f"{r.delta} {r.place}": r.value for r in rows if (r.step, r[1]) == (3, "gradient_norm")
    }
    assert found.keys() == norms.keys()
    for name, square in norms.items():
        assert found[name] == pytest.approx(math.sqrt(square), rel=1e-5)
    assert [r.step for r in rows if r.quantity == "eval_loss"] == [4]
    assert "eval_runtime" not in {row.quantity for row in rows}
    kept = read_rows(tmp_path / "monitor.csv")
    assert sorted(row for row in kept if row.quantity not in CLOCKS) == sorted(rows)
    clocks = [row for row in kept if row.quantity in CLOCKS]
    assert {row.quantity for row in clocks} == set(CLOCKS)
    assert all(row.value > 0 for row in clocks)


def test_gradients_that_were_clipped_are_told_whole() -> None:
    monitors = []
    for clipped in (1.0, 0.25):
        monitor = Monitor(1)
        loop = Loop(Controller([monitor])).begin()
        for step in range(3):
            loss = loss_of(loop.handle.model, step)
            loss.backward()
            for parameter in loop.handle.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(clipped)  # a power of two, which AdamW does not feel
            loop.controller.after_backward(loss, clipped=clipped)
            for parameter in loop.handle.parameters():
                assert parameter.grad is not None
                parameter.grad.div_(clipped)
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            loop.controller.after_step()
        monitors.append(monitor)
    assert monitors[0].table() == monitors[1].table()


def test_the_noise_scale_is_that_of_known_gradients() -> None:
    """g = G + ξ with |G|² = 4 and tr Σ = 8 is noisy by 2 batches."""
    random = torch.Generator().manual_seed(0)
    mean = torch.zeros(400)
    mean[0] = 2.0
    noise, seen = Noise(), []
    for _ in range(400):
        gradient = mean + torch.randn(400, generator=random) * math.sqrt(8 / 400)
        now = {("lora", "one", "a"): gradient[:200], ("lora", "two", "a"): gradient[200:]}
        found = noise.measure(now, 1.0)
        noise.keep(now, 1.0)
        if found:
            assert found["", ""] == found["lora", ""]
            seen.append(found)
    late = seen[100:]
    mean_of = [sum(found[key] for found in late) / len(late) for key in (("", ""), ("lora", "one"))]
    assert mean_of[0] == pytest.approx(2.0, rel=0.1)
    assert mean_of[1] == pytest.approx(1.0, rel=0.1)
    # the second place has no mean: what is there is nothing but noise, and often has no number
    assert sum(("lora", "two") not in found for found in late) > len(late) / 4


def test_a_gradient_that_is_not_finite_has_no_row_and_spoils_none() -> None:
    """As in a step that mixed precision skips."""
    monitor = Monitor(1)
    loop = Loop(Controller([monitor])).begin().train(3)
    loss = loss_of(loop.handle.model, 3)
    loss.backward()
    key, parameter = next(iter(loop.handle.named_parameters()))
    assert key.startswith("lora/one")
    assert parameter.grad is not None
    parameter.grad[0] = math.inf
    loop.controller.after_backward(loss)
    loop.optimizer.zero_grad()
    loop.controller.after_step()
    loop.step += 1
    loop.controller.state_dict()
    assert loop.controller.failed == {}
    loop.train(6)
    found = {(r.step, r.quantity) for r in monitor.table() if (r.delta, r.place) == ("lora", "one")}
    norms = {step for step, quantity in found if quantity == "gradient_norm"}
    noise = {step for step, quantity in found if quantity == "gradient_noise"}
    assert norms == {1, 2, 3, 5, 6}
    assert noise.isdisjoint({4, 5})
    assert all(math.isfinite(row.value) for row in monitor.table())


def test_effective_rank_is_that_of_the_singular_values() -> None:
    loop = Loop(Controller([Monitor()])).begin().train(6)
    found = effective_ranks(loop.handle)
    values = []
    for place in ("one", "two"):
        held = dict(loop.handle.named_parameters())
        a, b = (held[f"lora/{place}.lora_{x}.weight"].detach().double() for x in "AB")
        sigma = torch.linalg.svdvals(b @ a)[:3]
        p = sigma / sigma.sum()
        values.append(float(torch.exp(-(p * p.log()).sum())))
        assert found["lora", place] == pytest.approx(values[-1], rel=1e-6)
    assert found["lora", ""] == pytest.approx(sum(values) / 2)
    assert ("bitfit", "") not in found


def test_effective_rank_of_known_updates() -> None:
    def rank(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(effective_rank(a @ a.T, b.T @ b))

    eye = torch.eye(4, 9, dtype=torch.float64)
    assert rank(eye, eye.T) == pytest.approx(4.0)
    one = torch.outer(torch.arange(1.0, 5), torch.ones(9)).double()
    assert rank(one, eye.T) == pytest.approx(1.0, abs=1e-6)
    assert rank(eye, 0 * eye.T) == 0.0
    assert rank(eye * math.nan, eye.T) == 0.0


def test_an_update_of_zero_has_no_row() -> None:
    monitor = Monitor(1)
    loop = Loop(Controller([monitor])).begin()
    loop.controller.after_step()
    assert "effective_rank" not in {row.quantity for row in monitor.table()}


def test_less_can_be_watched() -> None:
    monitor = Monitor(1, places=False, noise=False, rank=False)
    Loop(Controller([monitor])).begin().train(3)
    assert {row.quantity for row in monitor.table()} == {"loss", "gradient_norm"}
    assert {row.place for row in monitor.table()} == {""}


def test_a_single_delta_and_what_is_trained_whole_have_names() -> None:
    monitor = Monitor(1)
    delta = LoRA(r=2, target_modules=["one"], modules_to_save=["two"])
    Loop(Controller([monitor]), delta).begin().train(1)
    found = {(r.delta, r.place) for r in monitor.table() if r.quantity == "gradient_norm"}
    assert found == {
        ("", ""), ("default", ""), ("default", "one"), ("modules_to_save", ""),
        ("modules_to_save", "two"),
    }  # fmt: skip


def test_pictures_are_drawn(tmp_path: Path) -> None:
    monitor = Monitor(1)
    with pytest.raises(ConfigError, match="table is empty"):
        monitor.draw(tmp_path)
    controller = Controller([monitor], evaluate=validation, evaluate_every=2)
    Loop(controller, LoRA(r=2, target_modules=["one", "two"]) + BitFit()).begin().train(4)
    files = monitor.draw(tmp_path)
    assert [file.name for file in files] == ["monitor.png", "places.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_a_file_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "monitor.csv"
    Loop(Controller([Monitor(1, path=path)]), lr=0.1).begin().train(2)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="table of another run"):
        Loop(Controller([Monitor(path=path)])).begin()
    assert path.read_bytes() == before
    saved = Loop(Controller([Monitor()])).begin().train(3).saved()
    with pytest.raises(CheckpointError, match="table of another run"):
        Loop(Controller([Monitor(path=path)])).resume(saved)
    assert path.read_bytes() == before
    path.write_text("what,else\n1,2\n")
    with pytest.raises(CheckpointError, match="its columns are what, else"):
        read_rows(path)
    with pytest.raises(ConfigError, match="every must be 1 or more"):
        Monitor(0)


def test_a_full_disk_loses_no_rows(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "monitor.csv"
    controller = Controller([Monitor(1, path=path)])
    loop = Loop(controller, lr=0.1).begin().train(2)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    try:
        loop.train(4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before, "no half a line"
    told = [event for event in loop.handle.history if event["part"] == "monitor"]
    assert ["cannot be written: File too large" in event["reason"] for event in told] == [True]
    loop.train(5)
    assert not controller.failed
    losses = [row.step for row in read_rows(path) if row.quantity == "loss"]
    assert losses == [1, 2, 3, 4, 5]


def test_a_table_comes_back_from_its_tensors() -> None:
    table, other = Table(), Table()
    for step, value in ((1, 0.1), (2, math.inf), (2, 1e-300)):
        table.add(step, "loss", value)
        table.add(step, "gradient_norm", -value, delta="lora", place="a.b")
    other.add(9, "loss", 9.0)
    other.restore(table.state(), table.tensors())
    assert list(other.rows()) == list(table.rows())
    assert len(other) == 6
