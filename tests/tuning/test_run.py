"""A tuning run: what it leaves, that it resumes with the same bits, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from deltaops.errors import CheckpointError, ConfigError, DataError
from deltaops.tuning.run import Outcome, Settings, run
from deltaops.tuning.state import FILE


def settings(base: Path, data: Path, **changes: object) -> Settings:
    values: dict[str, object] = {
        "steps": 6, "batch_size": 4, "seq_len": 16,
        "delta": "lora:r=4,alpha=8,dropout=0.1,lr_ratio=2",
    }  # fmt: skip
    return Settings(str(base), str(data), **{**values, **changes})


def interrupted(wanted: Settings, out: Path, after: int) -> Outcome:
    done: list[object] = []
    return run(wanted, out, on_step=done.append, should_stop=lambda: len(done) >= after)


def test_a_run_leaves_adapter_metrics_and_curve(base: Path, text: Path, tmp_path: Path) -> None:
    outcome = run(settings(base, text, lr=0.02, steps=12), tmp_path / "out")
    assert outcome.finished
    assert outcome.before is not None
    assert outcome.after is not None
    assert outcome.after["loss"] < outcome.before["loss"]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["held_out_after"] == outcome.after
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 4)


def test_resuming_gives_the_same_bits(base: Path, text: Path, tmp_path: Path) -> None:
    wanted = settings(base, text)
    run(wanted, tmp_path / "straight")
    stopped = interrupted(wanted, tmp_path / "resumed", after=3)
    assert (stopped.finished, stopped.step) == (False, 3)
    outcome = run(wanted, tmp_path / "resumed", resume=True)
    assert outcome.finished
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("straight", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [p.loss for p in outcome.history][:3] == [p.loss for p in stopped.history]


@pytest.mark.parametrize(
    "delta", ["lora:r=2,dropout=0.1+bitfit:create_missing=true", "compacter:size=4"]
)
def test_a_method_with_a_manifest_resumes_alike(
    base: Path, text: Path, tmp_path: Path, delta: str
) -> None:
    wanted = settings(base, text, delta=delta, lr=0.01)
    outcome = run(wanted, tmp_path / "straight")
    assert outcome.before is not None
    assert outcome.after is not None
    assert outcome.after["loss"] < outcome.before["loss"]
    interrupted(wanted, tmp_path / "resumed", after=3)
    run(wanted, tmp_path / "resumed", resume=True)
    files = [tmp_path / name / "deltaops.safetensors" for name in ("straight", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_every_method_is_tuned_by_its_name(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    import deltaops
    from deltaops.methods import METHODS

    monkeypatch.setattr("deltaops.tuning.run.draw_curve", lambda *given: None)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    for kind, method in METHODS.items():
        wanted = settings(base, text, delta=kind, lr=0.01, steps=1, eval_fraction=0)
        assert run(wanted, tmp_path / kind).finished, kind
        handle = deltaops.load(model, tmp_path / kind)
        assert type(handle.delta) is method
        handle.revert()


def test_a_stopped_run_is_loadable(base: Path, text: Path, tmp_path: Path) -> None:
    import transformers

    import deltaops

    interrupted(settings(base, text), tmp_path / "out", after=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    handle = deltaops.load(model, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(saved) == 2 * len(handle.sites)


def test_classification_trains_and_saves_the_head(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "intents.csv"
    with data.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "category"])
        writer.writerows([f"please {w} it {i}", w] for i in range(20) for w in ("open", "shut"))
    wanted = settings(base, data, task="classification", label_column="category")
    outcome = run(wanted, tmp_path / "out")
    assert outcome.after is not None
    assert 0 <= outcome.after["accuracy"] <= 1
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == ["open", "shut"]
    assert any("score" in k for k in load_file(tmp_path / "out" / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ConfigError, "--task must be one of", {"task": "poetry"}),
        (ConfigError, "--steps must be 1", {"steps": 0}),
        (ConfigError, "no method 'lorra'", {"delta": "lorra:r=2"}),
        (ConfigError, "no option 'rank'", {"delta": "lora:rank=2"}),
        (ConfigError, "cannot be loaded", {"model": "/nowhere"}),
        (DataError, "no such file", {"data": "/nowhere.jsonl"}),
        (DataError, "at least one block", {"seq_len": 10_000_000}),
    ],
)
def test_bad_settings_are_refused_and_leave_nothing(
    base: Path,
    text: Path,
    tmp_path: Path,
    error: type[Exception],
    message: str,
    changes: dict[str, object],
) -> None:
    merged = {"model": str(base), "data": str(text), **changes}
    merged.setdefault("steps", 2)
    with pytest.raises(error, match=message):
        run(Settings(**merged), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_lines_are_named(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"text": "fine"}\n{"text": \n{"txet": "x"}\n')
    with pytest.raises(DataError, match=r"line 2[\s\S]*line 3"):
        run(settings(base, data), tmp_path / "out")


def test_another_out_is_not_overwritten(base: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        run(settings(base, text), tmp_path / "out")
    with pytest.raises(CheckpointError, match="no run to resume"):
        run(settings(base, text), tmp_path / "out", resume=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_resuming_with_other_settings_is_refused(base: Path, text: Path, tmp_path: Path) -> None:
    interrupted(settings(base, text), tmp_path / "out", after=1)
    with pytest.raises(ConfigError, match="lr="):
        run(settings(base, text, lr=0.5), tmp_path / "out", resume=True)
    text.write_text(text.read_text() + "more " * 200)
    with pytest.raises(CheckpointError, match="data is not what"):
        run(settings(base, text), tmp_path / "out", resume=True)


def test_a_truncated_state_is_refused(base: Path, text: Path, tmp_path: Path) -> None:
    interrupted(settings(base, text), tmp_path / "out", after=1)
    state = tmp_path / "out" / FILE
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(settings(base, text), tmp_path / "out", resume=True)


def test_a_model_without_its_own_tokenizer_is_refused_and_leaves_nothing(
    base: Path, encoder: Path, text: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(base, folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="its tokenizer cannot be loaded"):
        run(settings(folder, text), out)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"its tokenizer (has \d+ entries|cannot be loaded)"):
        run(settings(folder, text), out)
    for file in encoder.glob("tokenizer*"):
        shutil.copy(file, folder)
    said = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"unk_token": "[UNK]"}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(ConfigError, match="knows next to nothing of the texts"):
        run(settings(folder, text), out)
    shutil.copy(base / "tokenizer.json", folder)
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 20}))
    with pytest.raises(ConfigError, match="the model knows those below 20"):
        run(settings(folder, text), out)
    assert not out.exists()
