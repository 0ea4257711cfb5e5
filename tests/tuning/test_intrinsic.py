"""Both stages of intrinsic prompt tuning on a small model, and the score that they are told by."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaops
from deltaops import Prompt
from deltaops.errors import CheckpointError, ConfigError, DataError
from deltaops.methods.decoder import FACTS, Sizes, read_facts, read_tensors
from deltaops.surgery.files import MANIFEST
from deltaops.testing.architectures import build
from deltaops.tuning.answers import AnswerSet, score
from deltaops.tuning.autoencoder import AutoEncoder
from deltaops.tuning.intrinsic import fit, tune
from deltaops.tuning.recovered import Recovered, mean_relative, recovered_gain
from deltaops.tuning.wholes import WholePrompt
from deltaops.tuning.workshop import Settings, Stopped, Workshop

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = Settings(steps=3, batch_size=4, seq_len=12)
FIT: dict[str, Any] = {"intrinsic_dim": 2, "whole": WholePrompt(Prompt(3)), "fit_steps": 4}


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Three tasks of the same texts."""
    paths = []
    for name, answers in (("sound", "loud soft"), ("size", "big small"), ("age", "old new")):
        path = tmp_path / f"{name}.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([f"thing {i}", answers.split()[i % 2]] for i in range(20))
        paths.append(str(path))
    return paths


def test_a_decoder_is_fitted_and_tasks_are_tuned_by_it(
    base: Path, files: list[str], tmp_path: Path
) -> None:
    workshop = Workshop(str(base), SETTINGS)
    tasks = workshop.tasks(files)
    before = {k: v.clone() for k, v in workshop.model.state_dict().items()}
    rows = fit(workshop, tasks[:2], tmp_path / "decoder", model=str(base), **FIT)
    assert [name for name, _, _ in rows] == ["sound", "size"]
    facts = read_facts(tmp_path / "decoder")
    assert [task["full"] for task in facts["tasks"]] == [full for _, full, _ in rows]
    width = workshop.model.config.hidden_size
    shapes = {name: tuple(t.shape) for name, t in read_tensors(tmp_path / "decoder").items()}
    assert shapes == Sizes(2, 3, width, width).shapes()
    for name in ("sound", "size"):  # each full prompt is an adapter of PEFT's
        deltaops.load(workshop.model, tmp_path / "decoder" / "full" / name).revert()
    found = tune(workshop, tasks[1:], tmp_path / "decoder", tmp_path / "out", compare=True)
    assert [(row.task, row.seen) for row in found] == [("size", True), ("age", False)]
    assert found[0].full == rows[1][1]  # the file knew it
    assert found[1].full is not None
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [task["task"] for task in metrics["tasks"]] == ["size", "age"]
    assert metrics["relative"]["seen"] == found[0].relative
    after = workshop.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    handle = deltaops.load(workshop.model, tmp_path / "out" / "age")
    assert score(workshop.model, tasks[2].held, 4) == found[1].tuned
    assert sum(p.numel() for p in handle.parameters()) == 2


def test_the_same_seed_fits_the_same_decoder(base: Path, files: list[str], tmp_path: Path) -> None:
    for name in ("one", "two"):
        workshop = Workshop(str(base), SETTINGS)
        fit(workshop, workshop.tasks(files[:2]), tmp_path / name, model="base", **FIT)
    texts = [(tmp_path / name / FACTS).read_text() for name in ("one", "two")]
    assert texts[0] == texts[1]  # the hash of the tensors is in it


def test_both_stages_learn(base: Path, files: list[str], tmp_path: Path) -> None:
    losses: dict[str, list[float]] = {}
    settings = Settings(steps=25, batch_size=8, seq_len=12, lr=0.1)
    workshop = Workshop(
        str(base), settings, lambda what, step, loss: losses.setdefault(what, []).append(loss)
    )
    tasks = workshop.tasks(files)
    out = tmp_path / "decoder"
    fit(workshop, tasks[:2], out, model="base", **(FIT | {"fit_steps": 40}), fit_lr=1e-2)
    tune(workshop, tasks[2:], out, tmp_path / "out", compare=False)
    assert set(losses) == {"sound", "size", "decoder", "age"}
    for what, found in losses.items():
        tenth = max(1, len(found) // 10)
        assert sum(found[-tenth:]) < sum(found[:tenth]), what


def test_a_prompt_that_is_coded_comes_back() -> None:
    """Two prompts fit into two numbers, by their error alone."""
    torch.manual_seed(0)
    prompts = torch.randn(2, 3, 8) * 0.1
    coder = AutoEncoder(Sizes(2, 3, 8, 8))
    optimizer = torch.optim.Adam(coder.parameters(), lr=0.01)
    for _ in range(300):
        error = (
            (coder.decode(coder.encode(prompts.flatten(1))).view_as(prompts) - prompts)
            .square()
            .mean()
        )
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert error.item() < 1e-3 * float(prompts.square().mean())


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_score_is_what_the_model_writes_by_itself(name: str) -> None:
    apart = name == "t5"
    head = "ForConditionalGeneration" if apart else "LMHeadModel"
    model: Any = build(name, head=head)
    random = torch.Generator().manual_seed(2)
    texts = [torch.randint(3, 60, (n,), generator=random) for n in (3, 5, 4)]
    settings: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    if apart:
        settings["decoder_start_token_id"] = model.config.decoder_start_token_id = 0
    written = []
    for text in texts:
        made = model.generate(text[None], pad_token_id=0, **settings)[0]
        written.append(made[1:] if apart else made[len(text) :])
    words = [written[0], written[1], (written[2] + 1) % 60]
    data = AnswerSet(texts, torch.arange(3), 0, words, apart)
    found = score(model, data, 2)
    assert found["accuracy"] == pytest.approx(2 / 3)
    with torch.no_grad():
        # two tokens in each answer, so that batches of two and one weigh as they should
        losses = [float(model(**data.batch([row])).loss) for row in range(3)]
    assert found["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_what_is_recovered_is_a_mean_of_parts() -> None:
    def row(tuned: float, full: float | None) -> Recovered:
        scores = None if full is None else {"accuracy": full}
        return Recovered("task", "", True, {"accuracy": 0.4}, {"accuracy": tuned}, scores)

    assert row(0.6, 0.8).relative == pytest.approx(0.75)
    assert row(0.6, 0.0).relative is None
    assert mean_relative([row(0.6, 0.8), row(0.5, 0.5), row(0.1, None)]) == pytest.approx(0.875)
    assert mean_relative([row(0.1, None)]) is None
    assert recovered_gain([row(0.6, 0.8), row(0.5, 0.5), row(0.1, None)]) == pytest.approx(0.6)
    assert recovered_gain([row(0.6, 0.4)]) is None  # a full prompt gains nothing
    assert recovered_gain([row(0.1, None)]) is None


def test_a_stop_leaves_the_model_as_it_was_and_no_file(
    base: Path, files: list[str], tmp_path: Path
) -> None:
    seen: list[str] = []
    for last in ("sound", "decoder"):
        seen.clear()
        workshop = Workshop(
            str(base),
            SETTINGS,
            lambda what, *_: seen.append(what),
            lambda last=last: last in seen,  # type: ignore[misc]  # a default, to bind it now
        )
        with pytest.raises(Stopped):
            fit(workshop, workshop.tasks(files), tmp_path / "out", model="base", **FIT)
        assert deltaops.surgery.handle_of(workshop.model) is None
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.fixture(scope="module")
def fitted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of the tasks "one" and "two", whose files lie beside it."""
    folder = tmp_path_factory.mktemp("fitted")
    for name, answers in (("one", "loud soft"), ("two", "big small")):
        rows = [f"thing {i},{answers.split()[i % 2]}\n" for i in range(20)]
        (folder / f"{name}.csv").write_text("text,label\n" + "".join(rows))
    workshop = Workshop(str(base), SETTINGS)
    tasks = workshop.tasks([str(folder / "one.csv"), str(folder / "two.csv")])
    fit(workshop, tasks, folder / "decoder", model=str(base), **FIT)
    return folder


def test_a_tuning_that_was_stopped_goes_on(base: Path, fitted: Path, tmp_path: Path) -> None:
    out, decoder = tmp_path / "out", fitted / "decoder"
    names = [str(fitted / "one.csv"), str(fitted / "two.csv")]
    whole = Workshop(str(base), SETTINGS)
    expected = tune(whole, whole.tasks(names), decoder, tmp_path / "whole", compare=False)
    seen: list[str] = []
    workshop = Workshop(
        str(base), SETTINGS, lambda what, *_: seen.append(what), lambda: seen[-1:] == ["two"]
    )
    with pytest.raises(Stopped):
        tune(workshop, workshop.tasks(names), decoder, out, compare=False)
    assert [row["task"] for row in json.loads((out / "metrics.json").read_text())["tasks"]] == [
        "one"
    ]
    (out / ".deltaops-partial-x").mkdir()  # as a killed process leaves it
    (out / "two").mkdir(exist_ok=True)  # which holds nothing, so it is not done
    seen.clear()
    workshop.should_stop = lambda: False
    again = tune(workshop, workshop.tasks(names), decoder, out, compare=False)
    assert set(seen) == {"two"}
    assert again == expected
    assert not list(out.glob(".deltaops*"))
    other = Workshop(str(base), Settings(steps=2, batch_size=4, seq_len=12))
    with pytest.raises(ConfigError, match="begun with another settings"):
        tune(other, other.tasks(names), decoder, out, compare=False)
    (out / "one" / MANIFEST).unlink()
    seen.clear()
    tune(workshop, workshop.tasks(names), decoder, out, compare=False)
    assert set(seen) == {"one"}
    odd = json.loads((out / "metrics.json").read_text())
    odd["tasks"][0]["texts"] = ["a"]
    (out / "metrics.json").write_text(json.dumps(odd))
    with pytest.raises(ConfigError, match="is none of"):
        tune(workshop, workshop.tasks(names), decoder, out, compare=False)
    (out / "metrics.json").write_text("[]")
    with pytest.raises(ConfigError, match="is none of"):
        tune(workshop, workshop.tasks(names), decoder, out, compare=False)


def test_known_scores_are_those_of_the_same_data(base: Path, fitted: Path, tmp_path: Path) -> None:
    renamed, impostor = tmp_path / "renamed.csv", tmp_path / "one.csv"
    shutil.copy(fitted / "one.csv", renamed)
    impostor.write_text((fitted / "one.csv").read_text().replace("thing", "matter"))
    workshop = Workshop(str(base), SETTINGS)
    tasks = workshop.tasks([str(renamed), str(impostor)])
    found = tune(workshop, tasks, fitted / "decoder", tmp_path / "out", compare=False)
    assert [row.seen for row in found] == [True, False]
    assert [row.full is None for row in found] == [False, True]


def test_numbers_are_tuned_on_the_decoders_model_only(
    base: Path, fitted: Path, tmp_path: Path
) -> None:
    seen: list[str] = []
    workshop = Workshop(str(base), SETTINGS)
    with torch.no_grad():
        next(workshop.model.parameters()).mul_(1.5)
    workshop.model.save_pretrained(tmp_path / "model")
    workshop.tokenizer.save_pretrained(tmp_path / "model")
    other = Workshop(str(tmp_path / "model"), SETTINGS, lambda what, *_: seen.append(what))
    tasks = other.tasks([str(fitted / "one.csv")])
    with pytest.raises(ConfigError, match=r"must be the model that the decoder .* was fitted on"):
        tune(other, tasks, fitted / "decoder", tmp_path / "out", compare=False)
    assert not seen
    assert not (tmp_path / "out").exists()


def test_a_rate_that_ruins_the_decoder_leaves_nothing(
    base: Path, files: list[str], tmp_path: Path
) -> None:
    seen: list[str] = []
    workshop = Workshop(str(base), SETTINGS, lambda what, *_: seen.append(what))
    tasks = workshop.tasks(files[:2])
    for rate in (-1.0, 0.0, float("nan"), float("inf"), 1e38):
        with pytest.raises(ConfigError, match="--fit-lr must be a positive number"):
            fit(workshop, tasks, tmp_path / "out", model="base", **FIT, fit_lr=rate)
    assert not seen  # it was told before the training
    with pytest.raises(ConfigError, match="Try a smaller --fit-lr"):
        fit(workshop, tasks, tmp_path / "out", model="base", **FIT, fit_lr=1e30)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["..csv", "...csv", ".csv", "metrics.json.csv", "-x.csv"])
def test_a_task_is_named_as_a_folder_can_be(name: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("text,label\na,x\nb,y\n")
    with pytest.raises(ConfigError, match="the task would be called"):
        Workshop(str(base), SETTINGS).tasks([str(tmp_path / name)])


def test_a_decoder_without_its_tasks_is_told(fitted: Path, tmp_path: Path) -> None:
    facts = json.loads((fitted / "decoder" / FACTS).read_text())
    nan = [task | {"full": {"loss": float("nan"), "accuracy": 1}} for task in facts["tasks"]]
    for key, value in (("tasks", [{"name": "a"}]), ("tasks", None), ("tasks", nan), ("digest", 3)):
        (tmp_path / FACTS).write_text(json.dumps(facts | {key: value}))
        with pytest.raises(CheckpointError, match="must have a digest, and tasks with"):
            read_facts(tmp_path)
    (tmp_path / FACTS).write_text(json.dumps(facts | {"of": ["prompt"]}))
    with pytest.raises(CheckpointError, match=r"must be of='prompt' or 'adapter', got \['prompt"):
        read_facts(tmp_path)
    (tmp_path / FACTS).write_text('{"version": ' + "1" * 5000 + "}")
    with pytest.raises(CheckpointError, match="holds no decoder that can be read"):
        read_facts(tmp_path)


def test_a_model_without_its_tokenizer_is_told(base: Path, tmp_path: Path) -> None:
    workshop = Workshop(str(base), SETTINGS)
    workshop.model.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"its tokenizer (has \d+ entries|cannot be loaded)"):
        Workshop(str(tmp_path / "model"), SETTINGS)
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="its tokenizer cannot be loaded"):
        Workshop(str(tmp_path / "model"), SETTINGS)


def test_wrong_tasks_are_refused(base: Path, files: list[str], tmp_path: Path) -> None:
    workshop = Workshop(str(base), SETTINGS)
    with pytest.raises(ConfigError, match="two files are called 'size'"):
        workshop.tasks([files[1], files[1]])
    with pytest.raises(ConfigError, match="two tasks or more, got 1"):
        fit(workshop, workshop.tasks(files[:1]), tmp_path / "new", model="base", **FIT)
    with pytest.raises(ConfigError, match="must be a new or an empty folder"):
        fit(workshop, workshop.tasks(files), tmp_path, model="base", **FIT)
    one = tmp_path / "one.csv"
    one.write_text("text,label\na,x\nb,x\n")
    with pytest.raises(DataError, match="task 'one': classification needs two labels"):
        workshop.tasks([str(one)])
    with pytest.raises(ConfigError, match="eval-fraction must be in"):
        Workshop(str(base), Settings(eval_fraction=0))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        Workshop(str(tmp_path / "nowhere"), SETTINGS)
