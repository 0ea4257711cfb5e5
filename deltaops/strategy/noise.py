"""The gradient noise scale of a run, from the gradients of two steps after each other.

    B = tr Σ / |G|²      in batches: at B, as many batches as that would be worth taking together

A batch's gradient g has the mean G and the covariance Σ, so that E|g|² = |G|² + tr Σ; two batches
are independent, and between two steps G hardly moves, so that E⟨g, g'⟩ = |G|². Both are averaged
over steps, each with weight 1 − DECAY, before they are divided. Dropout counts as noise. Where the
average of ⟨g, g'⟩ is not above zero, nothing but noise was seen and there is no number.
Source: McCandlish et al. 2018 (arXiv 1812.06162), §2.2, whose appendix A.1 compares two sizes of
batches instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

DECAY = 0.9

Name = tuple[str, str, str]
"""Part, place and suffix of a tensor."""
Group = tuple[str, str]
"""Part and place that are measured together; empty for all."""


def groups(name: Name) -> tuple[Group, ...]:
    """What a tensor counts for: its place, its part, the run. Each once: a model has no path."""
    part, place, _ = name
    return tuple(dict.fromkeys([(part, place), (part, ""), ("", "")]))


class Noise:
    """Averages of one run, and the gradients of the step before one that is measured."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self._before: dict[Name, Tensor] = {}
        self._means: dict[Group, tuple[float, float]] = {}
        """Averages of |g|² and ⟨g, g'⟩; their common weight cancels."""

    def keep(self, gradients: Mapping[Name, Tensor], clipped: float) -> None:
        """Copy the gradients for the next step; none to free them."""
        self._before = {name: grad.float() / clipped for name, grad in gradients.items()}

    def measure(self, gradients: Mapping[Name, Tensor], clipped: float) -> dict[Group, float]:
        """The noise scale of each group of which the step before is known."""
        before = {n: b for n, b in self._before.items() if n in gradients}
        names = [n for n, b in before.items() if b.shape == gradients[n].shape]  # or it was resized
        if not names:
            return {}
        products = []
        for name in names:
            now = gradients[name].float().flatten() / clipped
            then = before[name].to(now.device).flatten()  # one that was restored is on the CPU
            products += [now.dot(now), then.dot(then), now.dot(then)]
        seen: dict[Group, list[float]] = {}
        first = products[0].device  # layers may lie on several
        sums = torch.stack([product.to(first) for product in products]).view(-1, 3).tolist()
        for name, (a, b, c) in zip(names, sums, strict=True):
            for group in groups(name):
                both = seen.setdefault(group, [0.0, 0.0])
                both[0] += (a + b) / 2
                both[1] += c
        found = {}
        for group, (square, product) in seen.items():
            if not math.isfinite(square + product):  # it would stay in the average for good
                continue
            one, other = self._means.get(group, (0.0, 0.0))
            one = DECAY * one + (1 - DECAY) * square
            other = DECAY * other + (1 - DECAY) * product
            self._means[group] = one, other
            if other > 0:
                found[group] = max(0.0, one / other - 1)
        return found

    # ---------------------------------------------------------------------------------- saving

    def state(self) -> dict[str, Any]:
        """Averages, and the names of what is kept."""
        return {
            "means": [[*group, *pair] for group, pair in self._means.items()],
            "names": [list(name) for name in self._before],
        }

    def tensors(self) -> dict[str, Tensor]:
        """What is kept."""
        return {str(i): tensor for i, tensor in enumerate(self._before.values())}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take both back."""
        self._means = {(part, place): (a, b) for part, place, a, b in state["means"]}
        self._before = {
            (part, place, suffix): tensors[str(i)]
            for i, (part, place, suffix) in enumerate(state["names"])
        }
