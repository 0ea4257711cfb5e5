"""A study in a folder: who does which trial, what came of it, and what survives a kill.

out/study.json       settings, the space, and hashes of the model and the data
out/journal.log      Optuna's journal: every parameter, evaluation and result
out/workers/         a lock for each process that is at work; see :mod:`.workers`
out/trials/0007/     the adapter of a trial on the front
out/best/            the best one: adapter, trial.json, and space.yaml that makes it again
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from deltaops.errors import CheckpointError, ConfigError
from deltaops.files import MARK, locked, publishing, remove_leftovers, write_json
from deltaops.strategy.features import Task as Texts
from deltaops.tuning.workshop import Task, Workshop

from .candidate import Candidate
from .journal import Journal
from .pruners import make_pruner
from .ranges import Range, label
from .samplers import make_sampler
from .settings import GOALS, Settings
from .space import Space, read_space
from .starts import params_of, resolved
from .trainer import Result
from .workers import alive

FACTS, JOURNAL, TRIALS, BEST, TRIAL = "study.json", "journal.log", "trials", "best", "trial.json"
TESTED = "test.json"
NAME = "search"
VERSION = 1
WORKER, REASON, RESULT, CANDIDATE = "worker", "reason", "result", "candidate"
ALONE = "alone"
"""Attributes of a trial."""
DONE = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class Study:
    """Trials on disk. Any number of processes may have the same one open."""

    def __init__(self, folder: Path, settings: Settings, space: Space) -> None:
        """Open the journal in ``folder``, or begin it in an empty file. Raises: CheckpointError."""
        if not (folder / JOURNAL).is_file():
            raise CheckpointError(
                f"{folder / JOURNAL} is missing, and every trial with it. Take it out of a backup, "
                "or begin in another folder."
            )
        self.folder = folder
        self.settings = settings
        self.space = space
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna = optuna.create_study(
            storage=JournalStorage(Journal(folder / JOURNAL)),
            study_name=NAME,
            load_if_exists=True,
            directions=[GOALS[goal] for goal in settings.objectives],
            sampler=make_sampler(settings.sampler, settings.seed),
            pruner=make_pruner(settings.pruned_by, settings.rungs),
        )

    # ------------------------------------------------------------------------------- who does what

    def claim(self, worker: str, trials: int, room: int) -> list[Trial]:
        """Up to ``room`` trials for this process: first those of processes that are dead, by their
        own numbers and with what they had drawn; then new ones, until there are ``trials`` of them.

        Numbers n·room to n·room + room − 1 go together, after a kill as before.
        """
        with self.one_at_a_time():
            orphans = self._orphans()
            begun = len(self.optuna.get_trials(deepcopy=False, states=(*DONE, TrialState.RUNNING)))
            block = (orphans[0].number if orphans else begun) // room
            found = [self._take(t, worker) for t in orphans if t.number // room == block]
            while begun // room == block and begun < trials:
                trial = self.optuna.ask()
                trial.set_user_attr(WORKER, worker)
                found.append(trial)
                begun += 1
            return found

    @property
    def wanted(self) -> int:
        """How many trials it was last asked for."""
        return int(self.optuna.user_attrs.get(TRIALS, 0))

    def want(self, trials: int) -> None:
        """Note how many trials it is asked for, so that a resumption knows."""
        if trials != self.wanted:
            self.optuna.set_user_attr(TRIALS, trials)

    def others(self, worker: str) -> int:
        """Trials that other processes have under way, which live."""
        running = self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return sum(trial.user_attrs.get(WORKER) != worker for trial in running)

    def _orphans(self) -> list[FrozenTrial]:
        running = self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        # one that was killed between ask and its name's journal line has no worker at all
        return [
            trial
            for trial in running
            if WORKER not in trial.user_attrs or not alive(self.folder, trial.user_attrs[WORKER])
        ]

    def _take(self, frozen: FrozenTrial, worker: str) -> Trial:
        trial = Trial(self.optuna, frozen._trial_id)
        trial.set_user_attr(WORKER, worker)
        return trial

    def begin(self, starts: Sequence[str]) -> None:
        """Queue the start points, once."""
        wanted = [params_of(self.space, start) for start in starts]
        with self.one_at_a_time():
            queued = [
                trial.system_attrs.get("fixed_params")
                for trial in self.optuna.get_trials(deepcopy=False)
            ]
            for params in wanted:
                if params not in queued:
                    self.optuna.enqueue_trial(params)

    # --------------------------------------------------------------------------------- one trial

    def candidate(self, trial: Trial) -> Candidate:
        """What the trial's parameters are, drawn now where they were not yet."""

        def pick(name: str, allowed: Range) -> Any:
            if allowed.choices is not None:
                return trial.suggest_categorical(name, allowed.labels)
            low, high, step = allowed.low, allowed.high, allowed.step
            if allowed.whole:
                whole = 1 if step is None else int(step)
                return trial.suggest_int(name, int(low), int(high), step=whole, log=allowed.log)
            return trial.suggest_float(name, low, high, step=step, log=allowed.log)

        found = self.space.draw(pick)
        trial.set_user_attr(CANDIDATE, str(found))
        return found

    def report(self, trial: Trial, rung: int, scores: Mapping[str, float]) -> bool:
        """Note an evaluation; whether the trial is worth going on by the pruner's judgement.

        It goes by the held-out loss, whatever the objective. What a killed process had noted is not
        noted again: it is the same, and is judged by what the other trials had.
        """
        if len(self.settings.objectives) > 1:
            return True
        frozen = self.optuna._storage.get_trial(trial._trial_id)
        if rung not in frozen.intermediate_values:
            most = GOALS[self.settings.objectives[0]] == "maximize"
            trial.report(-scores["loss"] if most else scores["loss"], rung)
            frozen = self.optuna._storage.get_trial(trial._trial_id)
        until = {step: v for step, v in frozen.intermediate_values.items() if step <= rung}
        seen = copy.copy(frozen)
        seen.intermediate_values = until
        return not self.optuna.pruner.prune(self.optuna, seen)

    def finish(self, trial: Trial, result: Result, save: Callable[[Path], object]) -> None:
        """Keep the adapter where the trial is on the front, then tell what it found.

        save: writes the adapter into a folder.
        """
        if result.pruned:
            self._note(trial, result)
            self.optuna.tell(trial, state=TrialState.PRUNED)
            return
        values = [result.value(goal) for goal in self.settings.objectives]
        with self.one_at_a_time():  # or who settles meanwhile would take the adapter for a loser's
            if not any(self._better(other.values, values) for other in self.complete()):
                folder = self.adapter(trial.number)
                with publishing(folder, TRIAL) as scratch:
                    save(scratch)
                    write_json(scratch / TRIAL, self._facts(trial, result))
            self._note(trial, result)
            self.optuna.tell(trial, values)
            self._settle()

    def note_alone(self, trial: Trial, reason: str) -> None:
        """Record why a trial has no part in a pack."""
        trial.set_user_attr(ALONE, reason)

    def fail(self, trial: Trial, reason: str) -> None:
        """Record a broken trial; the search goes on."""
        trial.set_user_attr(REASON, reason)
        self.optuna.tell(trial, state=TrialState.FAIL)

    def _note(self, trial: Trial, result: Result) -> None:
        trial.set_user_attr(RESULT, dataclasses.asdict(result))

    def _facts(self, trial: Trial, result: Result) -> dict[str, Any]:
        return {
            "trial": trial.number,
            "candidate": trial.user_attrs[CANDIDATE],
            "parameters": trial.params,
            "result": dataclasses.asdict(result),
        }

    # ------------------------------------------------------------------------------- the results

    def trials(self) -> list[FrozenTrial]:
        """All, by number; those queued are not begun."""
        return self.optuna.get_trials(deepcopy=False)

    def complete(self) -> list[FrozenTrial]:
        """Those that were trained to the end."""
        return self.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def front(self) -> list[FrozenTrial]:
        """The complete ones that no other is better than in everything, best first."""
        found = self.complete()
        kept = [t for t in found if not any(self._better(o.values, t.values) for o in found)]
        sign = -1 if GOALS[self.settings.objectives[0]] == "maximize" else 1
        return sorted(kept, key=lambda t: (sign * t.values[0], t.number))

    def best(self) -> FrozenTrial | None:
        """The front's first by the first objective; the earliest of equals."""
        front = self.front()
        return front[0] if front else None

    def adapter(self, number: int) -> Path:
        """Where the trial's adapter is, if it is on the front."""
        return self.folder / TRIALS / f"{number:04d}"

    def settle(self) -> None:
        """Have ``best/`` be the best trial's, keep the adapters of the front alone, and delete what
        killed processes were writing."""
        with self.one_at_a_time():
            self._settle()

    def _settle(self) -> None:
        front = self.front()
        if front:
            best = front[0]
            if best_number(self.folder) != best.number:
                self._publish(best)
            self._tidy(best)
            kept = {f"{trial.number:04d}" for trial in front}
            busy = {f"{t.number:04d}" for t in self.trials() if t.state == TrialState.RUNNING}
            for folder in (self.folder / TRIALS).glob("*"):
                if folder.name.isdigit() and folder.name not in kept | busy:
                    shutil.rmtree(folder)
        for folder in (self.folder, self.folder / TRIALS):
            remove_leftovers(folder)

    def copy(self, number: int, out: Path) -> None:
        """Copy the adapter of a trial on the front to a new folder; that of the best with the
        command that makes it again. Raises: CheckpointError."""
        with self.one_at_a_time():
            self._settle()  # one that was killed before it did left an older best
            best = number == best_number(self.folder)
            source = self.folder / BEST if best else self._whole(number)
            with publishing(out, TRIAL) as scratch:
                for file in source.iterdir():
                    shutil.copy2(file, scratch / file.name)

    def _whole(self, number: int) -> Path:
        """The adapter of a trial on the front. Raises: CheckpointError."""
        source = self.adapter(number)
        if not (source / TRIAL).is_file():
            raise CheckpointError(
                f"{source}: the adapter of trial {number} is missing. Put the folder back."
            )
        return source

    def _publish(self, best: FrozenTrial) -> None:
        import yaml

        source = self._whole(best.number)
        target = self.folder / BEST
        with publishing(target, TRIAL) as scratch:
            for file in source.iterdir():
                shutil.copy2(file, scratch / file.name)
            (target / TESTED).unlink(missing_ok=True)  # it was of the best before
            text = yaml.safe_dump(self.fixed(best), sort_keys=False, allow_unicode=True)
            (scratch / "space.yaml").write_text(text, encoding="utf-8")
            command = self.command(target / "space.yaml")
            (scratch / "reproduce.txt").write_text(command + "\n", encoding="utf-8")

    def _tidy(self, best: FrozenTrial) -> None:
        """Delete what is left in ``best/`` of an adapter of the other format."""
        source = self.adapter(best.number)
        if not source.is_dir():
            return
        names = {file.name for file in source.iterdir()} | {"space.yaml", "reproduce.txt", TESTED}
        for file in (self.folder / BEST).iterdir():
            if file.name not in names:
                file.unlink()

    def fixed(self, trial: FrozenTrial) -> dict[str, Any]:
        """The space that holds this trial's candidate alone, as a mapping."""
        text = json.loads(json.dumps(self.space.text))
        only = trial.params.get("delta", next(iter(self.space.entries)))
        entry = text["deltas"][only]
        found: dict[str, Any] = {"delta": str(entry.get("delta", only))}
        values: dict[str, Any] = {}
        for option, allowed in self.space.entries[only].ranges.items():
            if any(label(values.get(name)) not in those for name, those in allowed.when):
                continue
            value = allowed.draw(f"{only}/{option}", lambda name, _: trial.params[name])
            if allowed.of is not None:
                value = value * values[allowed.of]
            values[option] = value
            # a list in a list: one choice that is a list
            found[option] = [list(value)] if isinstance(value, list | tuple) else value
        common = {
            name: getattr(self.space, name).draw(name, lambda n, _: trial.params[n])
            for name in ("batch_size", "schedule", "warmup")
        }
        return {"deltas": {only: found}, **common}

    def command(self, space: Path) -> str:
        """What trains the only candidate of ``space`` as this study did."""
        settings = self.settings
        named = [
            ("--model", settings.model), ("--data", settings.data), ("--space", space),
            ("--trials", 1), ("--steps", settings.steps), ("--rungs", settings.rungs),
            ("--seed", settings.seed), ("--seq-len", settings.seq_len),
            ("--eval-fraction", settings.eval_fraction), ("--text-column", settings.text_column),
            ("--label-column", settings.label_column), ("--pack", settings.pack),
            *(("--objective", goal) for goal in settings.objectives),
        ]  # fmt: skip
        if settings.answers is not None:
            named.append(("--answers", settings.answers))
        words = [str(word) for pair in (*named, ("--out", "again")) for word in pair]
        return shlex.join(["deltaops", "search", *words])

    def _better(self, one: Sequence[float], other: Sequence[float]) -> bool:
        """Whether ``one`` is better in something and worse in nothing."""
        signs = [1 if GOALS[goal] == "minimize" else -1 for goal in self.settings.objectives]
        gaps = [s * (a - b) for s, a, b in zip(signs, one, other, strict=True)]
        return max(gaps) <= 0 and min(gaps) < 0

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Inside, no other process claims trials, ends one or writes results beside the study."""
        with locked(self.folder / FACTS):
            yield


def best_number(folder: Path) -> int | None:
    """The trial whose adapter ``best/`` is."""
    path = folder / BEST / TRIAL
    if not path.is_file():
        return None
    return int(json.loads(path.read_text(encoding="utf-8"))["trial"])


def create(folder: Path, settings: Settings, space: Space, shop: Workshop, task: Task) -> Study:
    """A study in a folder that is empty, or has the very same one.

    Raises: ConfigError where another one is there; CheckpointError where nothing can be written.
    """
    facts = _facts_of(settings, space, shop, task)
    if not (folder / FACTS).is_file():  # before anything is written
        facts["starts"] = resolved(
            settings.starts, space, shop.model, lambda: _texts(shop, settings)
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"--out {folder} cannot be made: {error.strerror}. Choose another folder."
        ) from error
    with locked(folder / FACTS):
        if (folder / FACTS).is_file():
            _check_same(folder, read_facts(folder), facts)
        elif any(_foreign(path.name) for path in folder.iterdir()):
            (folder / f"{FACTS}.lock").unlink()
            raise ConfigError(
                f"--out {folder} is not empty, and has no study. Choose another folder."
            )
        else:
            (folder / JOURNAL).touch()  # first: a study without one has lost it
            write_json(folder / FACTS, facts)
    study = Study(folder, settings, space)
    study.begin(read_facts(folder)["starts"])
    return study


def _texts(shop: Workshop, settings: Settings) -> Texts:
    examples = shop.examples("data", settings.data)
    labels = [str(example.label) for example in examples]
    return Texts([e.text for e in examples], shop.tokenizer, labels, settings.seq_len)


def reopen(folder: Path) -> tuple[Settings, Space]:
    """What a study's folder says of it, the space not yet resolved on the model.

    Raises: CheckpointError.
    """
    facts = read_facts(folder)
    return Settings.of_json(facts["settings"]), read_space(facts["space"])


def shown(folder: Path) -> Study:
    """The study in ``folder``, to look at: no model is loaded. Raises: CheckpointError."""
    settings, space = reopen(folder)
    layers = read_facts(folder)["layers"]
    entries = {
        title: dataclasses.replace(
            entry,
            ranges={o: r.resolved(layers, f"space: {title}: {o}") for o, r in entry.ranges.items()},
        )
        for title, entry in space.entries.items()
    }
    return Study(folder, settings, dataclasses.replace(space, entries=entries))


def read_facts(folder: Path) -> dict[str, Any]:
    """``study.json``. Raises: CheckpointError."""
    path = folder / FACTS
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no study ({FACTS} is missing). Name the --out of `deltaops search`."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. Take it out of a backup."
        ) from error
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is not of this deltaops' version {VERSION}. Go on with the one that wrote it."
        )
    return found


def _foreign(name: str) -> bool:
    """Whether a file is none that a study begins with, or was killed over."""
    return name not in (f"{FACTS}.lock", JOURNAL) and not name.startswith(MARK)


def _facts_of(settings: Settings, space: Space, shop: Workshop, task: Task) -> dict[str, Any]:
    found = {
        "version": VERSION,
        "settings": settings.as_json(),
        "space": space.text,
        "layers": getattr(shop.model.config, "num_hidden_layers", None),
        "model": shop.fingerprint,
        "data": task.fingerprint,
    }
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]  # what comes out of a file


def _check_same(folder: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises: ConfigError that names what differs."""
    odd = [name for name in ("space", "model", "data") if was[name] != now[name]]
    told = [f"another {name}" for name in odd]
    for name, value in now["settings"].items():
        before = was["settings"].get(name)
        if before != value and name not in odd:
            told.append(f"{name}={before!r} and not {value!r}")
    if told:
        raise ConfigError(
            f"--out {folder} has a study of {', '.join(told)}. Go on with it by `deltaops search "
            f"resume {folder}`, or choose another folder."
        )
