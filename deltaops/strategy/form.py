"""What the deltas of a handle are besides their numbers: settings, ranks, switches, weights.

A fresh handle that was attached as a run's was at its start gets the run's form, and then takes the
run's tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deltaops.errors import CheckpointError, ConfigError
from deltaops.methods import Delta, LoRA
from deltaops.surgery import Handle, resize
from deltaops.surgery.components import AXES, sized_places
from deltaops.surgery.removal import put_back, taken_out
from deltaops.surgery.resize import put_settings

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Form:
    """By the names of the handle's parts; shapes by its keys."""

    deltas: dict[str, Delta]
    shapes: Shapes
    enabled: tuple[str, ...]
    weights: dict[str, float]

    @classmethod
    def of(cls, handle: Handle, shapes: Shapes | None = None) -> Form:
        """As it is now; ``shapes`` where they are known already."""
        found = shapes_of(handle) if shapes is None else shapes
        return cls(handle.parts, found, handle.enabled, handle.weights)

    def apply(self, handle: Handle, optimizer: torch.optim.Optimizer | None) -> None:
        """Have ``handle`` of these settings and ranks; values come later, and switches do.

        Args:
            handle: of the same methods.
            optimizer: whose parameters follow; None where there is none yet.
        Raises: CheckpointError where a tensor cannot have the shape, or a setting is another one;
            nothing has changed then.
        """
        self._check_settings(handle)
        self._resize(handle, optimizer)
        for name, delta in handle.parts.items():
            if delta != self.deltas[name]:
                places = sized_places(handle, name, "Controller").values()
                put_settings(handle, next(iter(places)).site.part, self.deltas[name], places)

    def switch(self, handle: Handle) -> None:
        """Have the same parts on, all others off, and the same weights."""
        for part in handle.parts:
            if part in self.enabled and part not in handle.enabled:
                handle.enable(part)
            elif part not in self.enabled and part in handle.enabled:
                handle.disable(part)
            if handle.weights[part] != self.weights[part]:
                handle.weigh(part, self.weights[part])

    def _check_settings(self, handle: Handle) -> None:
        """Raises: CheckpointError; LoRA's all come with the form."""
        for name, delta in handle.parts.items():
            ours, theirs = (one.settings() | {"size": None} for one in (delta, self.deltas[name]))
            odd = [field for field in ours if ours[field] != theirs[field]]
            if odd and not isinstance(delta, LoRA):
                raise CheckpointError(
                    f"the run had {name} with {odd[0]}={theirs[odd[0]]!r}, and here it has "
                    f"{ours[odd[0]]!r}. Attach the delta as for the run that is resumed."
                )

    def _resize(self, handle: Handle, optimizer: torch.optim.Optimizer | None) -> None:
        found = shapes_of(handle)
        if found == self.shapes:
            return
        sized = {}
        for part in handle.parts:
            with contextlib.suppress(ConfigError):  # its size is fixed, and must be the same
                sized[part] = sized_places(handle, part, "Controller")
        back = [
            site
            for site in taken_out(handle)
            if any(site.key(suffix) in self.shapes for suffix in AXES)
        ]
        theirs = tuple(site.key("") for site in back)
        axes = {
            place.site.key(suffix): AXES.get(suffix)
            for places in sized.values()
            for place in places.values()
            for suffix in place.tensors
        }
        odd = sorted(
            key
            for key in found.keys() | self.shapes.keys()
            if not key.startswith(theirs)
            and not (key in axes and _fits(found[key], self.shapes.get(key), axes[key]))
            and found.get(key) != self.shapes.get(key)
        )
        if odd:
            raise CheckpointError(
                f"the run had {odd[0]} of shape {self.shapes.get(odd[0])}, and here it has "
                f"{found.get(odd[0])}; {len(odd)} tensors differ by more than their rank. Attach "
                "the delta as for the run that is resumed."
            )
        for part, places in sized.items():
            ranks = {}
            for path, place in places.items():
                suffix = next(iter(place.slots))
                shape = self.shapes.get(place.site.key(suffix))
                ranks[path] = 0 if shape is None else shape[AXES[suffix]]
            anything = torch.Generator()  # the numbers come later
            resize(handle, ranks, part=part, optimizer=optimizer, generator=anything)
        put_back(handle, back, self.deltas, optimizer)

    # ---------------------------------------------------------------------------------- saving

    def state(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "settings": {name: delta.settings() for name, delta in self.deltas.items()},
            "shapes": {key: list(shape) for key, shape in self.shapes.items()},
            "enabled": list(self.enabled),
            "weights": self.weights,
        }

    @classmethod
    def read(cls, state: Mapping[str, Any], handle: Handle) -> Form:
        """Undo :meth:`state`, for a handle of the same methods. Raises: CheckpointError."""
        try:
            settings = state["settings"]
            deltas = {name: type(d)(**settings[name]) for name, d in handle.parts.items()}
            shapes = {key: tuple(shape) for key, shape in state["shapes"].items()}
            return cls(deltas, shapes, tuple(state["enabled"]), dict(state["weights"]))
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the run had other deltas than {handle.delta!r}: {type(error).__name__}: {error}. "
                "Attach the delta as for the run that is resumed."
            ) from error


def _fits(now: tuple[int, ...], then: tuple[int, ...] | None, axis: int | None) -> bool:
    """Whether a rank makes one shape of the other; None: the place had been taken out."""
    if then is None:
        return True
    return len(now) == len(then) and all(
        one == other or i == axis for i, (one, other) in enumerate(zip(now, then, strict=True))
    )


def shapes_of(handle: Handle) -> Shapes:
    """Of all that is trained."""
    return {key: tuple(p.shape) for key, p in handle.named_parameters()}
