"""The report in a real browser: every figure is there to be seen."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium: apt-get install chromium-headless-shell"
)
FIGURES = {"history", "Pareto front", "importance of parameters", "trained parameters by layer"}
LOOK = """<script>addEventListener("load", () => {
  for (const image of document.images) {
    const canvas = document.createElement("canvas"), box = image.getBoundingClientRect();
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    let ink = 0;
    if (canvas.width) {
      const paper = canvas.getContext("2d");
      paper.drawImage(image, 0, 0);
      const { data } = paper.getImageData(0, 0, canvas.width, canvas.height);
      const seen = new Uint32Array(data.buffer);
      ink = seen.filter((pixel) => pixel !== seen[0]).length;
    }
    const shown = Math.round(Math.min(box.width, box.height));
    document.body.append(`[${image.alt}|${ink}|${shown}]`);
  }
})</script>"""
"""Writes of each image how many of its pixels differ from the first, and its lesser side."""


def seen(report: str, folder: Path) -> dict[str, tuple[int, int]]:
    """Title of a figure → pixels of ink, and the lesser side in the page."""
    assert BROWSER is not None
    page = folder / "page.html"
    page.write_text(report.replace("</body>", f"{LOOK}</body>"))
    said = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'p'}",
         "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    found = re.findall(r"\[([\w ]+)\|(\d+)\|(\d+)\]", said)
    return {title: (int(ink), int(side)) for title, ink, side in found}


@needs_browser
def test_a_browser_shows_every_figure(tmp_path: Path, search: Callable[..., Any]) -> None:
    from deltaops.search.report import write_report

    found = search(tmp_path / "study", trials=12, steps=1, rungs=1, objectives=("loss",))
    report = write_report(found.study).read_text()
    shown = seen(report, tmp_path)
    assert shown.keys() == FIGURES
    for title, (ink, side) in shown.items():
        assert ink > 1000, title
        assert side > 300, title
    # and what a damaged figure looks like, or this test would prove nothing
    damaged = report.replace("data:image/png;base64,iVBORw0KGgo", "data:image/png;base64,AAAA", 1)
    assert damaged != report
    assert seen(damaged, tmp_path)["history"][0] == 0


def test_what_is_committed_of_a_study(
    tmp_path: Path, search: Callable[..., Any], data: str
) -> None:
    from deltaops.search.engine import score_best

    program = Path(__file__).parents[2] / "benchmarks" / "search_results.py"
    spec = importlib.util.spec_from_file_location("search_results", program)
    assert spec is not None
    assert spec.loader is not None
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    search(tmp_path / "study", trials=2, steps=2, rungs=1)
    scores = score_best(tmp_path / "study", data)
    table = tmp_path / "table.json"
    lines = [
        {"name": name, "title": title, "runs": {"0": {"accuracy": a}, "1": {"accuracy": a + 0.02}}}
        for name, title, a in (("full", "full tuning", 0.9), ("lora", "LoRA", 0.7), ("x", "X", 0.5))
    ]
    table.write_text(json.dumps({"methods": lines}))
    facts = {"processor": "P", "threads": 2, "isa": "avx2"}
    path = results.write(tmp_path / "study", tmp_path / "out", table, facts)
    found = json.loads(path.read_text())
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 2
    assert found["test"]["accuracy"] == scores["accuracy"]
    assert found["settings"]["data"] == "task.csv"
    text = path.with_suffix(".md").read_text()
    assert "the methods' table: LoRA, 71.0 %" in text
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(pictures) == 3
    assert all((tmp_path / "out" / name).stat().st_size for name in pictures)
