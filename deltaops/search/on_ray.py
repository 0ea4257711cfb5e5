"""The same study on Ray Tune: trials run in Ray's workers, on one machine or many.

    driver: Tuner ──> worker: claim ⇄ Keeper (an actor beside the driver) ⇄ the study's folder
                              train, ask at each evaluation, hand over the adapter

What a trial is, how it is drawn, judged, pruned and kept is the study's own, so that its folder,
its report and a resumption are the same wherever a trial ran; Ray places and restarts the workers.
What a worker's machine needs is deltaops, and the model and the data under the names that the
driver has them by; the study's folder lies with the driver alone.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, chdir
from functools import lru_cache
from pathlib import Path
from typing import Any

from deltaops.errors import ConfigError
from deltaops.surgery import Handle
from deltaops.tuning.workshop import Task, Workshop

try:
    import ray
    from ray import tune
    from ray.tune import Callback, Stopper
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise ConfigError(
        f"deltaops search --ray needs Ray Tune ({error}). pip install 'deltaops[ray]'."
    ) from error

from .candidate import Candidate
from .engine import Found, Watch, check_trials, loaded, reason
from .settings import Settings
from .space import load_space
from .study import Study, create, shown
from .trainer import Result, train_alone
from .workers import working

PLACE = "place"
"""Attribute of a trial: host and process of its last worker."""
RESTARTS = 3
"""Of a trial whose worker died, before its study has it as broken."""


def search_on_ray(
    model: str,
    data: str,
    space: str | Path | Mapping[str, Any],
    *,
    trials: int,
    out: str | Path,
    workers: int,
    cpus: float = 1.0,
    watch: Watch | None = None,
    **settings: Any,
) -> Found:
    """As :func:`.engine.search`, the trials in up to ``workers`` of Ray's workers at a time.

    Ray is started where it does not run yet; ``RAY_ADDRESS`` names a cluster. A worker that dies is
    started again on the trial that it had.

    Args:
        workers: at a time.
        cpus: of each, which Ray counts and torch gets as threads.
    Raises: as :func:`.engine.search`; ConfigError for ``pack``, whose trials share a process.
    """
    asked = Settings(model, data, **settings)
    asked.check()
    check_trials(trials)
    if workers < 1 or cpus <= 0:
        raise ConfigError(
            f"--ray must be 1 or more workers of more than 0 CPUs, got {workers} of {cpus:g}."
        )
    if asked.pack > 1:
        raise ConfigError("--ray gives each worker one trial. Pass --pack 1.")
    chosen = load_space(space)
    shop, task, seen = loaded(asked, watch)
    study = create(Path(out), asked, chosen.resolved(shop.model), shop, task)
    study.want(trials)
    if not ray.is_initialized():
        with chdir(study.folder):  # Ray puts where it starts on its workers' path, kernels/ and all
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=here)(Keeper)
    keeper = actor.remote(str(study.folder.resolve()), trials)
    # a worker runs in a folder of Ray's
    named = {"model": _absolute(model), "data": _absolute(data)}
    facts = {
        "settings": asked.as_json() | named,
        "model": shop.fingerprint,
        "data": task.fingerprint,
    }
    told = _Told(study, seen, keeper)
    try:
        trained = tune.with_parameters(_worker, keeper=keeper, facts=facts)
        with tempfile.TemporaryDirectory() as scratch:
            results = tune.Tuner(
                tune.with_resources(trained, {"cpu": cpus}),
                tune_config=tune.TuneConfig(
                    num_samples=max(1, ray.get(keeper.left.remote())),
                    max_concurrent_trials=workers,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    storage_path=scratch, verbose=0, callbacks=[told], stop=_Stop(told),
                    failure_config=tune.FailureConfig(max_failures=RESTARTS),
                ),
            ).fit()  # fmt: skip
        left: int = ray.get(keeper.left.remote())
    finally:
        ray.kill(keeper)
    if told.useless:
        raise ConfigError(f"no worker of Ray's could begin a trial: {results.errors[0]}")
    study.settle()
    front = study.front()
    return Found(left == 0, study, front[0] if front else None, tuple(front))


class Keeper:
    """An actor: the only one that touches the study's folder while Ray's workers train."""

    def __init__(self, folder: str, trials: int) -> None:
        self.study = shown(Path(folder))
        self.trials = trials
        self.open = ExitStack()
        self.name = self.open.enter_context(working(self.study.folder))
        self.claimed: dict[str, Any] = {}

    def left(self) -> int:
        """Trials that are not done."""
        done = sum(trial.state.is_finished() for trial in self.study.trials())
        return max(0, self.trials - done)

    def claim(self, worker: str, place: str) -> tuple[int, Candidate] | None:
        """What Ray's trial ``worker`` is to train: again the same, where it was begun before.

        place: host and process that train it, for the record.
        """
        while True:
            trial = self.claimed.get(worker)
            if trial is None:
                found = self.study.claim(self.name, self.trials, 1)
                if not found:
                    return None
                trial = self.claimed[worker] = found[0]
            trial.set_user_attr(PLACE, place)
            try:
                return trial.number, self.study.candidate(trial)
            except ConfigError as error:  # two options that do not go together
                self.fail(worker, f"refused: {error}")

    def report(self, worker: str, rung: int, scores: dict[str, float]) -> bool:
        """Whether the trial is worth going on; see :meth:`.study.Study.report`."""
        return self.study.report(self.claimed[worker], rung, scores)

    def finish(self, worker: str, result: Result, files: dict[str, bytes]) -> None:
        """Note what came of the trial, whose adapter is ``files``."""

        def save(folder: Path) -> None:
            for name, content in files.items():
                (folder / name).write_bytes(content)

        self.study.finish(self.claimed.pop(worker), result, save)

    def fail(self, worker: str, why: str) -> None:
        """Record a broken trial."""
        self.study.fail(self.claimed.pop(worker), why)

    def lost(self, worker: str) -> bool:
        """Ray gave ``worker`` up; whether it had a trial, which is then a broken one."""
        if worker not in self.claimed:
            return False
        self.fail(worker, f"its worker died {RESTARTS + 1} times")
        return True


def _absolute(name: str) -> str:
    """A file or folder by its whole path; a hub id as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


class _Told(Callback):  # type: ignore[misc]  # Ray's types are not checked
    """In the driver: tells who watches, and sees to workers that died too often."""

    def __init__(self, study: Study, watch: Watch, keeper: Any) -> None:
        self.study, self.watch, self.keeper = study, watch, keeper
        self.useless = False
        """Whether a worker could not even begin, as no other one will."""

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        """See Ray."""
        self.watch.on_trials(self.study, [])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """See Ray."""
        if not ray.get(self.keeper.lost.remote(trial.trial_id)):
            self.useless = True
        self.watch.on_trials(self.study, [])


class _Stop(Stopper):  # type: ignore[misc]  # as above
    """In the driver: ends all where it makes no sense to go on, or who watches says so."""

    def __init__(self, told: _Told) -> None:
        self.told = told

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """See Ray; each trial ends by itself."""
        return False

    def stop_all(self) -> bool:
        """See Ray."""
        return self.told.useless or self.told.watch.should_stop()


@lru_cache(maxsize=1)
def _loaded_once(settings: str) -> tuple[Workshop, Task]:
    """The frozen model and the task, once a worker's process. Args: the settings as JSON."""
    shop, task, _ = loaded(Settings.of_json(json.loads(settings)), None)
    return shop, task


def _worker(_: dict[str, Any], keeper: Any, facts: dict[str, Any]) -> None:
    """One trial, in a worker. Raises: ConfigError where this machine has another model or data."""
    shop, task = _loaded_once(json.dumps(facts["settings"]))
    for name, here in (("model", shop.fingerprint), ("data", task.fingerprint)):
        if here != facts[name]:
            raise ConfigError(
                f"--{name} {facts['settings'][name]} is another one on {socket.gethostname()} than "
                "where the search was begun. Copy it there."
            )
    own = tune.get_context().get_trial_id()
    claimed = ray.get(keeper.claim.remote(own, f"{socket.gethostname()}-{os.getpid()}"))
    if claimed is None:
        return
    number, candidate = claimed
    settings = Settings.of_json(facts["settings"])
    try:
        result, handle = train_alone(
            shop, task, candidate, settings.steps, settings.rungs,
            lambda rung, scores: ray.get(keeper.report.remote(own, rung, scores)),
        )  # fmt: skip
    except ray.exceptions.RayError:  # the keeper's: no fault of the trial
        raise
    except Exception as error:  # whatever it breaks, the trial has the reason
        ray.get(keeper.fail.remote(own, reason(error)))
        return
    try:
        files = {} if result.pruned else _files(handle)
    finally:
        handle.revert()
    ray.get(keeper.finish.remote(own, result, files))
    tune.report({"trial": number, **result.scores})


def _files(handle: Handle) -> dict[str, bytes]:
    """What ``handle`` saves, by name."""
    with tempfile.TemporaryDirectory() as folder:
        handle.save(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
