"""What the pools of a model choose: the last batch, how often each item was chosen, a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from deltaops.errors import AttachError, ShapeError
from deltaops.files import write_atomically
from deltaops.modules import Pool, PooledPrefixes, PooledPrompts

BAR = 30


@dataclass(frozen=True)
class Choices:
    """What a pool chose. Print it for a table of its items.

    Attributes:
        indices: of the last batch, the chosen items of each sample, rising ``[B, k]``.
        similarities: of the last batch, cosines of each sample with all keys ``[B, N]``.
        usage: how often each was chosen since the record began, int64 ``[N]``.
    """

    indices: Tensor
    similarities: Tensor
    usage: Tensor

    def counts(self, groups: Sequence[str]) -> dict[str, Tensor]:
        """Group → how often its samples of the last batch chose each item, int64 ``[N]``.

        Args:
            groups: a name for each sample of the last batch.
        Raises: ShapeError where there are not as many.
        """
        if len(groups) != len(self.indices):
            raise ShapeError(
                f"choices: expected a group for each of the {len(self.indices)} samples of the "
                f"last batch, got {len(groups)}."
            )
        size = len(self.usage)
        return {
            group: torch.bincount(
                self.indices[[i for i, g in enumerate(groups) if g == group]].flatten().cpu(),
                minlength=size,
            )
            for group in dict.fromkeys(groups)
        }

    def __str__(self) -> str:
        """A line for each item: how often it was chosen, and its cosines in the last batch."""
        total, most = max(1, int(self.usage.sum())), max(1, int(self.usage.max()))
        means = self.similarities.mean(0).tolist()
        lines = ["number   chosen          mean cosine"]
        for i, (used, mean) in enumerate(zip(self.usage.tolist(), means, strict=True)):
            bar = "█" * round(BAR * used / most)
            lines.append(f"{i:>6} {used:>8} {used / total:>6.1%} {mean:>12.3f}  {bar}".rstrip())
        return "\n".join(lines)

    def draw(self, path: str | os.PathLike[str]) -> None:
        """The last batch as a picture (PNG): cosines, the chosen ones marked; usage above."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        canvas = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
        FigureCanvasAgg(canvas)  # no display
        axes = canvas.add_subplot()
        shown = axes.imshow(
            self.similarities.cpu().float().numpy(),
            aspect="auto",
            cmap="Blues",
            interpolation="nearest",
        )
        rows = torch.arange(len(self.indices)).repeat_interleave(self.indices.shape[1])
        axes.scatter(
            self.indices.flatten().tolist(), rows.tolist(), s=6, color="#c0392b", label="chosen"
        )
        axes.set_xlabel("number (below: how often it was chosen)")
        axes.set_xticks(
            range(len(self.usage)), [f"{i}\n{n}" for i, n in enumerate(self.usage.tolist())],
            fontsize=7,
        )  # fmt: skip
        axes.set_ylabel("sample of the last batch")
        axes.legend(loc="upper right", fontsize=8, framealpha=0.9)
        canvas.colorbar(shown, label="cosine of sample and key")
        write_atomically(Path(path), lambda part: canvas.savefig(part, format="png"))


def choices(model: nn.Module, *, of: str | None = None, reset: bool = False) -> Choices:
    """What the pool of ``model`` chose. A compiled model keeps no record.

    Args:
        model: with a :class:`deltaops.PromptPool` or a :class:`deltaops.PrefixPool`.
        of: "prompts" or "prefixes"; where it has both, one must be named.
        reset: begin the record anew after this; then an empty record is no error.
    Raises: AttachError where there is no pool, or it has chosen nothing yet.
    """
    pool = _pool(model, of)
    last, usage = pool.last, pool.usage
    if last is None or usage is None:
        if not reset:
            raise AttachError(
                "choices: the pool has chosen nothing yet. Call the model on a batch first, "
                "without torch.compile."
            )
        none = pool.keys.detach().new_zeros(0, len(pool.keys))
        found = Choices(none[:, : pool.top_k].long(), none, none.new_zeros(len(pool.keys)).long())
    else:
        found = Choices(last.indices, last.similarities, usage)
    if reset:
        pool.forget()
    return found


def auxiliary_loss(model: nn.Module) -> Tensor:
    """What the last pass in training adds to the loss, a scalar, for a loss of your own:
    ``loss = criterion(model(**inputs).logits, y) + deltaops.auxiliary_loss(model)``.

    A loss that the model returned holds it already.
    Raises: AttachError where there is no pool, or no pass in training yet.
    """
    found = [pool.auxiliary for pool in _pools(model, "auxiliary_loss").values()]
    terms = [term for term in found if term is not None]
    if not terms:
        raise AttachError(
            "auxiliary_loss: there was no pass in training yet. Call model.train() and the model "
            "on a batch first."
        )
    return sum(terms[1:], terms[0])


def _pool(model: nn.Module, of: str | None) -> Pool:
    pools = _pools(model, "choices")
    if of is None and len(pools) == 1:
        return next(iter(pools.values()))
    if of not in pools:
        raise AttachError(
            f"choices: of must be one of the pools of {type(model).__name__}, "
            f"{' or '.join(map(repr, pools))}, got {of!r}."
        )
    return pools[of]


def _pools(model: nn.Module, subject: str) -> dict[str, Pool]:
    """By what they hold. Raises: AttachError where there is none."""
    found = {_HOLDS[type(m)]: m for m in model.modules() if isinstance(m, Pool)}
    if not found:
        raise AttachError(
            f"{subject}: {type(model).__name__} has no pool of prompts or prefixes. Attach "
            "deltaops.PromptPool() or deltaops.PrefixPool() first."
        )
    return found


_HOLDS: dict[type[Pool], str] = {PooledPrompts: "prompts", PooledPrefixes: "prefixes"}
