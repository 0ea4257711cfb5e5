"""A run as it is at one moment, to be given back to the bit where an action failed or did harm.

values     the trained tensors, and which of them require a gradient
moments    the optimizer's state of each
form       settings, ranks, switches and weights of the deltas: see :mod:`.form`
parts      the state of the controller's parts that act
objects    modules, the handle's record and the optimizer's groups, as they hold each other; this
           process has them, a file has not
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .form import Form
from .parts import Run

NOT_OURS = ("training",)
"""Attributes of a module that the training loop sets."""


@dataclass
class Snapshot:
    """Made by :meth:`take`, or out of a file by :meth:`read`."""

    values: dict[str, Tensor]
    trained: dict[str, bool]
    moments: dict[str, dict[str, Any]]
    form: Form | None
    """None until a run is there whose handle knows the methods; :attr:`told` has it then."""
    told: Mapping[str, Any]
    parts: dict[str, tuple[dict[str, Any], dict[str, Tensor]]]
    objects: Objects | None
    gradients: dict[str, Tensor | None]

    @classmethod
    def take(
        cls,
        run: Run,
        *,
        parts: bool = True,
        but: Iterable[str] = (),
        objects: Objects | None = None,
    ) -> Snapshot:
        """The run as it is now.

        Args:
            run: to be given back.
            parts: also the states of the controller's parts, but for those that only watch.
            but: names of parts whose states are left out as well.
            objects: those of an earlier snapshot, where nothing has changed who holds whom since.
        """
        named = dict(run.handle.named_parameters())
        left_out = set(but)
        shapes = {key: tuple(p.shape) for key, p in named.items()}
        return cls(
            values={key: p.detach().clone() for key, p in named.items()},
            trained={key: p.requires_grad for key, p in named.items()},
            moments={
                key: {k: _copied(v) for k, v in run.optimizer.state[p].items()}
                for key, p in named.items()
                if p in run.optimizer.state
            },
            form=Form.of(run.handle, shapes),
            told={},
            parts={
                part.name: (copy.deepcopy(part.state()), _cloned(part.tensors()))
                for part in (run.parts if parts else ())
                if part.name not in left_out and not getattr(part, "watches", False)
            },
            objects=objects or Objects(run),
            gradients={key: p.grad for key, p in named.items()},
        )

    def restore(self, run: Run, *, failed: bool = False) -> None:
        """Give the run back as it was.

        Args:
            run: of the same model.
            failed: nothing but the change itself lies between: gradients come back as well, and
                modules' own attributes where it got as far as the deltas' form.
        Raises: CheckpointError where a tensor has another shape and no part can change that.
        """
        if self.objects is not None and (
            self.objects.replaced(run) or (failed and Form.of(run.handle) != self.form)
        ):
            self.objects.restore(run)
        form = self.form or Form.read(self.told, run.handle)
        form.apply(run.handle, run.optimizer)
        form.switch(run.handle)
        named = dict(run.handle.named_parameters())
        with torch.no_grad():
            for key, parameter in named.items():
                parameter.copy_(self.values[key])
                parameter.requires_grad_(self.trained[key])
                if failed:
                    parameter.grad = self.gradients[key]
        _set_moments(run.optimizer, named, self.moments)
        by_name = {part.name: part for part in run.parts}
        for name, (state, tensors) in self.parts.items():
            if name not in by_name:  # it has failed since then
                continue
            by_name[name].restore(copy.deepcopy(state), _cloned(tensors))

    # ---------------------------------------------------------------------------------- saving

    def state(self) -> dict[str, Any]:
        """What of it JSON can hold."""
        plain = {
            key: {k: v for k, v in state.items() if not isinstance(v, Tensor)}
            for key, state in self.moments.items()
        }
        return {
            "trained": self.trained,
            "moments": plain,
            "form": self.told if self.form is None else self.form.state(),
            "parts": {name: state for name, (state, _) in self.parts.items()},
        }

    def tensors(self) -> dict[str, Tensor]:
        """The rest, by flat names."""
        found = {f"value/{key}": value for key, value in self.values.items()}
        for key, state in self.moments.items():
            found |= {f"moment/{key}/{k}": v for k, v in state.items() if isinstance(v, Tensor)}
        for name, (_, tensors) in self.parts.items():
            found |= {f"part/{name}/{key}": value for key, value in tensors.items()}
        return found

    @classmethod
    def read(cls, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Snapshot:
        """Undo :meth:`state` and :meth:`tensors`."""
        moments = {key: dict(found) for key, found in state["moments"].items()}
        parts: dict[str, tuple[dict[str, Any], dict[str, Tensor]]]
        parts = {name: (dict(found), {}) for name, found in state["parts"].items()}
        values: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            kind, _, key = name.partition("/")
            if kind == "value":
                values[key] = tensor
            elif kind == "moment":
                key, _, field = key.rpartition("/")
                moments[key][field] = tensor
            else:
                owner, _, key = key.partition("/")
                parts[owner][1][key] = tensor
        return cls(
            values, dict(state["trained"]), moments, None, state["form"], parts, None,
            {},
        )  # fmt: skip


class Objects:
    """Who holds whom: each module's class and attributes, the record, the optimizer's groups."""

    def __init__(self, run: Run) -> None:
        """As it is now."""
        holders = (*run.model.modules(), run.handle._record)
        self._kinds = [(one, type(one)) for one in holders]
        self._lists = [(group, group["params"]) for group in _groups(run)]
        self._contents: list[tuple[Any, Any]] = []
        seen: set[int] = set()
        for one in holders:
            _walk(one.__dict__, self._contents, seen)
        for _, parameters in self._lists:
            _walk(parameters, self._contents, seen)
        self._parameters = [p for _, p in run.handle.named_parameters()]
        self._switches = run.handle.enabled, run.handle.weights
        self._merged = run.handle.merged

    def replaced(self, run: Run) -> bool:
        """Whether the handle, or the base by a merge, has other Parameter objects now."""
        now = [p for _, p in run.handle.named_parameters()]
        return (
            len(now) != len(self._parameters)
            or run.handle.merged != self._merged
            or any(one is not other for one, other in zip(now, self._parameters, strict=True))
        )

    def holds(self, run: Run) -> bool:
        """Whether it is still so, as far as the handle tells."""
        switches = run.handle.enabled, run.handle.weights
        return switches == self._switches and not self.replaced(run)

    def restore(self, run: Run) -> None:
        """Have everything hold again what it held. The history stays, which is a log."""
        history = list(run.handle.history)
        kept = [
            {name: one.__dict__[name] for name in NOT_OURS if name in one.__dict__}
            for one, _ in self._kinds
        ]
        for one, kind in self._kinds:
            if type(one) is not kind:
                one.__class__ = kind
        for container, copied in self._contents:
            # into the same object, since others, such as hooks' handles, refer to it
            if isinstance(container, list):
                container[:] = copied
            else:
                container.clear()
                container.update(copied)
        for (one, _), ours in zip(self._kinds, kept, strict=True):
            one.__dict__.update(ours)
        run.handle.history[:] = history
        for group, parameters in self._lists:
            group["params"] = parameters


def _walk(container: Any, found: list[tuple[Any, Any]], seen: set[int]) -> None:
    """Add ``container``, and what it holds that can change, each with a copy of what it holds."""
    if id(container) in seen:
        return
    seen.add(id(container))
    if isinstance(container, dict):
        copied: Any = dict(container)
        values: Iterable[Any] = copied.values()
    else:
        copied = values = list(container)
    found.append((container, copied))
    for value in values:
        if isinstance(value, (dict, list, set)):
            _walk(value, found, seen)
        elif _is_record(cast(Hashable, type(value))):
            _walk(value.__dict__, found, seen)


@functools.cache
def _is_record(kind: Any) -> bool:
    """Whether it is a dataclass whose fields can change."""
    if not dataclasses.is_dataclass(kind):
        return False
    parameters: Any = kind.__dict__.get("__dataclass_params__")
    return parameters is not None and not parameters.frozen


def _set_moments(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    moments: Mapping[str, Mapping[str, Any]],
) -> None:
    """The state of the handle's parameters, and none of those that are in no group any more."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for parameter in list(optimizer.state):
        if id(parameter) not in held:
            del optimizer.state[parameter]
    for key, parameter in named.items():
        before = optimizer.state.pop(parameter, {})
        if key in moments:
            optimizer.state[parameter] = {
                name: _placed(value, before.get(name), parameter)
                for name, value in moments[key].items()
            }


def _placed(value: Any, before: Any, parameter: Tensor) -> Any:
    """A copy where the optimizer keeps it: a counter mostly on the CPU, moments by the tensor."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if isinstance(before, Tensor):
        return value.to(before.device, copy=True)
    return value.clone() if value.dim() == 0 else value.to(parameter.device, copy=True)


def _groups(run: Run) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = run.optimizer.param_groups
    return groups


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
