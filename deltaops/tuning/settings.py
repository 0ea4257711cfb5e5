"""What a tuning run was asked to do, as a value that goes into its files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, ConfigError

TASKS = ("causal-lm", "classification")


@dataclass(frozen=True)
class Settings:
    """All that decides the result of a run.

    Attributes:
        model: local folder or hub id.
        data: JSONL, CSV or text file, or a name of the ``datasets`` library.
        task: one of :data:`TASKS`.
        delta: as :func:`deltaops.tuning.spec.parse_delta` reads it.
        steps: optimizer steps; None counts ``epochs``.
        lr: peak learning rate.
        seq_len: tokens in a block, or the longest example.
        eval_fraction: part of the data that is held out, in [0, 1).
        save_every: steps between checkpoints.
    Raises: ConfigError for a value out of range.
    """

    model: str
    data: str
    task: str = "causal-lm"
    delta: str = "lora:r=16,alpha=32"
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    lr: float = 2e-4
    seq_len: int = 128
    seed: int = 0
    text_column: str = "text"
    label_column: str = "label"
    eval_fraction: float = 0.1
    save_every: int = 100
    dtype: str = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        """Check every value."""
        if self.task not in TASKS:
            raise ConfigError(f"--task must be one of {', '.join(TASKS)}, got {self.task!r}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"--dtype must be float32 or bfloat16, got {self.dtype!r}.")
        for name, least in (("batch_size", 1), ("seq_len", 2), ("save_every", 1), ("steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} must be ≥ {least}, got {value}.")
        for name in ("lr", "epochs"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"--{name} must be above 0, got {getattr(self, name)}.")
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"--eval-fraction must be in [0, 1), got {self.eval_fraction}.")

    def to_json(self) -> dict[str, Any]:
        """Field → value."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, facts: Any) -> Settings:
        """Settings out of a state file. Raises: CheckpointError."""
        try:
            return cls(**facts)
        except (TypeError, ConfigError) as error:
            raise CheckpointError(
                f"the training state has settings that this deltaops does not read: {error}"
            ) from error
