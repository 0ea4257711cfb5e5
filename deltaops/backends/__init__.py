"""The backends, in the order that ``backend="auto"`` asks them. None imports another."""

from __future__ import annotations

from functools import cache

from .base import (
    AdapterBackend,
    AttentionBackend,
    Backend,
    CrossEntropyBackend,
    DeltaLinearPlan,
    DoraNormBackend,
    GatedBackend,
    GroupingPlan,
    GroupMember,
    PrefixAttentionBackend,
    PreparingBackend,
    PromptEmbeddingBackend,
    QuantizedPlan,
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
    "GroupMember",
    "GroupingPlan",
    "NormBiasCall",
    "PlainPlan",
    "PrefixAttentionBackend",
    "PrefixAttentionCall",
    "PreparingBackend",
    "PromptEmbeddingBackend",
    "PromptEmbeddingCall",
    "QuantizedPlan",
    "RotaryBackend",
    "RotaryCall",
    "registered",
]


@cache
def registered() -> dict[str, Backend]:
    """Name → backend. Each device has one fast backend; ``reference`` takes what they refuse."""
    backends: tuple[Backend, ...] = (CpuBackend(), TritonBackend(), ReferenceBackend())
    return {backend.name: backend for backend in backends}
