"""How much the loss hangs on each component, smoothed over steps.

    I = |p · ∂L/∂p|     Ī ← β₁ Ī + (1 − β₁) I     U ← β₂ U + (1 − β₂) |I − Ī|     s = Ī · U

of every element p of A and B; a component's score is the mean of s over its row of A plus that over
its column of B, so that the shape of a layer does not count.
Source: Zhang et al. 2023 (AdaLoRA, arXiv 2303.10512), §3.2; without their Λ, whose part A and B
have here, and so without their term for orthogonality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deltaops.errors import CheckpointError
from deltaops.surgery.components import Sized


class Scores:
    """Ī and U of every element, by path and suffix, where the parameters are."""

    def __init__(self, beta1: float, beta2: float) -> None:
        """Nothing is known yet."""
        self.beta1, self.beta2 = beta1, beta2
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def update(self, places: Mapping[str, Sized], clipped: float = 1.0) -> bool:
        """Take this step's gradients in; a parameter without one counts as still.

        Args:
            places: by path.
            clipped: how many times as long as the loss made them the gradients are.
        Returns: whether all of them are finite; if not, nothing is taken in.
        """
        if not _finite(places):
            return False
        for path, place in places.items():
            for suffix, slot in place.slots.items():
                parameter = slot.parameter
                mean, spread = self._of(path, suffix, parameter)
                if parameter.grad is None:
                    now = torch.zeros_like(mean)
                else:
                    # not in half precision, where so small a product would be zero
                    now = (parameter.to(mean.dtype) * parameter.grad).abs_().div_(clipped)
                mean.lerp_(now, 1 - self.beta1)
                spread.lerp_(now.sub_(mean).abs_(), 1 - self.beta2)
        return True

    def of(self, path: str, place: Sized) -> Tensor:
        """Score of each component of ``place`` ``[R]``, in float64 on the CPU."""
        total = torch.zeros(place.rank, dtype=torch.float64)
        for suffix, slot in place.slots.items():
            mean, spread = self._of(path, suffix, slot.parameter)
            product = mean.double() * spread.double()
            by_component = product if slot.axis == 0 else product.T
            total += by_component.flatten(1).mean(1).cpu()
        return total

    def follow(self, path: str, place: Sized, kept: Sequence[int], *, gone: bool) -> None:
        """Keep what is known of ``kept`` at a place that was resized; new components begin at 0.

        Args:
            path: of the place.
            place: as it is now.
            kept: components of before, which are its first.
            gone: whether it was taken out.
        """
        for suffix, slot in place.slots.items():
            known = self._known.pop(f"{path}:{suffix}", None)
            if known is None or gone:
                continue
            found = []
            for old in known:
                new = torch.zeros_like(slot.parameter, dtype=old.dtype, device=old.device)
                index = torch.tensor(kept, dtype=torch.long, device=old.device)
                new.narrow(slot.axis, 0, len(kept)).copy_(old.index_select(slot.axis, index))
                found.append(new)
            self._known[f"{path}:{suffix}"] = found[0], found[1]

    def tensors(self) -> dict[str, Tensor]:
        """By flat names, for a file."""
        found = {}
        for key, (mean, spread) in self._known.items():
            found[f"{key}:mean"], found[f"{key}:spread"] = mean, spread
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take :meth:`tensors` back."""
        keys = [key.removesuffix(":mean") for key in tensors if key.endswith(":mean")]
        self._known = {
            key: (tensors[f"{key}:mean"].clone(), tensors[f"{key}:spread"].clone()) for key in keys
        }

    def _of(self, path: str, suffix: str, parameter: Tensor) -> tuple[Tensor, Tensor]:
        key = f"{path}:{suffix}"
        if key not in self._known:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            zero = torch.zeros_like(parameter, dtype=wide, requires_grad=False)
            self._known[key] = zero, zero.clone()
        mean, spread = self._known[key]
        if mean.shape != parameter.shape:
            raise CheckpointError(
                f"importance: what is known of {key!r} must have the shape of the parameter, "
                f"{list(parameter.shape)}, and has {list(mean.shape)}. Let no other part change "
                "ranks of this LoRA, and restore those of a run together with this part's state."
            )
        if mean.device != parameter.device:
            self._known[key] = mean, spread = mean.to(parameter.device), spread.to(parameter.device)
        return mean, spread


def _finite(places: Mapping[str, Sized]) -> bool:
    """Whether all gradients are, asked with one wait for the device."""
    slots = (slot for place in places.values() for slot in place.slots.values())
    gradients = [slot.parameter.grad for slot in slots if slot.parameter.grad is not None]
    flags = [g.isfinite().all().to(gradients[0].device, non_blocking=True) for g in gradients]
    return not flags or bool(torch.stack(flags).all())
