"""Asynchronous successive halving, and Hyperband out of it, by the evaluations on record alone.

Optuna's own mark a trial once they have judged it, so that one whose process is killed between the
mark and its end is judged otherwise when it is resumed. These have no state.

Source: Li et al. 2020 (arXiv 1810.05934), alg. 2; Li et al. 2018 (arXiv 1603.06560) for brackets.
"""

from __future__ import annotations

from optuna import Study
from optuna.pruners import BasePruner, NopPruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

ETA = 2
"""One of so many goes on at each level."""


class Halving(BasePruner):
    """At evaluations 1, 2, 4, … a trial goes on that is among the better half of those before it.

    Bracket b judges from evaluation 2^b on, so that each is gentler than the one before. Half of
    the trials are in bracket 0, half of the rest in bracket 1, and so on.
    """

    def __init__(self, rungs: int, brackets: int) -> None:
        self.rungs = rungs
        self.brackets = brackets

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """By the last evaluation of ``trial``, which is noted in ``study``."""
        step = trial.last_step
        if step is None or step == self.rungs or step not in self._levels(trial.number):
            return False
        bracket = self.bracket(trial.number)
        own = trial.intermediate_values[step]
        others = [
            other.intermediate_values[step]
            for other in study.get_trials(deepcopy=False)
            if other.number < trial.number  # those after it may be on record where it is resumed
            and step in other.intermediate_values
            and self.bracket(other.number) == bracket
        ]
        most = study.direction == StudyDirection.MAXIMIZE
        better = sum(value > own if most else value < own for value in others)
        return better >= max(1, (len(others) + 1) // ETA)

    def bracket(self, number: int) -> int:
        """That of a trial: the factors of two in its place in the row, at most the last."""
        place = number + 1
        return min((place & -place).bit_length() - 1, self.brackets - 1)

    def _levels(self, number: int) -> list[int]:
        return [ETA**k for k in range(self.bracket(number), self.rungs.bit_length())]


def make_pruner(name: str, rungs: int) -> BasePruner:
    """Hyperband, successive halving or none, over ``rungs`` evaluations of a trial."""
    if name == "none":
        return NopPruner()
    return Halving(rungs, rungs.bit_length() if name == "hyperband" else 1)
