"""Deltas chosen as training runs: the controller asks its parts at each moment of a run.

    controller = Controller([Monitor(every=10), Policy(When(plateau(20), freeze("lora")))])
    controller.begin(handle, optimizer)           # a Trainer: callbacks=[controller.callback()]
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        controller.after_backward(loss)           # before the optimizer's step, and clipping
        optimizer.step()
        optimizer.zero_grad()
        controller.after_step()

A part that raises is switched off, what it had changed is undone, and training goes on; the log,
``handle.history`` and :meth:`Controller.report` say so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaops.errors import AttachError, CheckpointError, ConfigError
from deltaops.surgery import Handle, handle_of

from .form import Form
from .journal import Journal
from .parts import Action, Part, Run
from .saved import FILE, read_state, state_of, write_state
from .snapshot import Objects, Snapshot

_METHODS = (
    "begin", "after_backward", "after_step", "after_evaluation", "state", "tensors", "restore",
)  # fmt: skip
_TIMES = ("runtime", "per_second", "preparation_time")
"""How Trainer's metrics end that are clocks; nothing may be decided by those."""
VERSION = 1
_NAME = "controller"
"""What it calls itself in the log."""


class Controller:
    """Parts that steer one run, its log and its state."""

    def __init__(
        self,
        parts: Sequence[Part | str],
        *,
        seed: int = 0,
        log: str | os.PathLike[str] | None = None,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
        evaluate_every: int = 0,
    ) -> None:
        """What steers, before there is a run.

        Args:
            parts: asked in this order, so that a monitor stands before what goes by it; also
                their names in :data:`deltaops.strategy.PARTS`, such as "monitor:every=5".
            seed: of ``Run.generator``.
            log: a JSONL file of all actions; it must be new, or that of the run that is resumed.
            evaluate: called with the model, in evaluation mode and without gradients, for its
                validation metrics, such as {"loss": 0.5}. A Trainer evaluates by itself.
            evaluate_every: steps between calls of ``evaluate``; 0 for none.
        Raises: ConfigError for what is no part, a name twice, or a number out of range.
        """
        self.parts = tuple(_checked_part(part) for part in parts)
        names = [part.name for part in self.parts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(
                f"Controller: two parts are called {twice[0]!r}, and their states are kept by "
                "name. Give one of them another name."
            )
        if evaluate_every < 0 or (evaluate_every > 0) != (evaluate is not None):
            raise ConfigError(
                "Controller: evaluate and evaluate_every belong together, a function and a number "
                f"of steps of 1 or more, got evaluate_every={evaluate_every}."
            )
        self.seed = seed
        self.evaluate = evaluate
        self.evaluate_every = evaluate_every
        self.notes: list[str] = []
        """What of the run it cannot see, for :meth:`report`."""
        self.failed: dict[str, str] = {}
        """Name of a part that raised → what, and when."""
        self._journal = Journal(log)
        self._run: Run | None = None
        self._handle: Handle | None = None
        self._snapshot: Snapshot | None = None
        self._objects: Objects | None = None
        self._odd: set[str] = set()
        self._header: dict[str, Any] = {}

    # ------------------------------------------------------------------------------ the run

    def begin(
        self,
        handle: Handle,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int | None = None,
        resume: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    ) -> None:
        """Bind to a run; a Trainer's callback does this itself.

        Args:
            handle: of the attached delta.
            optimizer: with all of the handle's parameters.
            steps: optimizer steps of the whole run, where that is known.
            resume: what :meth:`state_dict` gave, or the file that :meth:`save` wrote, to go on
                from. Ranks, switches and weights are then as they were; after this, load
                parameters and the optimizer's state, which are not in it.
        Raises: AttachError, ConfigError, CheckpointError; nothing has changed then.
        """
        self._check_run(handle, optimizer)
        generator = torch.Generator().manual_seed(self.seed)
        run = Run(handle.model, handle, optimizer, generator, steps=steps, parts=self.parts)
        run.on_secure = self._secure
        self._handle, self.failed, self._odd = handle, {}, set()
        self._header = self._describe(handle)
        before, history = Snapshot.take(run, parts=False), list(handle.history)
        try:  # nothing is lost yet: what a part raises here is raised, and undone
            if resume is None:
                self._start(run)
            else:
                found = resume if isinstance(resume, Mapping) else read_state(Path(resume))
                self._resume(run, found)
        except Exception:
            before.restore(run, failed=True)
            handle.history[:] = history
            raise
        self._run, self._objects = run, None

    def _start(self, run: Run) -> None:
        self._journal.check()
        run.handle.history.clear()
        for part in self.parts:
            for action in _checked_actions(part.begin(run)):
                run.handle.history.append(_line(run, part.name, "begin", action))
        self._journal.start(self._header, run.handle.history)

    def after_backward(self, loss: float | Tensor | None, *, clipped: float = 1.0) -> None:
        """Gradients are whole, and the optimizer has not stepped.

        Args:
            loss: of the step, the mean over its micro-batches; None where it is not known.
            clipped: see :attr:`Run.clipped`.
        """
        run = self._running("after_backward")
        run.loss = None
        if loss is not None:
            value = float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
            run.loss = value if self._is_finite("loss", value, "after_backward") else None
        run.clipped = clipped
        self._ask_all("after_backward")

    def after_step(self) -> None:
        """The optimizer has stepped."""
        run = self._running("after_step")
        run.step += 1
        self._ask_all("after_step")
        if self.evaluate is not None and run.step % self.evaluate_every == 0:
            with _evaluating(run.model):
                metrics = self.evaluate(run.model)
            self.after_evaluation(metrics)

    def after_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Validation metrics by name, with or without "eval_" before it.

        One that is not finite is logged; it is worse than any, and else nothing is decided by it.
        """
        run = self._running("after_evaluation")
        run.metrics, lost = {}, []
        for name, value in metrics.items():
            if name == "epoch" or name.endswith(_TIMES):
                continue
            plain = name.removeprefix("eval_")
            if self._is_finite(f"metric {name}", value, "after_evaluation"):
                run.metrics[plain] = float(value)
            else:
                lost.append(plain)
        run.lost = tuple(lost)
        if run.metrics or lost:
            self._ask_all("after_evaluation")

    def close(self) -> None:
        """The run is over: parts that keep files finish them. Again is nothing new."""
        if self._run is not None:
            self._ask_all("close")
        self._run = None

    @property
    def run(self) -> Run | None:
        """The run that it is bound to."""
        return self._run

    def callback(self) -> Any:
        """A ``transformers.TrainerCallback`` that makes all these calls."""
        from .trainer import ControllerCallback

        return ControllerCallback(self)

    def report(self) -> str:
        """What each part did, what failed, and what could not be seen."""
        history = [] if self._handle is None else self._handle.history
        lines = []
        for part in self.parts:
            own = [e for e in history if e["part"] == part.name and e["kind"] != "error"]
            state = f"off: {self.failed[part.name]}" if part.name in self.failed else "on"
            lines.append(f"{part.name:<16} {state}; actions: {len(own)}")
            lines += [f"    step {e['step']}: {_told(e)}" for e in own]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    # ------------------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """All that the next decisions depend on: {"facts": JSON, "tensors": by flat names}.

        The model's parameters and the optimizer are the training loop's to save, at the same step.
        """
        run = self._running("state_dict")
        tensors: dict[str, Tensor] = {"generator": run.generator.get_state()}
        states: dict[str, Any] = {}
        for part in self.parts:
            if part.name in self.failed:
                continue
            try:
                state = json.loads(json.dumps(part.state(), allow_nan=False))
                own = {f"part/{part.name}/{k}": _kept(v) for k, v in part.tensors().items()}
            except Exception as error:  # as in _ask
                self._fail(part, "state", error)
                continue
            states[part.name] = state
            tensors |= own
        inside = {id(parameter) for parameter in run.model.parameters()}
        for key, parameter in run.handle.named_parameters():
            if id(parameter) not in inside:  # off, so that what it replaces is in the model
                tensors[f"outside/{key}"] = _kept(parameter)
        facts = {
            "version": VERSION,
            "header": self._header,
            "step": run.step,
            "loss": run.loss,
            "metrics": run.metrics,
            "form": Form.of(run.handle).state(),
            "frozen": [k for k, p in run.handle.named_parameters() if not p.requires_grad],
            "history": list(run.handle.history),
            "failed": dict(self.failed),
            "odd": sorted(self._odd),
            "parts": states,
        }
        return {"facts": json.loads(json.dumps(facts, allow_nan=False)), "tensors": tensors}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`state_dict` to a safetensors file, whole or not at all.

        Raises: CheckpointError.
        """
        write_state(Path(path), self.state_dict())

    def recall(self, path: str | os.PathLike[str]) -> None:
        """Have the places, ranks, switches and weights of when ``path`` was saved, for a loop that
        ends with an earlier step's parameters: call it before those are loaded, since the places of
        what is off hold parameters of the base.

        Raises: CheckpointError, with nothing changed.
        """
        run = self._running("recall")
        state = read_state(Path(path))
        facts = state["facts"]
        form = Form.read(facts["form"], run.handle)
        form.apply(run.handle, run.optimizer)
        form.switch(run.handle)
        _put_outside(run.handle, state["tensors"])
        self._objects = None
        reason = f"the parameters of step {facts['step']} come back, and so do ranks and switches"
        detail = {"to_step": facts["step"], "enabled": list(form.enabled)}
        event = {"kind": "roll back", "delta": "", "reason": reason, "detail": detail}
        self._record(_NAME, "recall", event)

    @staticmethod
    def reshape(handle: Handle, path: str | os.PathLike[str]) -> None:
        """Give a fresh handle the ranks that a run had when ``path`` was saved, so that a Trainer
        can load that checkpoint into the model; before its ``train(resume_from_checkpoint=…)``.

        Args:
            handle: of a delta that was attached as the run's was.
            path: ``controller.safetensors`` of the checkpoint.
        Raises: CheckpointError.
        """
        Form.read(read_state(_there(Path(path)))["facts"]["form"], handle).apply(handle, None)

    def _resume(self, run: Run, state: Mapping[str, Any]) -> None:
        facts, tensors = state["facts"], state["tensors"]
        if facts.get("version") != VERSION:
            raise CheckpointError(
                f"Controller: the state has version {facts.get('version')!r}, this deltaops reads "
                f"{VERSION}. Resume it with the deltaops that wrote it."
            )
        header = self._header
        odd = [key for key in header if facts["header"].get(key) != header[key]]
        if odd:
            raise CheckpointError(
                f"Controller: the run that is resumed had {odd[0]}="
                f"{facts['header'].get(odd[0])!r}, and this one has {header[odd[0]]!r}. Make "
                "the controller and the delta as they were, or start anew."
            )
        self._journal.check_resumed(header, facts["history"])
        run.step, run.loss, run.metrics = facts["step"], facts["loss"], dict(facts["metrics"])
        form = Form.read(facts["form"], run.handle)
        form.apply(run.handle, run.optimizer)
        form.switch(run.handle)
        run.generator.set_state(tensors["generator"].to(torch.uint8))
        frozen = set(facts["frozen"])
        for key, parameter in run.handle.named_parameters():
            parameter.requires_grad_(key not in frozen)
        _put_outside(run.handle, tensors)
        self.failed = dict(facts["failed"])
        run.parts = self._live()
        self._odd = set(facts["odd"])
        run.handle.history[:] = facts["history"]
        for part in self.parts:
            if part.name in facts["parts"]:
                start = f"part/{part.name}/"
                own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
                part.restore(facts["parts"][part.name], own)
                if hasattr(part, "resume"):
                    part.resume(run)
        self._journal.resume(header, facts["history"])

    def _describe(self, handle: Handle) -> dict[str, Any]:
        """The first line of the log, by which a run is known again."""
        return {
            "step": 0,
            "kind": "start",
            "version": VERSION,
            "seed": self.seed,
            "parts": [[part.name, _described(part)] for part in self.parts],
            "evaluate_every": self.evaluate_every,
            "model": type(handle.model).__name__,
            "methods": {name: delta.kind for name, delta in handle.parts.items()},
        }

    # ------------------------------------------------------------------------------ asking

    def _ask_all(self, moment: str) -> None:
        for part in self.parts:
            if part.name not in self.failed:
                self._ask(part, moment)

    def _ask(self, part: Part, moment: str) -> None:
        """Ask one part, log what it did; undo it where it raises, and never ask it again."""
        ask = getattr(part, moment, None)
        if ask is None:  # only close need not be there
            return
        announced = getattr(part, "announces", False) or getattr(part, "watches", False)
        if not announced:
            self._secure()
        try:
            actions = _checked_actions(ask(self._run))
        except Exception as error:  # whatever a part does wrong, the run goes on without it
            if self._snapshot is not None:
                assert self._run is not None
                self._snapshot.restore(self._run, failed=True)
                self._objects = None
            self._fail(part, moment, error)
        else:
            for action in actions:
                self._record(part.name, moment, action)
            if actions:
                self._objects = None
        finally:
            self._snapshot = None

    def _secure(self) -> None:
        """Keep the run as it is now, until the part that is asked has answered."""
        run = self._run
        if self._snapshot is None and run is not None:
            if self._objects is None or not self._objects.holds(run):
                self._objects = Objects(run)
            self._snapshot = Snapshot.take(run, parts=False, objects=self._objects)

    def _fail(self, part: Part, moment: str, error: Exception) -> None:
        assert self._run is not None
        told = _named(error)
        self.failed[part.name] = f"{told} (step {self._run.step}, {moment})"
        self._run.parts = self._live()
        undone = self._leave(part)
        trace = "".join(traceback.format_exception(error))
        reason = f"{told}; the part is off from here on, and what it had changed is {undone}"
        event = {"kind": "error", "delta": "", "reason": reason, "detail": {"traceback": trace}}
        self._record(part.name, moment, event)

    def _leave(self, part: Part) -> str:
        """Have it take back what it changed for a time alone; tells what came of it."""
        leave = getattr(part, "leave", None)
        if leave is None:
            return "undone"
        self._objects = None
        try:
            leave(self._run)
        except Exception as error:  # as in _ask
            return f"not all undone ({_named(error)})"
        return "undone"

    def _live(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.name not in self.failed)

    def _record(self, part: str, moment: str, event: Action | Mapping[str, Any]) -> None:
        assert self._run is not None
        line = _line(self._run, part, moment, event)
        self._run.handle.history.append(line)
        self._journal.append(line)

    def _is_finite(self, name: str, value: float, moment: str) -> bool:
        """Whether it is; the log has the first time that it is not, until it is again."""
        if math.isfinite(value):
            self._odd.discard(name)
        elif name not in self._odd:
            self._odd.add(name)
            reason = f"{name} is {value}, which is no number to go by"
            self._record(_NAME, moment, {"kind": "not finite", "delta": "", "reason": reason})
        return math.isfinite(value)

    # ------------------------------------------------------------------------------ checks

    def _check_run(self, handle: Handle, optimizer: torch.optim.Optimizer) -> None:
        if self._run is not None:
            raise AttachError(
                "Controller.begin: it steers a run already. Call close(), or make one for each run."
            )
        if not isinstance(handle, Handle):
            raise AttachError(
                f"Controller.begin: expected the handle of an attached delta, got "
                f"{type(handle).__name__}. Pass what deltaops.attach returned."
            )
        if not handle.attached:
            raise AttachError(
                "Controller.begin: the delta is no longer on the model. Attach it again with "
                "deltaops.attach or deltaops.load."
            )
        if handle.merged:
            raise AttachError(
                "Controller.begin: the delta is merged, and nothing of it trains. Call "
                "handle.unmerge() first."
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_world_size() > 1:
                raise AttachError(
                    f"Controller.begin: {torch.distributed.get_world_size()} processes train, each "
                    "with a loss of its own, and their decisions would differ. It steers runs of "
                    "one process."
                )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [key for key, p in handle.named_parameters() if id(p) not in held]
        if missing:
            raise ConfigError(
                f"Controller.begin: the optimizer lacks {len(missing)} of the handle's parameters, "
                f"such as {missing[0]}. Make it from handle.parameter_groups(lr)."
            )

    def _running(self, call: str) -> Run:
        if self._run is None:
            raise AttachError(
                f"Controller.{call}: there is no run. Call begin(handle, optimizer) first."
            )
        return self._run


def handle_on(model: nn.Module) -> Handle:
    """The handle of what is attached to ``model``. Raises: AttachError where nothing is."""
    handle = handle_of(model)
    if handle is None:
        raise AttachError(
            f"Controller: no delta is attached to the {type(model).__name__}. Call "
            "deltaops.attach(model, delta) before the training."
        )
    return handle


def _checked_part(part: Any) -> Part:
    if isinstance(part, str):
        from .named import parse_parts  # it knows the parts that are built in

        found = parse_parts(part)
        if len(found) != 1:
            raise ConfigError(
                f"Controller: {part!r} names {len(found)} parts; pass each by itself."
            )
        return found[0]
    lacking = [name for name in _METHODS if not callable(getattr(part, name, None))]
    if lacking or isinstance(part, type) or not isinstance(getattr(part, "name", None), str):
        what = f"{type(part).__name__}, without {lacking[0]}()" if lacking else f"{part!r}"
        raise ConfigError(
            f"Controller: expected parts such as Monitor() or Policy(...), got {what}. A part has "
            f"a name and {', '.join(_METHODS)}: see deltaops.strategy.Part."
        )
    if part.name in ("", _NAME) or "/" in part.name:
        raise ConfigError(
            f"Controller: {part.name!r} cannot name a part: expected a word without /, and not "
            f"{_NAME!r}."
        )
    found_part: Part = part
    return found_part


def _checked_actions(answer: Any) -> list[Action]:
    """Raises: TypeError for what is no action; ValueError for what JSON cannot hold."""
    actions = [] if answer is None else list(answer)
    for action in actions:
        if not isinstance(action, Action):
            raise TypeError(f"a part answers with Actions, got {type(action).__name__}")
        json.dumps(dataclasses.asdict(action), allow_nan=False)
    return actions


def _line(run: Run, part: str, moment: str, event: Action | Mapping[str, Any]) -> dict[str, Any]:
    """As the log and the history have it: what JSON makes of it, so that both are the same."""
    told = dataclasses.asdict(event) if isinstance(event, Action) else event
    line = {"step": run.step, "moment": moment, "part": part, **told}
    found: dict[str, Any] = json.loads(json.dumps(line, allow_nan=False))
    return found


def _described(part: Part) -> str:
    """Its settings, where it tells them; an object's address would differ in each process."""
    return type(part).__name__ if type(part).__repr__ is object.__repr__ else repr(part)


def _put_outside(handle: Handle, tensors: Mapping[str, Tensor]) -> None:
    """Values of what is off and not in the model, which no checkpoint of the model has."""
    with torch.no_grad():
        for key, parameter in handle.named_parameters():
            if f"outside/{key}" in tensors:
                parameter.copy_(tensors[f"outside/{key}"])


def _there(path: Path) -> Path:
    """``path``, or what waits for it beside a checkpoint that was not finished."""
    return state_of(path.parent) if path.name == FILE else path


def _named(error: Exception) -> str:
    """Its class and message; one whose message raises is told without."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as other:  # whatever a part does wrong, the run goes on without it
        return f"{type(error).__name__}, whose message raises {type(other).__name__}"


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _told(event: Mapping[str, Any]) -> str:
    where = f" at {event['place']}" if event.get("place") else ""
    return f"{event['kind']} {event['delta']}{where}: {event['reason']}"


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Any:
    """Inside, all modules evaluate and nothing has gradients; behind it each is as it was."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before.items():
            module.training = training
