"""What decides the results of a study; one that is gone on with must have the same."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal

from deltaops.errors import ConfigError

GOALS: dict[str, Literal["maximize", "minimize"]] = {
    "accuracy": "maximize",
    "loss": "minimize",
    "parameters": "minimize",
    "seconds": "minimize",
    "memory": "minimize",
}
"""Objective → direction. Accuracy and loss (nats) are of held-out texts; "parameters" those that
train; "seconds" a training step's median; "memory" the bytes that a training step keeps for its
backward pass, with gradients and moments of what trains."""
QUALITY = ("accuracy", "loss")
SAMPLERS = ("tpe", "gp", "nsga2", "random")
PRUNERS = ("auto", "none", "halving", "hyperband")


@dataclass(frozen=True)
class Settings:
    """All but the space. The model and the data are compared by their contents besides."""

    model: str
    data: str
    objectives: tuple[str, ...] = ("accuracy",)
    sampler: str = "tpe"
    pruner: str = "auto"
    steps: int = 200
    rungs: int = 4
    """Evaluations of a trial, evenly apart, the last after its last step."""
    seed: int = 0
    pack: int = 1
    """Trials that train in one batch, at most."""
    starts: tuple[str, ...] = ()
    seq_len: int = 64
    eval_fraction: float = 0.1
    text_column: str = "text"
    label_column: str = "label"
    answers: str | None = None

    def check(self) -> None:
        """Raises: ConfigError, with the nearest names, for a value out of range."""
        if not self.objectives:
            raise ConfigError(f"--objective: none was given. Known: {', '.join(GOALS)}.")
        for goal in self.objectives:
            _known("--objective", goal, tuple(GOALS))
        if len(set(self.objectives)) < len(self.objectives):
            raise ConfigError("--objective: one was given twice. Leave it out.")
        if self.objectives[0] not in QUALITY:
            raise ConfigError(
                f"--objective: the first must be {' or '.join(QUALITY)}, got "
                f"{self.objectives[0]!r}: it decides which of a front is called best."
            )
        _known("--sampler", self.sampler, SAMPLERS)
        _known("--pruner", self.pruner, PRUNERS)
        for name in ("steps", "rungs", "pack", "seq_len"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} must be 1 or more, got {getattr(self, name)}."
                )
        if self.rungs > self.steps:
            raise ConfigError(
                f"--rungs must be at most --steps, got {self.rungs} and {self.steps}."
            )
        if not 0 < self.eval_fraction < 1:
            raise ConfigError(
                f"--eval-fraction must be in (0, 1), got {self.eval_fraction}: trials are judged "
                "by what is held out."
            )
        if len(self.objectives) > 1 and self.pruner not in ("auto", "none"):
            raise ConfigError(
                f"--pruner {self.pruner} compares trials by one number, and {len(self.objectives)} "
                "objectives have a front. Leave one out of the two."
            )
        if self.pack > 1 and {"seconds", "memory"} & set(self.objectives):
            raise ConfigError(
                "--pack: the step of a pack is its members' together, so that none has seconds or "
                "memory of its own. Pass --pack 1, or parameters as the objective."
            )

    @property
    def pruned_by(self) -> str:
        """The pruner, "auto" resolved: hyperband for one objective, none for several."""
        if self.pruner != "auto":
            return self.pruner
        return "hyperband" if len(self.objectives) == 1 else "none"

    def as_json(self) -> dict[str, Any]:
        """Every field."""
        return dataclasses.asdict(self) | {
            "objectives": list(self.objectives), "starts": list(self.starts),
        }  # fmt: skip

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Settings:
        """What :meth:`as_json` wrote."""
        made = dict(value)
        made["objectives"], made["starts"] = tuple(made["objectives"]), tuple(made["starts"])
        return cls(**made)


def _known(option: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise ConfigError(f"{option}: no {name!r}{hint}. Known: {', '.join(known)}.")
