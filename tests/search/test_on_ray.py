"""A study on Ray Tune with two workers, one of which is killed: what it finds without Ray."""

from __future__ import annotations

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

from deltaops.errors import ConfigError

from .conftest import LORA, told

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
    from deltaops.search.on_ray import PLACE, search_on_ray

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray gives its workers; sums have another order with more
    try:
        wanted = search(tmp_path / "here", **SETTINGS)
    finally:
        torch.set_num_threads(threads)
    out, done, killed = tmp_path / "ray", threading.Event(), list[str]()
    killer = threading.Thread(target=killed_first, args=(out, done, killed))
    killer.start()
    try:
        found = search_on_ray(encoder, data, LORA, out=out, workers=2, **SETTINGS)
    finally:
        done.set()
        killer.join()
    assert found.finished
    assert len(killed) == 1
    assert told(found) == told(wanted)
    assert killed[0] not in {trial.user_attrs[PLACE] for trial in found.study.trials()}
    tensors = "best/adapter_model.safetensors"
    assert (out / tensors).read_bytes() == (tmp_path / "here" / tensors).read_bytes()
    assert search(out, **SETTINGS).finished, "and goes on without Ray"


def test_what_ray_cannot_do_is_told(tmp_path: Path, encoder: str, data: str) -> None:
    from deltaops.search.on_ray import search_on_ray

    with pytest.raises(ConfigError, match="Pass --pack 1"):
        search_on_ray(encoder, data, LORA, out=tmp_path, workers=2, pack=2, **SETTINGS)
    with pytest.raises(ConfigError, match="1 or more workers"):
        search_on_ray(encoder, data, LORA, out=tmp_path, workers=0, **SETTINGS)
