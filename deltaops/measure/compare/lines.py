"""A line of the table: what decides it, what each seed's run gave, and what a step takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

from deltaops.measure.cell import Cell
from deltaops.tuning.sentence import SCALE

from .contenders import HEAD_RATE
from .reader import NAMED, TRAINED

ACCURACY, TIME = "accuracy", "time"
"""The halves of a line, each of which has a run of its own."""


@dataclass(frozen=True)
class Settings:
    """What decides the bits of every result, beside a run's seed; results with other settings are
    no table."""

    model: str
    train: str
    test: str | None
    steps: int
    batch_size: int = 32
    seq_len: int = 32
    head: str = TRAINED
    """As files say that were written before there was another."""
    head_rate: float | None = HEAD_RATE
    """Peak learning rate of a trained head beside anything else that trains."""
    scale: float | None = None
    """Of a named head's cosines, before the softmax."""
    texts: str = ""
    """A hash of all tokens and labels, of training and test: names alone say little."""
    encoder: str = ""
    """A hash of the encoder's weights."""
    few_shot: int | None = None
    """Training texts of each label, drawn by the seed; None for all."""
    parameters: int | None = None
    """What each method is sized to train; None for the sizes that it has."""


HEADS: dict[str, dict[str, Any]] = {
    NAMED: {"head": NAMED, "head_rate": None, "scale": SCALE},
    TRAINED: {"head": TRAINED, "head_rate": HEAD_RATE, "scale": None},
}
"""Head → what the settings say of it."""


@dataclass(frozen=True)
class Learned:
    """How a contender did after all steps: of one seed, or the means of several."""

    accuracy: float
    """On the test texts, as a share."""
    loss: float
    """The same, mean, in nats."""
    training_loss: float | None
    """Of the last step; equal bits for equal seeds. None where nothing trains."""
    examples: int
    """Test texts."""
    rate: float
    why: str
    seconds: float
    """Of all steps, with the batches' own lengths."""
    tried: dict[str, float | None]
    """Learning rate → accuracy on held-out training texts, None where the loss was no longer
    finite; empty where none was looked for."""
    trained: int | None = None
    """Parameters of the delta after the last step, where what steers it changed their number."""


@dataclass(frozen=True)
class Means(Learned):
    """Of one seed or more."""

    spread: float | None = None
    """Standard deviation of the accuracy over the seeds, as a share; None of one."""
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Record:
    """One line of the table, of which either half may be missing."""

    name: str
    title: str
    settings: str
    trained: int
    """Parameters of the delta, or of the encoder; the head's are not among them."""
    head: int
    total: int
    """Of the encoder."""
    runs: dict[int, Learned] = field(default_factory=dict)
    """By seed."""
    timed: Cell | None = None
    state: dict[str, int] | None = None
    """Peer → bytes of gradients and of the optimizer's moments, head included."""
    failed: dict[str, str] = field(default_factory=dict)
    """:data:`ACCURACY` or :data:`TIME` → what stopped it: the gate's message, or a loss that is no
    longer finite."""
    made: dict[str, dict[str, str]] = field(default_factory=dict)
    """The same → command, date and versions of the last run that measured it."""

    @property
    def learned(self) -> Means | None:
        """The means over the seeds; None without a run."""
        return means(self.runs)

    def as_json(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)

    @classmethod
    def of_json(cls, value: Mapping[str, Any], seed: int = 0) -> Record:
        """What :meth:`as_json` wrote, or a file of before, whose one run was of ``seed``."""
        found = dict(value)
        timed, failed = found["timed"], found["failed"]
        runs = found.pop("runs", {})
        learned = found.pop("learned", None)
        if learned is not None:
            runs = {seed: learned}
        if isinstance(failed, str):  # as files say that were written before it was told by half
            failed = {TIME if runs else ACCURACY: failed} if failed else {}
        return cls(
            **{
                **found,
                "failed": failed,
                "runs": {int(of): Learned(**run) for of, run in runs.items()},
                "timed": None if timed is None else Cell.of_json(timed),
            }
        )

    def updated(self, old: Record | None) -> Record:
        """This record, with the half from an older one that had no run now, and its other seeds'.

        What another learning rate gave is of no mean with this, and left out.
        """
        if old is None or old.settings != self.settings:
            return self
        learning = bool(self.runs) or ACCURACY in self.failed
        timing = self.timed is not None or TIME in self.failed
        kept = {half for half, ran in ((ACCURACY, learning), (TIME, timing)) if not ran}
        runs = self.runs if learning else old.runs
        if self.runs:
            rate = next(iter(self.runs.values())).rate
            same = {seed: run for seed, run in old.runs.items() if run.rate == rate}
            runs = dict(sorted({**same, **self.runs}.items()))
        return replace(
            self,
            runs=runs,
            timed=self.timed if timing else old.timed,
            state=self.state if timing else old.state,
            failed={**{h: why for h, why in old.failed.items() if h in kept}, **self.failed},
            made={**{h: run for h, run in old.made.items() if h in kept}, **self.made},
        )


def means(runs: Mapping[int, Learned]) -> Means | None:
    """Of all that differs from seed to seed; rates were tried by one of them; the rest is that of
    the first. None without a run."""
    if not runs:
        return None
    all_runs = list(runs.values())
    first = all_runs[0]
    losses = [run.training_loss for run in all_runs if run.training_loss is not None]
    counts = [run.trained for run in all_runs if run.trained is not None]
    accuracies = [run.accuracy for run in all_runs]
    return Means(
        **{
            **asdict(first),
            "accuracy": fmean(accuracies),
            "loss": fmean(run.loss for run in all_runs),
            "training_loss": fmean(losses) if losses else None,
            "seconds": fmean(run.seconds for run in all_runs),
            "trained": round(fmean(counts)) if counts else None,
            "tried": next((run.tried for run in all_runs if run.tried), {}),
        },
        spread=stdev(accuracies) if len(all_runs) > 1 else None,
        seeds=tuple(runs),
    )
