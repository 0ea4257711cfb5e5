"""Studies whose processes are killed: real ones at a random moment, and at every moment in turn."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltaops.search import Watch, resume
from deltaops.search.workers import FOLDER, alive, working

from .conftest import LORA, told

TRIALS, STEPS = 10, 12
PROGRAM = """
import sys
from deltaops.cli.quiet import quiet_transformers
from deltaops.search import search
quiet_transformers()
model, data, out, space = sys.argv[1:]
search(model, data, __import__("json").loads(space), out=out, trials={trials}, steps=12, rungs=2,
       seq_len=16, sampler="random", pruner="none")
"""


def begin(encoder: str, data: str, out: Path) -> subprocess.Popen[bytes]:
    program = PROGRAM.format(trials=TRIALS)
    command = [sys.executable, "-P", "-c", program, encoder, data, str(out), json.dumps(LORA)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def test_two_processes_share_a_study_and_one_survives_the_other(
    search: Callable[..., Any], tmp_path: Path, encoder: str, data: str
) -> None:
    straight = search(tmp_path / "straight", trials=TRIALS, steps=STEPS)
    out = tmp_path / "out"
    other = begin(encoder, data, out)
    limit = time.monotonic() + 120
    while not (out / "trials").is_dir() and time.monotonic() < limit:  # its first trial has ended
        assert other.poll() is None, other.communicate()
        time.sleep(0.005)
    steps, last = 0, random.randrange(3 * STEPS)

    def step(what: str, number: int, loss: float) -> None:
        nonlocal steps
        steps += 1
        if steps > last:
            other.kill()

    try:
        ended = search(out, trials=TRIALS, steps=STEPS, watch=Watch(on_step=step))
    finally:
        other.kill()
        other.communicate()
    assert ended.finished
    # each number once, none left open, and each with what its parameters give
    assert told(ended) == told(straight), last
    best = json.loads((out / "best" / "trial.json").read_text())
    assert best["trial"] == ended.best.number


def test_a_killed_study_is_resumed(search: Callable[..., Any], tmp_path: Path) -> None:
    straight = search(tmp_path / "straight", trials=3, pruner="halving")
    out = tmp_path / "out"
    # a process that dies leaves its trial as it is, half drawn or half trained
    for left in range(1, 40, 5):
        lines = (tmp_path / "straight" / "journal.log").read_bytes().splitlines(keepends=True)
        if left >= len(lines):
            break
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "straight", out)
        (out / "journal.log").write_bytes(b"".join(lines[:left]) + b'{"half')
        ended = resume(out) if left > 2 else search(out, trials=3, pruner="halving")
        assert told(ended) == told(straight), left


def test_a_dead_process_is_told_from_a_living_one(tmp_path: Path) -> None:
    with working(tmp_path) as name:
        assert alive(tmp_path, name)
    assert not alive(tmp_path, name)
    (tmp_path / FOLDER / "dead").touch()
    with working(tmp_path):
        assert len(list((tmp_path / FOLDER).iterdir())) == 1
