"""``report.html``: one file with every picture in it, and the trials as a table; its PNGs; and
``trials.json``, the trials for programs."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from deltaops.files import write_atomically, write_json

from .pictures import draw_all
from .study import ALONE, BEST, CANDIDATE, REASON, RESULT, Study

REPORT, LOG = "report.html", "trials.json"
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;color:#222}"
    "img{max-width:100%}table{border-collapse:collapse;font-size:13px}"
    "td,th{padding:.2em .6em;border-bottom:1px solid #ddd;text-align:left}pre{white-space:pre-wrap}"
)


def write_report(study: Study) -> Path:
    """Draw the pictures and write report and log, beside the study. Raises: CheckpointError."""
    with study.one_at_a_time():  # who settles meanwhile deletes half-written files
        return _write_report(study)


def _write_report(study: Study) -> Path:
    write_log(study)
    figures = draw_all(study, study.folder)
    parts = [
        f"<h1>Search: {escape(Path(study.settings.model).name)} on "
        f"{escape(Path(study.settings.data).name)}</h1>",
        f"<p>{escape(summary(study))}</p>",
    ]
    best = study.best()
    if best is not None:
        parts.append(
            f"<p>Best: trial {best.number}, {escape(shown_values(study, best))}: "
            f"{escape(best.user_attrs[CANDIDATE])}</p>"
        )
    command = study.folder / BEST / "reproduce.txt"
    if command.is_file():
        parts.append(f"<pre>{escape(command.read_text(encoding='utf-8'))}</pre>")
    for title, figure in figures.items():
        parts.append(f"<h2>{title[0].upper()}{title[1:]}</h2>")
        if isinstance(figure, str):
            parts.append(f"<p>Not drawn: {escape(figure)}.</p>")
            continue
        coded = base64.b64encode(figure.read_bytes()).decode()
        parts.append(f'<img alt="{title}" src="data:image/png;base64,{coded}">')
    parts += ["<h2>Trials</h2>", _table(study)]
    text = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>deltaops search</title>'
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    path = study.folder / REPORT
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))
    return path


def write_log(study: Study) -> Path:
    """:func:`log_of` as a file. Raises: CheckpointError."""
    path = study.folder / LOG
    write_json(path, log_of(study))
    return path


def log_of(study: Study) -> dict[str, Any]:
    """Every trial as JSON, without what only a resumption needs."""
    trials = [
        {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            "values": trial.values,
            "parameters": trial.params,
            "losses": [round(abs(v), 6) for v in trial.intermediate_values.values()],
            "seconds": None if trial.duration is None else round(trial.duration.total_seconds(), 1),
            **{name: trial.user_attrs[name] for name in (CANDIDATE, REASON, ALONE)
               if name in trial.user_attrs},
        }
        for trial in study.trials()
    ]  # fmt: skip
    return {"settings": study.settings.as_json(), "trials": trials}


def summary(study: Study) -> str:
    """How many trials there are of each state."""
    names = {
        TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "broken",
        TrialState.RUNNING: "under way", TrialState.WAITING: "queued",
    }  # fmt: skip
    states = [trial.state for trial in study.trials()]
    counts = [f"{states.count(s)} {name}" for s, name in names.items() if s in states]
    settings = study.settings
    return (
        f"{len(states)} trials ({', '.join(counts) or 'none'}); {settings.sampler}, pruner "
        f"{settings.pruned_by}, {settings.steps} steps, seed {settings.seed}"
    )


def shown_values(study: Study, trial: FrozenTrial) -> str:
    """A complete trial's objectives, in words."""
    pairs = zip(study.settings.objectives, trial.values, strict=True)
    return ", ".join(f"{goal} {value:.6g}" for goal, value in pairs)


def outcome(study: Study, trial: FrozenTrial) -> str:
    """What came of a trial, in words."""
    if trial.state == TrialState.COMPLETE:
        return shown_values(study, trial)
    if trial.state == TrialState.FAIL:
        return f"broken: {trial.user_attrs.get(REASON, 'no reason was recorded')}"
    if trial.state == TrialState.PRUNED:
        scores = trial.user_attrs[RESULT]["scores"]
        return f"pruned at evaluation {trial.last_step}, loss {scores['loss']:.4g}"
    return "under way" if trial.state == TrialState.RUNNING else "queued"


def _table(study: Study) -> str:
    rows = []
    for trial in study.trials():
        parameters = trial.user_attrs.get(RESULT, {}).get("parameters")
        alone = trial.user_attrs.get(ALONE)
        told = outcome(study, trial) + ("" if alone is None else f"; in no pack: {alone}")
        cells = (
            str(trial.number), told,
            "" if parameters is None else f"{parameters:,}",
            trial.user_attrs.get(CANDIDATE, ""),
        )  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("trial", "outcome", "parameters", "candidate"))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"
