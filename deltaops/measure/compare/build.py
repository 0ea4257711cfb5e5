"""A fresh model with what a contender trains on it, and the optimizer's groups of that."""

from __future__ import annotations

from typing import Any

from torch import nn

from deltaops.methods import Combined
from deltaops.surgery import Handle, attach
from deltaops.tuning.sentence import NamedClasses

from .contenders import FULL, Contender
from .contenders import HEAD as HEAD_ALONE
from .lines import Record
from .reader import HEAD, TRAINED, Material, Reader

Model = Reader | NamedClasses


def trains(contender: Contender, head: str) -> bool:
    """Whether there is anything to train: not in frozen features under a named head."""
    return contender.name != HEAD_ALONE or head == TRAINED


def set_up(contender: Contender, material: Material, seed: int) -> tuple[Model, Handle | None]:
    """A fresh model that trains what the contender trains, and the head where that trains."""
    model = material.reader(seed)
    delta = contender.delta((HEAD,) if material.names is None else ())
    if delta is not None:
        return model, attach(model, delta)
    model.encoder.requires_grad_(contender.name == FULL)
    return model, None


def describe(contender: Contender, material: Material, seed: int) -> Record:
    """The line without results."""
    model, _ = set_up(contender, material, seed)
    return Record(
        contender.name, contender.title,
        contender.title if contender.delta() is None else repr(contender.delta()),
        count(model), sum(p.numel() for p in head_of(model)),
        sum(p.numel() for p in material.encoder.parameters()),
    )  # fmt: skip


def count(model: Model) -> int:
    """Parameters that train, without the head's."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained - sum(p.numel() for p in head_of(model))


def head_of(model: Model) -> list[nn.Parameter]:
    """What a head has to train: nothing, where it is names."""
    return list(model.classifier.parameters()) if isinstance(model, Reader) else []


def groups(
    model: Model, handle: Handle | None, contender: Contender, head_rate: float | None
) -> list[dict[str, Any]]:
    """For the optimizer: a trained head at its own rate; "pace" is a group's rate itself."""
    head = {id(p) for p in head_of(model)}
    found: list[dict[str, Any]] = [{"params": list(model.encoder.parameters()), "pace": 1.0}]
    if handle is not None:
        found = [*_by_part(handle, contender)]
    found = [
        {
            "params": [p for p in g["params"] if p.requires_grad and id(p) not in head],
            "pace": contender.rate * g["pace"],
        }
        for g in found
    ]
    alone = contender.name == HEAD_ALONE
    own = {
        "params": head_of(model),
        "pace": contender.rate if alone else head_rate,
    }
    return [g for g in (*found, own) if g["params"]]


def _by_part(handle: Handle, contender: Contender) -> list[dict[str, Any]]:
    """The handle's groups, each split by the paces of a combination's parts."""
    given = handle.parameter_groups(1.0)
    if not isinstance(handle.delta, Combined):
        return given
    part_of = {id(t): key.partition("/")[0] for key, t in handle.state().items()}
    paces = dict(contender.paces)
    found: dict[float, list[nn.Parameter]] = {}
    for group in given:
        for p in group["params"]:
            part = part_of.get(id(p), "")  # of a head that is trained along there is none
            pace = group["pace"] * paces.get(part, 1.0)
            found.setdefault(pace, []).append(p)
    return [{"params": p, "pace": pace} for pace, p in found.items()]
