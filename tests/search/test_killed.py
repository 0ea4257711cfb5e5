"""Real processes on one study, of which some are killed at a random moment."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltaops.search import resume
from deltaops.search.workers import FOLDER

from .conftest import LORA, told

TRIALS = 12
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


def test_killed_processes_leave_nothing_undone(
    search: Callable[..., Any], tmp_path: Path, encoder: str, data: str
) -> None:
    straight = search(tmp_path / "straight", trials=TRIALS, steps=12)
    out = tmp_path / "out"
    processes = [begin(encoder, data, out) for _ in range(2)]
    limit = time.monotonic() + 120
    while not (out / "trials").is_dir() and time.monotonic() < limit:  # a first trial has ended
        assert any(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.01)
    wait = random.uniform(0.0, 0.3)
    time.sleep(wait)
    for process in processes:
        process.kill()
        process.communicate()
    ended = resume(out)
    assert ended.finished
    # each number once, none left open, and each with what its parameters give
    assert told(ended) == told(straight), wait
    assert not list((out / FOLDER).iterdir())
    best = json.loads((out / "best" / "trial.json").read_text())
    assert best["trial"] == ended.best.number
