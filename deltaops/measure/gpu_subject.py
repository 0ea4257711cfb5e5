"""What the GPU benchmark wants of a case: operands, a gate, peers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

FROZEN, PEFT, COMPILED, OURS = "frozen", "PEFT", "PEFT compiled", "deltaops"
DEFAULT = "PEFT's default"
UNSLOTH, LORA_FUSION = "Unsloth's arithmetic", "LoRAFusion's plan"

SCALING = 2.0

Call = Callable[[], object]
Peers = dict[str, list[Call]]
"""Name → a call for each copy of the operands."""


class Subject(Protocol):
    """What is measured; ``str`` is its line of the table."""

    op: ClassVar[str]
    """Under which key of the JSON its results stand."""

    def facts(self) -> dict[str, Any]:
        """Shape and settings, for the JSON."""

    def operands(self, device: str, cache_bytes: float) -> list[Any]:
        """Random copies, together no smaller than ``cache_bytes``; at least two."""

    def gate(self, copy: Any, backend: str) -> None:
        """Hold ours to float64. Raises: AssertionError."""

    def peers(
        self, copies: list[Any], backend: str, compile_peft: bool
    ) -> tuple[Peers, dict[str, str]]:
        """All peers, of which :data:`FROZEN` and :data:`OURS` are two, and why one is missing."""

    def plan(self, copy: Any, backend: str) -> str | None:
        """How the backend goes, in its words."""


def how_many(one: float, cache_bytes: float) -> int:
    """Copies of so many bytes each that hold ``cache_bytes``; at least two."""
    return max(2, math.ceil(cache_bytes / one))
