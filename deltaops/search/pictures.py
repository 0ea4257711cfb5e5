"""Pictures of a study: its history, the front, what mattered, and where the deltas ended up."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from deltaops.files import write_atomically
from deltaops.tuning.curve import ACCENT, INK, SOFT, figure

from .settings import GOALS
from .study import RESULT, Study

LEAST = 4
"""Complete trials, below which nothing is said of what mattered."""
UNITS = {"loss": "loss, nats", "seconds": "seconds a step", "memory": "memory, bytes"}


def draw_all(study: Study, folder: Path) -> dict[str, Path | str]:
    """Draw each picture into ``folder``. Returns: title → file, or why there is none."""
    found: dict[str, Path | str] = {}
    for title, draw in (
        ("history", _history),
        ("Pareto front", _front),
        ("importance of parameters", _importance),
        ("trained parameters by layer", _layers),
    ):
        canvas = draw(study)
        if isinstance(canvas, str):
            found[title] = canvas
            continue
        path = folder / f"{draw.__name__.strip('_')}.png"
        write_atomically(path, lambda part, drawn=canvas: drawn.savefig(part))  # type: ignore[misc]  # mypy knows no types of defaults
        found[title] = path
    return found


def _axes(x: str, y: str) -> tuple[Any, Any]:
    canvas, axes = figure(7.0, 3.6)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    return canvas, axes


def _history(study: Study) -> Any:
    """The first objective of every trial, and the best until then."""
    goal = study.settings.objectives[0]
    most = GOALS[goal] == "maximize"
    complete = study.complete()
    if not complete:
        return "no trial is complete"
    canvas, axes = _axes("trial", UNITS.get(goal, goal))
    numbers = [trial.number for trial in complete]
    values = [trial.values[0] for trial in complete]
    best = [(max if most else min)(values[: i + 1]) for i in range(len(values))]
    axes.scatter(numbers, values, color=SOFT, label="trials", zorder=2)
    axes.step(numbers, best, where="post", color=ACCENT, label="best so far")
    for state, mark, name in ((TrialState.PRUNED, "|", "pruned"), (TrialState.FAIL, "x", "broken")):
        there = [t.number for t in study.trials() if t.state == state]
        if there:
            level = (min if most else max)(values)
            axes.scatter(there, [level] * len(there), marker=mark, color=INK, label=name, zorder=2)
    axes.legend(frameon=False)
    return canvas


def _front(study: Study) -> Any:
    """Every complete trial by its first two objectives, quality and size where there is but one."""
    complete, front = study.complete(), study.front()
    if not complete:
        return "no trial is complete"
    goals = study.settings.objectives

    def point(trial: FrozenTrial) -> tuple[float, float]:
        if len(goals) > 1:
            return trial.values[1], trial.values[0]
        return trial.user_attrs[RESULT]["parameters"], trial.values[0]

    second = goals[1] if len(goals) > 1 else "parameters"
    canvas, axes = _axes(UNITS.get(second, f"{second}, trained"), UNITS.get(goals[0], goals[0]))
    best = {trial.number for trial in front}
    others = [point(trial) for trial in complete if trial.number not in best]
    axes.scatter(*_columns(others), color=SOFT, label="beaten")
    chosen = sorted(point(trial) for trial in front)
    axes.plot(*_columns(chosen), "o-", color=ACCENT, label="front" if len(goals) > 1 else "best")
    for trial in front:
        axes.annotate(f" {trial.number}", point(trial), color=INK, fontsize=8)
    if all(x > 0 for x, _ in (*others, *chosen)):
        axes.set_xscale("log")
    axes.legend(frameon=False)
    return canvas


def _importance(study: Study) -> Any:
    """PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255) for the first objective, of the
    parameters that every complete trial has."""
    complete = study.complete()
    if len(complete) < LEAST:
        return f"{len(complete)} trials are complete, and {LEAST} are needed"
    shared = set.intersection(*(set(trial.params) for trial in complete))
    varied = sorted(name for name in shared if len({t.params[name] for t in complete}) > 1)
    if not varied:
        return "no parameter that all trials have was varied"
    if len({trial.values[0] for trial in complete}) == 1:
        return "all complete trials are equally good"
    sign = -1 if GOALS[study.settings.objectives[0]] == "maximize" else 1
    with warnings.catch_warnings():
        # it warns that low values count as good, which the sign sees to
        warnings.filterwarnings("ignore", message="PedAnovaImportanceEvaluator computes")
        found = get_param_importances(
            study.optuna, evaluator=PedAnovaImportanceEvaluator(evaluate_on_local=False),
            params=varied, target=lambda trial: sign * trial.values[0], normalize=True,
        )  # fmt: skip
    found = {name: value for name, value in found.items() if math.isfinite(value)}
    if not found:
        return "the trials are too few to tell"
    canvas, axes = _axes("importance for the first objective, of 1", "")
    names = list(found)[::-1]
    axes.barh(names, [found[name] for name in names], color=ACCENT)
    return canvas


def _layers(study: Study) -> Any:
    """How many parameters each layer trains: in the best trial, and in the front's mean."""
    front = study.front()
    if not front:
        return "no trial is complete"
    counts = [trial.user_attrs[RESULT]["layers"] for trial in front]
    names = sorted({n for one in counts for n in one}, key=lambda n: (n == "", int(n or 0)))
    canvas, axes = _axes("layer", "trained parameters")
    shown = [name or "outside" for name in names]
    axes.bar(shown, [counts[0].get(n, 0) for n in names], color=ACCENT, label="best trial")
    if len(front) > 1:
        mean = [sum(one.get(n, 0) for one in counts) / len(counts) for n in names]
        axes.plot(shown, mean, "o", color=INK, label=f"mean of the {len(front)} on the front")
    axes.legend(frameon=False)
    return canvas


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
