"""A study on Ray Tune with two workers, one of which is killed: what it finds without Ray."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaops.errors import CheckpointError, ConfigError

from .conftest import LORA, told
from .test_command import call
from .test_journal import full_after

ray = pytest.importorskip("ray", reason="no Ray: pip install 'deltaops[ray]'")
SETTINGS: dict[str, Any] = {
    "trials": 4, "steps": 12, "rungs": 2, "seq_len": 16, "sampler": "random", "pruner": "none",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ray with room for two workers, on whose path is no checkout."""
    with chdir(tmp_path_factory.mktemp("elsewhere")):
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def killed_first(out: Path, done: threading.Event, found: list[str]) -> None:
    """Kill the process of the first trial that is seen under way."""
    from optuna.trial import TrialState

    from deltaops.search.on_ray import PLACE
    from deltaops.search.study import shown

    while not done.is_set():
        if (out / "study.json").is_file():
            for trial in shown(out).trials():
                place = trial.user_attrs.get(PLACE)
                if place is not None and trial.state == TrialState.RUNNING:
                    os.kill(int(place.rpartition("-")[2]), signal.SIGKILL)
                    found.append(place)
                    return
        time.sleep(0.002)


def test_two_workers_find_what_one_process_finds(
    search: Callable[..., Any], tmp_path: Path, encoder: str, data: str
) -> None:
    from deltaops.search import Watch
    from deltaops.search.on_ray import PLACE, search_on_ray

    out, done, killed = tmp_path / "ray", threading.Event(), list[str]()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray gives its workers; sums have another order with more
    try:
        wanted = search(tmp_path / "here", **SETTINGS)
        search(out, **SETTINGS | {"trials": 1})  # begun without Ray
    finally:
        torch.set_num_threads(threads)
    seen: list[int] = []
    watch = Watch(on_trials=lambda study, _: seen.append(len(study.complete())))
    killer = threading.Thread(target=killed_first, args=(out, done, killed))
    killer.start()
    try:
        found = search_on_ray(encoder, data, LORA, out=out, workers=2, watch=watch, **SETTINGS)
    finally:
        done.set()
        killer.join()
    assert found.finished
    assert len(killed) == 1
    assert (seen[0], seen[-1]) == (1, 4)
    assert told(found) == told(wanted)
    assert killed[0] not in {trial.user_attrs.get(PLACE) for trial in found.study.trials()}
    tensors = "best/adapter_model.safetensors"
    assert (out / tensors).read_bytes() == (tmp_path / "here" / tensors).read_bytes()
    assert search(out, **SETTINGS).finished, "and goes on without Ray"


def test_from_the_command_line(tmp_path: Path, encoder: str, data: str) -> None:
    """Its live table is no thing that Tune could write to a file, as it does with what it gets."""
    space = tmp_path / "space.yaml"
    space.write_text(json.dumps(LORA))
    said = call(
        "search", "--model", encoder, "--data", data, "--space", space, "--trials", 2, "--steps", 2,
        "--rungs", 1, "--seq-len", 16, "--out", tmp_path / "out", "--ray", 2,
    )  # fmt: skip
    assert "2 trials (2 complete)" in said
    assert "load it" in said


def test_a_result_that_a_full_disk_does_not_take_stays_to_be_kept(
    search: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltaops.search import journal
    from deltaops.search.on_ray import Keeper
    from deltaops.search.trainer import Result

    search(tmp_path, trials=1)
    keeper = Keeper(str(tmp_path), 2)
    assert keeper.begin() == 1
    first = keeper.claim("worker", "place")
    assert first is not None
    result = Result({"loss": 1.0}, True, 1, None, None, {})
    with monkeypatch.context() as full:
        full.setattr(journal.os, "write", full_after(0))
        for call_it in (
            lambda: keeper.finish("worker", result, {}),
            lambda: keeper.lost("worker", "no memory"),
        ):
            with pytest.raises(CheckpointError, match="No space left"):
                call_it()
    again = keeper.claim("worker", "place")
    assert again is not None
    assert again[0] == first[0]
    keeper.finish("worker", result, {})
    assert keeper.left() == 0
    keeper.open.close()


def test_what_ray_cannot_do_is_told(
    tmp_path: Path, encoder: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltaops.search import on_ray

    def run(**changes: Any) -> Any:
        settings = {"workers": 2, "out": tmp_path / "out"} | SETTINGS | changes
        return on_ray.search_on_ray(encoder, data, LORA, **settings)

    with pytest.raises(ConfigError, match="--pack is 2"):
        run(pack=2)
    with pytest.raises(ConfigError, match="1 or more workers"):
        run(workers=0)
    with pytest.raises(ConfigError, match="more than 0 CPUs"):
        run(cpus=float("nan"))
    monkeypatch.setattr(on_ray.ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(ConfigError, match="RAY_ADDRESS=auto"):
        run()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match="no cluster answers"):
        run()
    assert not (tmp_path / "out").exists()
