"""What a run looks like, kept as a table: losses, gradients, ranks of updates, time and memory.

quantity         of                           what
loss             the run                      training loss of the step, as the loop has it
eval_<name>      the run                      metric of an evaluation
gradient_norm    run, part, place             ‖g‖ before clipping
gradient_noise   run, part, place             noise scale in batches of the run: see :mod:`.noise`
effective_rank   part, place                  of LoRA's update, see :mod:`.effective_rank`; of a
                                              part, the mean over its places
seconds          the run                      of a step, mean since the last row; in the file only
memory           the run                      peak in MiB, of device or process; in the file only

A number that is not defined (all gradients zero, only one seen) or not finite has no row.
"""

from __future__ import annotations

import csv
import io
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaops.errors import CheckpointError, ConfigError
from deltaops.files import write_atomically

from .effective_rank import effective_ranks
from .noise import Name, Noise, groups
from .parts import Action, Run
from .table import COLUMNS, Row, Table

CLOCKS = ("seconds", "memory")
"""Quantities that no decision may go by: another run has others."""
WHOLE = "modules_to_save"
"""The name of what is trained whole, beside the parts of the handle."""


class Monitor:
    """Fills ``Run.table``, which parts after it go by; ``path`` has the same and the clocks."""

    watches = True

    def __init__(
        self,
        every: int = 10,
        *,
        path: str | os.PathLike[str] | None = None,
        places: bool = True,
        noise: bool = True,
        rank: bool = True,
        name: str = "monitor",
    ) -> None:
        """What to watch.

        Args:
            every: steps between rows; the first step has some, too. Evaluations have theirs always.
            path: of a CSV file, which must be new, or that of the run that is resumed.
            places: rows of each place as well.
            noise: measure the gradients' noise; keeps a copy of one step's gradients.
            rank: measure effective ranks.
            name: of the part.
        Raises: ConfigError.
        """
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"Monitor: every must be 1 or more steps, got {every!r}.")
        self.every, self.places, self.rank, self.name = every, places, rank, name
        self.path = None if path is None else Path(path)
        self.clocks = Table()
        """Seconds and memory, of this process."""
        self._noise = Noise() if noise else None
        self._table = Table()
        self._began: tuple[int, float] | None = None
        self._waiting: list[Row] = []
        """Rows that the file could not take; they come before the next ones."""
        self._trouble: str | None = None
        """Why, until the controller has been told."""

    def __repr__(self) -> str:
        """Without the file's name, which decides nothing."""
        return (
            f"Monitor(every={self.every}, places={self.places}, noise={self._noise is not None}, "
            f"rank={self.rank})"
        )

    def table(self) -> list[Row]:
        """All rows by step, without the clocks."""
        return list(self._table.rows())

    def draw(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write pictures of the table; see :mod:`.pictures`. Returns: their files."""
        from .pictures import draw

        return draw(self._table, Path(folder))

    # --------------------------------------------------------------------------- as a part

    def begin(self, run: Run) -> Iterable[Action]:
        """Raises: ConfigError where the file is that of another run."""
        self._table, self.clocks, self._began = run.table, Table(), None
        self._noise = None if self._noise is None else Noise()
        self._waiting, self._trouble = [], None
        if self.path is not None:
            if self.path.exists() and self.path.stat().st_size:
                raise ConfigError(
                    f"Monitor: path={self.path} is the table of another run. Name another file, or "
                    "delete that one."
                )
        return ()

    def after_backward(self, run: Run) -> Iterable[Action]:
        """See :meth:`Part.after_backward`."""
        step, noise = run.step + 1, self._noise
        due = self._due(step)
        if due and run.loss is not None:
            self._add(run, step, [("loss", "", "", run.loss)])
        next_due = noise is not None and self._due(step + 1)
        if not due and not next_due:
            return ()
        gradients = gradients_of(run)
        if due:
            self._add(run, step, self._norms(gradients, run.clipped))
        if noise is not None:
            if due:
                found = noise.measure(gradients, run.clipped)
                self._add(run, step, [("gradient_noise", *k, v) for k, v in self._kept(found)])
            noise.keep(gradients if next_due else {}, run.clipped)
        return self._told()

    def after_step(self, run: Run) -> Iterable[Action]:
        """See :meth:`Part.after_step`."""
        if not self._due(run.step):
            return ()
        if self.rank:
            found = effective_ranks(run.handle)
            self._add(run, run.step, [("effective_rank", *k, v) for k, v in self._kept(found)])
        self._tell_clocks(run)
        return self._told()

    def after_evaluation(self, run: Run) -> Iterable[Action]:
        """See :meth:`Part.after_evaluation`."""
        self._add(run, run.step, [(f"eval_{k}", "", "", v) for k, v in run.metrics.items()])
        return self._told()

    def close(self, run: Run) -> Iterable[Action]:
        """Write what waits. Raises: CheckpointError where the file still takes nothing."""
        self._write(())
        if self._waiting:
            raise CheckpointError(
                f"Monitor: path={self.path} cannot be written, and lacks {len(self._waiting)} rows "
                "of this run, which table() has. Free space, and write them from there."
            )
        return ()

    def state(self) -> dict[str, Any]:
        """See :meth:`Part.state`."""
        noise = None if self._noise is None else self._noise.state()
        return {"table": self._table.state(), "noise": noise}

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`Part.tensors`."""
        kept = {} if self._noise is None else self._noise.tensors()
        table = {f"table/{key}": tensor for key, tensor in self._table.tensors().items()}
        return table | {f"noise/{key}": tensor for key, tensor in kept.items()}

    def resume(self, run: Run) -> None:
        """Write on in the run's table and file; what came after the checkpoint is dropped.

        Raises: CheckpointError where the file is that of another run.
        """
        run.table, self.clocks, self._began = self._table, Table(), None
        self._waiting, self._trouble = [], None
        if self.path is None:
            return
        rows = list(self._table.rows())
        if self.path.exists():
            there, last = read_rows(self.path), run.step
            known = {_lines([row]) for row in rows}
            before = [r for r in there if r.quantity not in CLOCKS and r.step < last]
            if not all(_lines([row]) in known for row in before):
                raise CheckpointError(
                    f"Monitor: path={self.path} is the table of another run than that which is "
                    "resumed. Name the file that this run wrote, or a new one."
                )
            clocks = [r for r in there if r.quantity in CLOCKS and r.step <= last]
            rows = sorted([*rows, *clocks], key=lambda row: row.step)
        self._rewrite(rows)

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """See :meth:`Part.restore`."""
        parts: dict[str, dict[str, Tensor]] = {"table": {}, "noise": {}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            parts[kind][name] = tensor
        self._table.restore(state["table"], parts["table"])
        if self._noise is not None:
            self._noise.restore(state["noise"], parts["noise"])

    # ------------------------------------------------------------------------------ details

    def _due(self, step: int) -> bool:
        return step == 1 or step % self.every == 0

    def _kept(self, found: Mapping[tuple[str, str], float]) -> list[tuple[tuple[str, str], float]]:
        return [(key, value) for key, value in found.items() if self.places or not key[1]]

    def _norms(
        self, gradients: Mapping[Name, Tensor], clipped: float
    ) -> list[tuple[str, str, str, float]]:
        """‖g‖ of each place, each part, and the run."""
        if not gradients:
            return []
        found = torch._foreach_norm(list(gradients.values()), 2, torch.float32)
        norms = torch.stack(
            [norm.to(found[0].device) for norm in found]
        )  # layers may lie on several
        squares: dict[tuple[str, str], float] = {}
        for name, norm in zip(gradients, norms.tolist(), strict=True):
            for key in groups(name):
                squares[key] = squares.get(key, 0.0) + (norm / clipped) ** 2
        kept = self._kept(squares)
        return [("gradient_norm", *key, v**0.5) for key, v in kept if math.isfinite(v)]

    def _add(self, run: Run, step: int, rows: Iterable[tuple[str, str, str, float]]) -> None:
        made = [run.table.add(step, q, v, delta=d, place=p) for q, d, p, v in rows]
        self._write(made)

    def _tell_clocks(self, run: Run) -> None:
        now = time.perf_counter()
        rows = [self.clocks.add(run.step, "memory", peak_memory(run.model))]
        if self._began is not None and run.step > self._began[0]:
            seconds = (now - self._began[1]) / (run.step - self._began[0])
            rows.append(self.clocks.add(run.step, "seconds", seconds))
        self._began = (run.step, now)
        self._write(rows)

    def _write(self, rows: Iterable[Row]) -> None:
        """Append rows, after those that wait; all of them wait where the file takes no more."""
        if self.path is None:
            return
        rows = [*self._waiting, *rows]
        size: int | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                size = file.tell()
                file.write(_lines(rows if size else [COLUMNS, *rows]).encode())
        except OSError as error:
            if size is not None:  # a disk that fills up takes a part of a line first
                os.truncate(self.path, size)
            if not self._waiting:
                self._trouble = error.strerror or str(error)
            self._waiting = rows
        else:
            self._waiting = []

    def _told(self) -> Iterable[Action]:
        """For the log, once each time that the file begins to take nothing."""
        if self._trouble is None:
            return ()
        reason = (
            f"path={self.path} cannot be written: {self._trouble}; rows wait in memory, and are "
            "tried again with the next ones"
        )
        self._trouble = None
        return (Action("left alone", "", reason),)

    def _rewrite(self, rows: Iterable[Row]) -> None:
        assert self.path is not None
        text = _lines([COLUMNS, *rows])
        write_atomically(
            self.path, lambda part: part.write_text(text, encoding="utf-8", newline="")
        )


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a monitor's file; a last line that was cut off is left out.

    Raises: CheckpointError for a file that is none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        whole = io.StringIO(text[: text.rfind("\n") + 1])
        head, *lines = list(csv.reader(whole)) or [list(COLUMNS)]
        if tuple(head) != COLUMNS:
            raise ValueError(f"its columns are {', '.join(head)}")
        return [Row(int(s), quantity, d, p, float(v)) for s, quantity, d, p, v in lines]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a monitor's table: {error}.") from error


def gradients_of(run: Run) -> dict[Name, Tensor]:
    """Part, place and suffix → gradient, of what has one."""
    found: dict[Name, Tensor] = {}
    for site, tensors in run.handle.by_place().items():
        for suffix, parameter in tensors.items():
            if parameter.grad is not None:
                found[site.part or run.handle.name, site.path, suffix] = parameter.grad
    for path, module in run.handle.saved().items():
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                found[WHOLE, path, name] = parameter.grad
    return found


def peak_memory(model: torch.nn.Module) -> float:
    """Peak in MiB: of the device that has the model, of the process on a CPU."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows has none
        return float("nan")
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _lines(rows: Iterable[Iterable[Any]]) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()
