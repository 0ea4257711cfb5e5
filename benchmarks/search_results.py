"""A study of `deltaops search` as results to commit: JSON, a report and the report's pictures.

    python -P benchmarks/search_results.py study --out benchmarks/results \\
        --beside benchmarks/results/MACHINE-methods.json

Writes MACHINE-search.json (settings, every trial, and what the best scored on unseen texts, where
`deltaops search test` was run), MACHINE-search.md and a PNG of each figure. Every number is the
study's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from deltaops.errors import ConfigError
from deltaops.files import check_folder, write_atomically, write_json
from deltaops.measure import machine
from deltaops.measure.compare.contenders import FULL, HEAD
from deltaops.measure.report import markdown_table
from deltaops.measure.store import slug
from deltaops.search.pictures import draw_all
from deltaops.search.report import log_of, outcome, shown_values, summary
from deltaops.search.study import BEST, CANDIDATE, RESULT, TESTED, Study, shown


def facts_of(study: Study, machine_facts: dict[str, Any]) -> dict[str, Any]:
    """What is committed. Raises: ConfigError where no trial is complete."""
    best = study.best()
    if best is None:
        raise ConfigError(f"{study.folder}: no trial is complete. Run `deltaops search resume`.")
    trials = [t for t in study.trials() if t.datetime_start and t.datetime_complete]
    began = min(t.datetime_start for t in trials if t.datetime_start)
    ended = max(t.datetime_complete for t in trials if t.datetime_complete)
    log = log_of(study)
    for name in ("model", "data"):  # as a reader has them, not where they lay
        log["settings"][name] = Path(log["settings"][name]).name
    return {
        "machine": machine_facts["processor"],
        "threads": machine_facts["threads"],
        "seconds": round((ended - began).total_seconds()),
        "best": {
            "trial": best.number,
            "candidate": best.user_attrs[CANDIDATE],
            "parameters": best.user_attrs[RESULT]["parameters"],
            "held_out": dict(zip(study.settings.objectives, best.values, strict=True)),
        },
        "test": _test(study.folder / BEST / TESTED, best.number),
        **log,
    }


def _test(path: Path, best: int) -> dict[str, Any] | None:
    """What the best scored on unseen texts; None where it was not asked. Raises: ConfigError."""
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if found["trial"] != best:
        raise ConfigError(
            f"{path} is of trial {found['trial']}, and trial {best} is the best. Run `deltaops "
            "search test` again."
        )
    return found | {"data": Path(found["data"]).name}


def accuracies(path: Path) -> dict[str, float]:
    """Delta → mean accuracy over seeds, of a table that `deltaops compare` wrote."""
    return {
        line["title"]: statistics.mean(run["accuracy"] for run in line["runs"].values())
        for line in json.loads(path.read_text("utf-8"))["methods"]
        if line["name"] not in (FULL, HEAD) and line["runs"]
    }


def report(
    study: Study, facts: dict[str, Any], figures: list[str], beside: dict[str, float]
) -> str:
    """The Markdown beside the JSON."""
    best, tested = facts["best"], facts["test"]
    lines = [
        f"# Search: {facts['settings']['model']} on {facts['settings']['data']}",
        "",
        f"{summary(study)}; {facts['seconds'] / 60:.0f} minutes from the first trial's start to "
        f"the last one's end on {facts['machine']}, {facts['threads']} threads.",
        "",
        f"Best: trial {best['trial']}, {best['candidate']}, {best['parameters']:,} parameters; "
        + ", ".join(f"{name} {value:.4f}" for name, value in best["held_out"].items())
        + " on the texts that were held out of training.",
    ]
    if tested is None:
        lines += ["", "It was not scored on unseen texts (`deltaops search test`)."]
    else:
        lines += ["", f"On {tested['texts']} texts that no trial was judged by: accuracy "
                  f"{100 * tested['accuracy']:.1f} %, loss {tested['loss']:.4f}."]  # fmt: skip
        if beside:
            top = max(beside, key=lambda name: beside[name])
            lines[-1] += f" The best delta of the methods' table: {top}, {100 * beside[top]:.1f} %."
    lines += [f"\n![{Path(name).stem}]({name})" for name in figures]
    rows = [
        (str(trial.number), outcome(study, trial), trial.user_attrs.get(CANDIDATE, ""))
        for trial in study.trials()
    ]
    return "\n".join([*lines, "", *markdown_table(("trial", "outcome", "candidate"), rows)]) + "\n"


def write(folder: Path, out: Path, beside: Path | None, facts: dict[str, Any]) -> Path:
    """All files; returns the JSON's path. Raises: ConfigError, CheckpointError."""
    check_folder(out)
    study = shown(folder)
    told = facts_of(study, facts)
    name = f"{slug(facts)}-search"
    figures = []
    for figure in draw_all(study, study.folder).values():
        if isinstance(figure, Path):
            target = out / f"{name}-{figure.name}"
            content = figure.read_bytes()
            write_atomically(target, lambda part, bits=content: part.write_bytes(bits))
            figures.append(target.name)
    path = out / f"{name}.json"
    write_json(path, told)
    text = report(study, told, figures, {} if beside is None else accuracies(beside))
    write_atomically(path.with_suffix(".md"), lambda part: part.write_text(text, encoding="utf-8"))
    print(f"best: {shown_values(study, study.front()[0])}; written: {path}")
    return path


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--beside", type=Path, help="a table of `deltaops compare`, as JSON")
    chosen = parser.parse_args()
    write(chosen.study, chosen.out, chosen.beside, machine.describe())


if __name__ == "__main__":
    main()
