"""The backends, in the order that ``backend="auto"`` asks them. None imports another."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from deltaops.errors import BuildError

from .base import (
    AdapterBackend,
    AttentionBackend,
    Backend,
    CrossEntropyBackend,
    DeltaLinearPlan,
    DoraNormBackend,
    GatedBackend,
    GivenPlan,
    GroupingPlan,
    GroupMember,
    PrefixAttentionBackend,
    PreparingBackend,
    ProducingBackend,
    PromptEmbeddingBackend,
    QuantizedPlan,
    RotaryAttentionBackend,
    RotaryBackend,
)
from .calls import (
    AttentionCall,
    BottleneckCall,
    Call,
    CrossEntropyCall,
    DeltaLinearCall,
    DoraNormCall,
    GatedCall,
    NormBiasCall,
    PrefixAttentionCall,
    PromptEmbeddingCall,
    RotaryCall,
)
from .cpu import CpuBackend
from .plain import PlainPlan
from .reference import ReferenceBackend
from .triton import TritonBackend

__all__ = [
    "AdapterBackend",
    "AttentionBackend",
    "AttentionCall",
    "Backend",
    "BottleneckCall",
    "Call",
    "CrossEntropyBackend",
    "CrossEntropyCall",
    "DeltaLinearCall",
    "DeltaLinearPlan",
    "DoraNormBackend",
    "DoraNormCall",
    "GatedBackend",
    "GatedCall",
    "GivenPlan",
    "GroupMember",
    "GroupingPlan",
    "NormBiasCall",
    "PlainPlan",
    "PrefixAttentionBackend",
    "PrefixAttentionCall",
    "PreparingBackend",
    "ProducingBackend",
    "PromptEmbeddingBackend",
    "PromptEmbeddingCall",
    "QuantizedPlan",
    "RotaryAttentionBackend",
    "RotaryBackend",
    "RotaryCall",
    "registered",
]


GROUP = "deltaops.backends"
"""The entry points by which a package adds a backend: ``name = "module:factory"``."""


@cache
def registered() -> dict[str, Backend]:
    """Name → backend. Each device has one fast backend; ``reference`` takes what they refuse.

    Those of other packages come after ours and before ``reference``: "auto" asks them for what ours
    refuse, and a name chooses one. ``deltaops.testing.conformance`` is what each is held to.

    Raises: BuildError for one that cannot be loaded, or takes a name that there is.
    """
    ours: tuple[Backend, ...] = (CpuBackend(), TritonBackend(), ReferenceBackend())
    found = {backend.name: backend for backend in ours}
    last = found.popitem()
    for entry in entry_points(group=GROUP):
        who = f"the backend {entry.name!r} of the entry point {entry.value!r}"
        try:
            backend: Backend = entry.load()()
        except Exception as error:  # another package's code may raise anything
            raise BuildError(
                f"{who} must load, and raised {error!r}. Repair or uninstall its package."
            ) from error
        name = getattr(backend, "name", None)
        if name != entry.name or name in (*found, last[0], "auto"):
            raise BuildError(
                f"{who} must have a name of its own that its object has too, got {name!r}. Rename "
                "it, or uninstall one of the packages."
            )
        found[entry.name] = backend
    return found | dict([last])
