"""Which places have the delta at all, learned on held-out batches under a budget.

Every place i has a number αᵢ, and its branch counts zᵢ times while the search lasts:

    zᵢ = σ(logit(uᵢ) + logit(pᵢ)),  pᵢ = σ((αᵢ − ζ) / τ),  u uniform in (0, 1)

a binary concrete draw of pᵢ (Maddison et al. 2017, 1611.00712), where ζ lets the expected number of
trained parameters be the budget: :mod:`.shift`. Training steps learn A and B; on held-out batches,
α learns by ∂L/∂x = ⟨∂L/∂B, B⟩ (1 − z) with x = logit(p), which the fused op's own gradient gives.
At the end the places with the highest p that fit the budget stay, with their own scale, and the
others are taken out. Evaluations before that see the z of the moment. A search that ends without a
choice, since it raised or `Controller.close` ended it, leaves all places with their own scales.

What the paper has and this has not: the second-order term of α's gradient (their unrolled step),
and training the chosen places anew, for which attach the delta that is left once more.
Source: Hu et al. 2022 (S3Delta, arXiv 2206.07382).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaops.errors import ConfigError
from deltaops.methods import LoRA
from deltaops.methods.targets import is_number
from deltaops.strategy.parts import Action, Run
from deltaops.surgery import rescale, resize
from deltaops.surgery.components import Sized, part_of, sized_places, trained

from .limits import check_count
from .looking import Loss, gradients, looking
from .shift import shifted, through_shift

_LEAST = 1e-6
"""No z below it: an alpha of 0 would leave B without a gradient for good."""


class ShiftedSigmoid:
    """A part of a controller that chooses the places of a LoRA."""

    announces = True

    def __init__(
        self,
        parameters: int,
        held_out: Sequence[Any],
        loss: Loss,
        *,
        until: int,
        part: str | None = None,
        every: int = 1,
        lr: float = 0.1,
        temperature: float = 1.0,
        draws: bool = True,
        name: str = "sigmoid",
    ) -> None:
        """Settings.

        Args:
            parameters: what the part trains after the search, at most, and during it in
                expectation.
            held_out: batches that training does not see; one is taken for each update, in turn.
            loss: ``loss(model, batch)`` → one number. The model evaluates: dropout is off.
            until: the optimizer step after which the places are chosen.
            part: of a combination; its LoRA.
            every: steps between two updates of α.
            lr: Adam's, of α.
            temperature: τ; lower makes p move faster from ½.
            draws: False lets z be p itself, without chance.
            name: of this part.
        Raises: ConfigError.
        """
        for field, count in (("parameters", parameters), ("until", until), ("every", every)):
            check_count("ShiftedSigmoid", field, count)
        for field, number in (("lr", lr), ("temperature", temperature)):
            if not is_number(number) or number <= 0:
                raise ConfigError(f"ShiftedSigmoid: {field} must be above 0, got {number!r}.")
        if not isinstance(held_out, Sequence) or not held_out:
            raise ConfigError(
                "ShiftedSigmoid: held_out must be a sequence with at least one batch, got "
                f"{type(held_out).__name__}. Pass a list of batches that training does not see."
            )
        self.name, self.part = name, part
        self.parameters, self.until, self.every = parameters, until, every
        self.temperature, self.draws = temperature, draws
        self._held_out, self._loss = held_out, loss
        self._seen = 0
        self._done = False
        self._scales: dict[str, float] = {}
        """Path → the scale that the branch has by itself."""
        self._lr = lr
        self._search(torch.zeros(0))

    def __repr__(self) -> str:
        """Its settings; of the batches, how many."""
        return (
            f"ShiftedSigmoid({self.parameters}, held_out={len(self._held_out)}, "
            f"until={self.until}, part={self.part!r}, every={self.every}, lr={self._lr}, "
            f"temperature={self.temperature}, draws={self.draws})"
        )

    # --------------------------------------------------------------------------- as a Part

    def begin(self, run: Run) -> Iterable[Action]:
        """Check the budget, and let every branch count by its share.

        Raises: ConfigError, before anything changes.
        """
        places = self._places(run)
        whole = trained(places.values())
        if self.parameters >= whole:
            raise ConfigError(
                f"ShiftedSigmoid: the budget must be below the {whole:,} parameters of all "
                f"{len(places)} places, or there is nothing to choose, and is "
                f"{self.parameters:,}. Lower it, or attach to more places."
            )
        if min(place.parameters(place.rank) for place in places.values()) > self.parameters:
            raise ConfigError(
                "ShiftedSigmoid: the budget must hold one place at the rank that it has, and is "
                f"{self.parameters:,}. Raise it, or attach a lower rank."
            )
        if run.steps is not None and self.until >= run.steps:
            raise ConfigError(
                f"ShiftedSigmoid: until must leave steps of the {run.steps} of the run to train "
                f"what was chosen, got {self.until}. Lower it."
            )
        delta = next(iter(places.values())).delta
        assert isinstance(delta, LoRA)  # _places saw to it
        self._scales = {path: delta.scaling_at(path) for path in places}
        self._search(torch.zeros(len(places)))
        self._seen, self._done = 0, False
        p = self._probabilities(places)
        self._count(run, self._draw(p, run))
        reason = (
            f"the search begins: {self.parameters:,} of {whole:,} parameters are expected, so "
            f"every place counts with p = {p[0]:.3g} until step {self.until}"
        )
        return [Action("weigh", self._delta(run), reason, detail={"p": float(p[0])})]

    def after_backward(self, run: Run) -> Iterable[Action]:
        """Nothing: what is learned here is learned on held-out batches."""
        return ()

    def after_step(self, run: Run) -> Iterable[Action]:
        """Learn α, draw z for the next step, and at the end choose."""
        if self._done:
            return ()
        if not self._scales:
            raise ConfigError(
                "ShiftedSigmoid: begin(run) must come before the first step, or restore(…) of a "
                "run that began. The controller calls them."
            )
        places = self._places(run)
        # no copy of the run for these: scales are all that changes, and `leave` gives them back
        if run.step % self.every == 0:
            self._learn(run, places)
        p = self._probabilities(places)
        if run.step >= self.until:
            run.secure()
            return self._choose(run, places, p)
        self._count(run, self._draw(p, run))
        return ()

    def after_evaluation(self, run: Run) -> Iterable[Action]:
        """Nothing."""
        return ()

    def leave(self, run: Run) -> None:
        """See :class:`Part`: every branch counts whole again."""
        if self._scales and not self._done:
            rescale(run.handle, self._scales, part=self.part)

    def close(self, run: Run) -> Iterable[Action]:
        """Where the run is over before the choice, all places stay, with their own scales."""
        if not self._scales or self._done:
            return ()
        self.leave(run)
        self._done = True
        reason = (
            f"the run ended at step {run.step}, before the choice at step {self.until}: all "
            f"{len(self._scales)} places stay, each with its own scale"
        )
        return [Action("left alone", self._delta(run), reason)]

    def state(self) -> dict[str, Any]:
        """See :class:`Part`."""
        return {
            "scales": self._scales,
            "seen": self._seen,
            "done": self._done,
        }

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`Part`."""
        known: dict[str, Tensor] = self._adam.state[self._alpha]
        return {"alpha": self._alpha.detach()} | known

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """See :class:`Part`."""
        self._scales, self._seen = dict(state["scales"]), state["seen"]
        self._done = state["done"]
        self._search(tensors["alpha"])
        known = {key: value.clone() for key, value in tensors.items() if key != "alpha"}
        if known:
            self._adam.state[self._alpha] = known

    def probabilities(self, run: Run) -> dict[str, float]:
        """Path → p now, while the search lasts."""
        places = self._places(run)
        return dict(zip(places, self._probabilities(places).tolist(), strict=True))

    # ---------------------------------------------------------------------------- details

    def _search(self, alpha: Tensor) -> None:
        """Search from ``alpha`` on."""
        self._alpha = nn.Parameter(alpha.to(torch.float64, copy=True))
        self._adam = torch.optim.Adam([self._alpha], lr=self._lr)

    def _places(self, run: Run) -> dict[str, Sized]:
        places = sized_places(run.handle, self.part, "ShiftedSigmoid")
        delta = next(iter(places.values())).delta
        if not isinstance(delta, LoRA) or delta.use_dora:
            raise ConfigError(
                f"ShiftedSigmoid: {delta!r} must be a LoRA without use_dora, whose branches just "
                "add. Name a part that is one."
            )
        return places

    def _delta(self, run: Run) -> str:
        return part_of(run.handle, self.part, "ShiftedSigmoid") or run.handle.name

    def _probabilities(self, places: Mapping[str, Sized]) -> Tensor:
        return shifted(self._alpha.detach(), _sizes(places), self.parameters, self.temperature)

    def _draw(self, p: Tensor, run: Run) -> Tensor:
        """z ``[P]``."""
        if not self.draws:
            return p.clamp(min=_LEAST)
        u = torch.rand(len(p), generator=run.generator, dtype=torch.float64)
        tiny = torch.finfo(torch.float64).eps
        chance = torch.logit(u.clamp(tiny, 1 - tiny))
        return torch.sigmoid(chance + torch.logit(p.clamp(tiny, 1 - tiny))).clamp(min=_LEAST)

    def _count(self, run: Run, z: Tensor) -> None:
        """Let every branch count ``z`` times."""
        scales = {
            path: scale * factor
            for (path, scale), factor in zip(self._scales.items(), z.tolist(), strict=True)
        }
        rescale(run.handle, scales, part=self.part)

    def _learn(self, run: Run, places: Mapping[str, Sized]) -> None:
        """One step of α on the next held-out batch."""
        p = self._probabilities(places)
        z = self._draw(p, run)
        self._count(run, z)
        at = self._seen % len(self._held_out)
        batch = self._held_out[at]
        self._seen += 1
        ups = [place.ends[1] for place in places.values()]
        with looking(run.model):
            found = gradients("ShiftedSigmoid", run.model, self._loss, batch, ups)
        pairs = zip(found, ups, strict=True)
        products = [float((g.double() * up.detach().double()).sum()) for g, up in pairs]
        by_x = torch.tensor(products, dtype=torch.float64) * (1 - z)
        if not bool(torch.isfinite(by_x).all()):
            raise ConfigError(
                f"ShiftedSigmoid: the gradient of held-out batch {at} must be finite, and holds "
                "NaN or infinity. Compute the loss in float32 or bfloat16."
            )
        self._alpha.grad = through_shift(by_x, p, _sizes(places), self.temperature)
        self._adam.step()

    def _choose(self, run: Run, places: Mapping[str, Sized], p: Tensor) -> list[Action]:
        """Keep the likeliest places that fit, with their own scales, and take the others out."""
        left = self.parameters
        chosen: list[str] = []
        for at in p.sort(descending=True, stable=True).indices.tolist():
            path, place = list(places.items())[at]
            if place.parameters(place.rank) <= left:
                left -= place.parameters(place.rank)
                chosen.append(path)
        rescale(run.handle, self._scales, part=self.part)
        gone = {path: 0 for path in places if path not in chosen}
        resize(run.handle, gone, part=self.part, optimizer=run.optimizer)
        self._done = True
        delta, by_path = self._delta(run), dict(zip(places, p.tolist(), strict=True))
        worst = min(by_path[path] for path in chosen)
        actions = [
            Action(
                "enable",
                delta,
                f"step {run.step}: p = {by_path[path]:.3g}, among the {len(chosen)} of "
                f"{len(places)} places that {self.parameters:,} parameters hold",
                path,
                {"p": by_path[path]},
            )
            for path in places
            if path in chosen
        ]
        actions += [
            Action(
                "disable",
                delta,
                f"step {run.step}: p = {by_path[path]:.3g}, where the {len(chosen)} places within "
                f"{self.parameters:,} parameters have {worst:.3g} at least",
                path,
                {"p": by_path[path]},
            )
            for path in gone
        ]
        return actions


def _sizes(places: Mapping[str, Sized]) -> Tensor:
    found = [place.parameters(place.rank) for place in places.values()]
    return torch.tensor(found, dtype=torch.float64)
