"""Optuna's samplers, drawing from the study's seed and the trial's number alone.

A sampler that kept a state would draw otherwise after a resumption than without one. This one is
made anew for each parameter of each trial, so that a study that was killed and resumed, in one
process at a time, has the same trials as one that ran through.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

GENERATION = 10
"""Trials of NSGA-II's population, and those before TPE and GP begin to learn."""


class Repeatable(BaseSampler):
    """What ``make(seed)`` gives, for a seed of the study's, the trial's and the parameter's."""

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make = make
        self._seed = seed

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """See Optuna."""
        return self._of(trial, "").infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See Optuna. What a process that was killed had drawn for the trial stands: GP would take
        it for that of another, which it keeps away from."""
        drawn = _drawn_before(trial)
        if drawn is not None:
            return drawn
        return self._of(trial, "").sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """See Optuna."""
        made = self._of(trial, param_name)
        return made.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """See Optuna."""
        self._of(trial, "before").before_trial(study, trial)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """See Optuna."""
        self._of(trial, "after").after_trial(study, trial, state, values)

    def _of(self, trial: FrozenTrial, what: str) -> BaseSampler:
        mixed = hashlib.sha256(f"{self._seed}/{trial.number}/{what}".encode()).digest()
        return self._make(int.from_bytes(mixed[:4], "little"))


def _drawn_before(trial: FrozenTrial) -> dict[str, Any] | None:
    """What TPE and GP note in pieces, ``gp:relative_params:0`` and so on, for other processes."""
    pieces = {
        int(key.rpartition(":")[2]): text
        for key, text in trial.system_attrs.items()
        if ":relative_params:" in key
    }
    try:
        found: dict[str, Any] = json.loads("".join(pieces[i] for i in sorted(pieces)))
    except ValueError:  # there are none, or the last is missing
        return None
    return found


def make_sampler(name: str, seed: int) -> BaseSampler:
    """One of :data:`.settings.SAMPLERS`; TPE and GP keep away from trials that are under way."""

    def make(drawn: int) -> BaseSampler:
        if name == "gp":
            return GPSampler(
                seed=drawn, n_startup_trials=GENERATION, warn_independent_sampling=False
            )
        if name == "nsga2":
            return NSGAIISampler(seed=drawn, population_size=GENERATION)
        if name == "random":
            return RandomSampler(seed=drawn)
        return TPESampler(seed=drawn, n_startup_trials=GENERATION, constant_liar=True)

    return Repeatable(make, seed)
