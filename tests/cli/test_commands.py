"""The command as a person meets it: real processes, messages, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deltaops.cli import app
from deltaops.cli.quiet import quiet_transformers

COMMAND = [sys.executable, "-P", "-m", "deltaops.cli"]


def call(*arguments: object, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    if cache is not None:
        environment["DELTAOPS_CACHE"] = str(cache)
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=300,
    )


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "tune",
        "compare",
        "convert",
        "intrinsic fit",
        "intrinsic tune",
        "intrinsic split",
        "intrinsic recovery",
        "intrinsic report",
        "inspect",
        "doctor",
        "bench",
        "combine",
        "search",
        "suggest",
    ],
)
def test_help_has_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert f"deltaops {command}" in result.stdout


def test_doctor_finds_the_core() -> None:
    result = call("doctor", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["core"]["isa"] in {isa["name"] for isa in found["core"]["isas"]}
    assert found["backends"]["cpu"] == "ready"
    assert "native core" in call("doctor").stdout


def test_an_error_is_a_message_and_exit_code_2(tmp_path: Path) -> None:
    arguments = ["tune", "--model", "m", "--data", "/nowhere.csv", "--out", tmp_path / "o"]
    result = call(*arguments)
    assert result.returncode == 2
    assert "no such file" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in call("--debug", *arguments).stderr


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from deltaops.tuning import small_model

    quiet_transformers()
    folder = tmp_path_factory.mktemp("base") / "gpt2"
    small_model.build(folder, 1, lambda point: None)
    return folder


def test_ctrl_c_leaves_a_loadable_adapter_and_resume_finishes(base: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "notes.txt", tmp_path / "out"
    data.write_text("a quiet line of text, and another one.\n" * 400)
    arguments = [
        "tune", "--model", base, "--data", data, "--out", out, "--steps", 60, "--seq-len", 16,
        "--batch-size", 2, "--save-every", 1, "--eval-fraction", 0,
    ]  # fmt: skip
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (out / "adapter_config.json").exists():  # the first checkpoint: it is training
        assert process.poll() is None, process.stdout and process.stdout.read()
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert "--resume" in printed
    shown = call("inspect", out)
    assert "LORA" in shown.stdout
    finished = call(*arguments, "--resume")
    assert finished.returncode == 0, finished.stderr
    assert json.loads((out / "metrics.json").read_text())["steps"] == 60


def test_inspect_draws_a_model_and_where_a_delta_binds(base: Path) -> None:
    result = call("inspect", base)
    assert result.returncode == 0, result.stderr
    assert "GPT2LMHeadModel" in result.stdout
    assert "c_attn" in result.stdout


def test_inspect_takes_any_method_and_shows_its_file(base: Path, tmp_path: Path) -> None:
    import torch

    import deltaops

    drawn = call("inspect", base, "--delta", "adapter:style=pfeiffer,reduction_factor=8")
    assert drawn.returncode == 0, drawn.stderr
    assert "Adapter(style='pfeiffer', reduction_factor=8)" in drawn.stdout
    model = torch.nn.ModuleDict({"out": torch.nn.Linear(8, 8)})
    deltaops.attach(model, deltaops.BitFit(target_modules=["out"])).save(tmp_path)
    shown = call("inspect", tmp_path)
    assert "bitfit" in shown.stdout
    assert "1 tensors, 8 parameters" in shown.stdout


def test_intrinsic_prompts_from_files_to_what_is_recovered(base: Path, tmp_path: Path) -> None:
    files: list[object] = []
    for name, answers in (("a", "up down"), ("b", "in out"), ("c", "on off")):
        rows = [f"thing {i},{answers.split()[i % 2]}\n" for i in range(20)]
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(rows))
        files += ["--data", tmp_path / f"{name}.csv"]
    few = ["--steps", 2, "--seq-len", 12]
    decoder, out = tmp_path / "decoder", tmp_path / "out"
    sizes = ["--fit-steps", 2, "--num-virtual-tokens", 3, "--intrinsic-dim", 2]
    fitted = inside("intrinsic", "fit", "--model", base, *files[:4], "--out", decoder, *few, *sizes)
    assert fitted.exit_code == 0, fitted.output
    assert "decoded again" in fitted.stdout
    tuned = inside("intrinsic", "tune", "--decoder", decoder, *files, "--out", out, *few)
    assert tuned.exit_code == 0, tuned.output
    assert "not seen it" in tuned.stdout
    assert json.loads((out / "metrics.json").read_text())["decoder"] == str(decoder)


def test_ctrl_c_stops_intrinsic_tuning_between_two_steps(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltaops.tuning import intrinsic
    from deltaops.tuning.workshop import Stopped, Workshop

    def fit(workshop: Workshop, *_: object, **__: object) -> None:
        assert not workshop.should_stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert workshop.should_stop()
        raise Stopped

    monkeypatch.setattr(intrinsic, "fit", fit)
    data = tmp_path / "a.csv"
    data.write_text("text,label\n" + "x,yes\ny,no\n" * 5)
    before = signal.getsignal(signal.SIGINT)
    stopped = inside("intrinsic", "fit", "--model", base, "--data", data, "--out", tmp_path / "out")
    assert stopped.exit_code == 130
    assert "stopped; what was under way was not written" in stopped.stdout
    assert signal.getsignal(signal.SIGINT) is before


def inside(*arguments: object) -> Any:
    """The command in this process: what a person sees of it is told by other tests."""
    from typer.testing import CliRunner

    from deltaops.cli import app

    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


@pytest.mark.everything
def test_the_demo_runs_to_its_end(tmp_path: Path) -> None:
    arguments = ["demo", "--base-steps", 2, "--tune-steps", 2, "--rounds", 0]
    result = call(*arguments, cache=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "held-out loss" in result.stdout
    assert (tmp_path / "demo" / "adapter" / "adapter_model.safetensors").is_file()
    assert "kept from an earlier run" in call(*arguments, cache=tmp_path).stdout
