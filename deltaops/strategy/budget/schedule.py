"""How many parameters a step may have.      b(t) from b₀ down to b_T along a cube

    b₀ until the warm-up ends at t_w;  b_T once t ≥ T − t_f;  between them
    b(t) = b_T + (b₀ − b_T) · (1 − (t − t_w) / (T − t_w − t_f))³

Source: Zhang et al. 2023 (AdaLoRA, arXiv 2303.10512), §3.3.
"""

from __future__ import annotations

from typing import NamedTuple


class Schedule(NamedTuple):
    """All in optimizer steps and parameters."""

    start: int
    target: int
    steps: int
    """T, of the whole run."""
    warmup: int
    """t_w: steps before anything is taken."""
    settle: int
    """t_f: steps at the end in which ranks stay."""

    @property
    def last(self) -> int:
        """The step from which on the budget is the target and ranks stay."""
        return self.steps - self.settle

    def budget(self, step: int) -> int:
        """b(``step``), rounded down."""
        if step >= self.last:
            return self.target
        if step <= self.warmup:
            return self.start
        left = (self.last - step) / (self.last - self.warmup)
        return self.target + int((self.start - self.target) * left**3)
