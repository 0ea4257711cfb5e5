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
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, chdir, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from deltaops.errors import CheckpointError, ConfigError, DeltaopsError
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
from .engine import WAIT, Found, Watch, check_trials, loaded, reason, wanted
from .settings import Settings
from .space import Space, load_space
from .study import Study, create, reopen, shown
from .trainer import Result, train_alone
from .workers import working

PLACE = "place"
"""Attribute of a trial: host and process of its last worker."""
RESTARTS = 3
"""Of a trial whose worker died, before its study has it as broken."""
STOPPED = "stopped"
"""In what a worker reports: why no trial can go on."""


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

    Ray is started where it does not run yet, and ended again; ``RAY_ADDRESS`` names a cluster. A
    worker that dies is started again on the trial that it had.

    Args:
        workers: at a time.
        cpus: of each, which Ray counts and torch gets as threads.
    Raises: as :func:`.engine.search`; ConfigError for ``pack``, whose trials share a process, and
        where Ray cannot be reached.
    """
    asked = Settings(model, data, **settings)
    asked.check()
    check_trials(trials)
    return _search(asked, load_space(space), trials, Path(out), workers, cpus, watch)


def resume_on_ray(
    out: str | Path,
    *,
    workers: int,
    trials: int | None = None,
    cpus: float = 1.0,
    watch: Watch | None = None,
) -> Found:
    """As :func:`.engine.resume`, on Ray, wherever the study was begun. Raises: as there, and as
    :func:`search_on_ray`."""
    if trials is not None:
        check_trials(trials)
    asked, space = reopen(Path(out))
    return _search(asked, space, trials or 0, Path(out), workers, cpus, watch, resumed=True)


def _search(
    asked: Settings,
    space: Space,
    trials: int,
    out: Path,
    workers: int,
    cpus: float,
    watch: Watch | None,
    *,
    resumed: bool = False,
) -> Found:
    """Both; ``resumed``: also the trials that it was asked for before."""
    if workers < 1 or not cpus > 0:
        raise ConfigError(
            f"--ray must be 1 or more workers of more than 0 CPUs, got {workers} of {cpus:g}."
        )
    if asked.pack > 1:
        raise ConfigError(
            f"--ray gives each worker one trial, and --pack is {asked.pack}. Leave one of them out."
        )
    shop, task, seen = loaded(asked, watch)
    fitting = space.resolved(shop.model)
    with _cluster():
        study = create(out, asked, fitting, shop, task)
        asked_for = wanted(study, trials) if resumed else trials
        study.want(asked_for)
        # a worker runs in a folder of Ray's
        named = {"model": _absolute(asked.model), "data": _absolute(asked.data)}
        facts = {
            "settings": asked.as_json() | named,
            "model": shop.fingerprint,
            "data": task.fingerprint,
        }
        left = _train(study, asked_for, workers, cpus, facts, seen)
    study.settle()
    front = study.front()
    return Found(left == 0, study, front[0] if front else None, tuple(front))


@contextmanager
def _cluster() -> Iterator[None]:
    """Inside, Ray runs; where it did not before, it ends behind it. Raises: ConfigError."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise ConfigError(
            f"--ray: RAY_ADDRESS={address} is for Ray's client, which is outside of the cluster, "
            "and so would be the study's folder. Search on a machine of the cluster, with "
            "RAY_ADDRESS=auto."
        )
    host, _, port = address.rpartition(":")
    if port.isdecimal():  # Ray itself would end this process after a minute
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            raise ConfigError(
                f"--ray: no cluster answers at RAY_ADDRESS={address} ({error}). Start one there by "
                "`ray start --head`, or unset RAY_ADDRESS."
            ) from error
    with tempfile.TemporaryDirectory() as elsewhere:
        try:
            # Ray puts where it starts on its workers' path, kernels/ and all
            with chdir(elsewhere), _own_handlers(signal.SIGTERM):
                ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        except Exception as error:  # whatever Ray raises, there is none
            at = f" at RAY_ADDRESS={address}" if address else ""
            raise ConfigError(f"--ray: Ray cannot be had{at}: {reason(error)}.") from error
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _own_handlers(*numbers: signal.Signals) -> Iterator[None]:
    """Behind it, these signals do what they did before: Ray takes them, and keeps them."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers} if main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(
    study: Study, trials: int, workers: int, cpus: float, facts: dict[str, Any], watch: Watch
) -> int:
    """Have Ray train what is not done. Returns: how many trials are not done then.

    Args:
        facts: for :func:`_worker`.
    Raises: ConfigError where no worker can begin; CheckpointError where the study cannot be kept.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=here)(Keeper)
    keeper = actor.remote(str(study.folder.resolve()), trials)
    told = _Told(study, watch, keeper)
    try:
        left: int = _answer(keeper.begin.remote())
        if not left:
            return 0
        trained = tune.with_parameters(_worker, keeper=keeper, facts=facts)
        ours = _own_handlers(signal.SIGINT, signal.SIGUSR1)
        with tempfile.TemporaryDirectory() as scratch, ours:
            tune.Tuner(
                tune.with_resources(trained, {"cpu": cpus}),
                tune_config=tune.TuneConfig(
                    num_samples=left, max_concurrent_trials=workers, reuse_actors=True
                ),
                run_config=tune.RunConfig(
                    storage_path=scratch, verbose=0, callbacks=[told], stop=_Stop(told),
                    failure_config=tune.FailureConfig(max_failures=RESTARTS),
                ),
            ).fit()  # fmt: skip
        if told.over is not None:
            raise told.over
        left = _answer(keeper.left.remote())
        return left
    finally:
        ray.kill(keeper)


class Keeper:
    """An actor: the only one that touches the study's folder while Ray's workers train."""

    def __init__(self, folder: str, trials: int) -> None:
        self.folder = Path(folder)
        self.trials = trials
        self.open = ExitStack()
        self.claimed: dict[str, Any] = {}

    def begin(self) -> int:
        """Open the study. Returns: as :meth:`left`."""
        self.study = shown(self.folder)
        self.name = self.open.enter_context(working(self.folder))
        return self.left()

    def left(self) -> int:
        """Trials that are not done."""
        done = sum(trial.state.is_finished() for trial in self.study.trials())
        return max(0, self.trials - done)

    def others(self) -> int:
        """Trials that other processes have under way, and may leave."""
        return self.study.others(self.name)

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

        self.study.finish(self.claimed[worker], result, save)
        del self.claimed[worker]

    def fail(self, worker: str, why: str) -> None:
        """Record a broken trial."""
        self.study.fail(self.claimed[worker], why)
        del self.claimed[worker]

    def lost(self, worker: str, why: str) -> bool:
        """Ray gave ``worker`` up; whether it had a trial, which is then a broken one."""
        if worker not in self.claimed:
            return False
        self.fail(worker, f"its worker died {RESTARTS + 1} times, at last of {why}")
        return True


def _answer(asked: Any) -> Any:
    """What the keeper answers. Raises: CheckpointError where it cannot keep the study."""
    try:
        return ray.get(asked)
    except ray.exceptions.RayError as error:
        cause = _cause(error)
        if isinstance(cause, CheckpointError):
            raise cause from error
        raise CheckpointError(
            f"what keeps the study's folder is gone ({reason(cause)}). The study is as it was; go "
            "on with it by the same command."
        ) from error


def _cause(error: Exception) -> Exception:
    """What was raised where a task of Ray's ran."""
    while isinstance(cause := getattr(error, "cause", None), Exception):
        error = cause
    return error


def _absolute(name: str) -> str:
    """A file or folder by its whole path; a hub id as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


class _Told(Callback):  # type: ignore[misc]  # Ray's types are not checked
    """In the driver: tells who watches, and sees to workers that died too often."""

    def __init__(self, study: Study, watch: Watch, keeper: Any) -> None:
        self.study, self.watch, self.keeper = study, watch, keeper
        self.over: DeltaopsError | None = None
        """Why no trial can go on, which ends all of them."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes down what it was asked for, to be gone on with: which here the study is. Who
        watches may be a terminal, which no file holds."""
        return {}

    def on_trial_start(self, *_: Any, **__: Any) -> None:
        """See Ray."""
        self.watch.on_trials(self.study, [])

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        """See Ray."""
        self.watch.on_trials(self.study, [])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """See Ray."""
        why = reason(_cause(trial.get_pickled_error() or trial.get_error()))
        try:
            if not _answer(self.keeper.lost.remote(trial.trial_id, why)):
                # as no other one will
                self.over = ConfigError(f"no worker of Ray's could begin a trial: {why}")
        except CheckpointError as error:
            self.over = error
        self.watch.on_trials(self.study, [])


class _Stop(Stopper):  # type: ignore[misc]  # as above
    """In the driver: ends all where it makes no sense to go on, or who watches says so."""

    def __init__(self, told: _Told) -> None:
        self.told = told

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """See Ray; each trial ends by itself."""
        if STOPPED in result:
            self.told.over = CheckpointError(result[STOPPED])
        return False

    def stop_all(self) -> bool:
        """See Ray."""
        return self.told.over is not None or self.told.watch.should_stop()


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
    try:
        _trial(shop, task, keeper, Settings.of_json(facts["settings"]))
    except CheckpointError as error:  # the study's: no fault of the trial, which goes on later
        tune.report({STOPPED: str(_cause(error))})


def _trial(shop: Workshop, task: Task, keeper: Any, settings: Settings) -> None:
    """Train what the keeper gives. Raises: CheckpointError, the keeper's; Ray's errors."""
    own, place = tune.get_context().get_trial_id(), f"{socket.gethostname()}-{os.getpid()}"
    while (claimed := ray.get(keeper.claim.remote(own, place))) is None:
        if not ray.get(keeper.others.remote()):
            return
        time.sleep(WAIT)  # one of them may die, and leave its trial
    number, candidate = claimed
    try:
        result, handle = train_alone(
            shop, task, candidate, settings.steps, settings.rungs,
            lambda rung, scores: ray.get(keeper.report.remote(own, rung, scores)),
        )  # fmt: skip
        try:
            files = {} if result.pruned else _files(handle)
        finally:
            handle.revert()
    except ray.exceptions.RayError:  # the keeper's: no fault of the trial
        raise
    except Exception as error:  # whatever it breaks, the trial has the reason
        ray.get(keeper.fail.remote(own, reason(error)))
        return
    ray.get(keeper.finish.remote(own, result, files))
    tune.report({"trial": number, **result.scores})


def _files(handle: Handle) -> dict[str, bytes]:
    """What ``handle`` saves, by name."""
    with tempfile.TemporaryDirectory() as folder:
        handle.save(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
