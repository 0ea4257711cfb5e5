"""What the CPU backend takes, and which function runs what."""

from __future__ import annotations

from deltaops.backends.calls import (
    AttentionCall,
    Call,
    CrossEntropyCall,
    DeltaLinearCall,
    DoraNormCall,
    GatedCall,
    PrefixAttentionCall,
    PromptEmbeddingCall,
    RotaryCall,
)

from . import (
    adapters,
    attention,
    cross_entropy,
    delta_linear,
    gated,
    prefix_attention,
    rotary,
)
from .core import DTYPES, native


class CpuBackend:
    """Fused forward and backward on the CPU, with torch's thread count."""

    name = "cpu"
    prepare = delta_linear.CpuDeltaLinear  # see deltaops.backends.base.PreparingBackend
    forward = staticmethod(delta_linear.forward)
    backward = staticmethod(delta_linear.backward)
    bottleneck_forward = staticmethod(adapters.bottleneck_forward)
    bottleneck_backward = staticmethod(adapters.bottleneck_backward)
    norm_bias_forward = staticmethod(adapters.norm_bias_forward)
    norm_bias_backward = staticmethod(adapters.norm_bias_backward)
    cross_entropy_forward = staticmethod(cross_entropy.forward)
    cross_entropy_backward = staticmethod(cross_entropy.backward)
    gated_forward = staticmethod(gated.forward)
    gated_backward = staticmethod(gated.backward)
    rotary_forward = staticmethod(rotary.forward)
    rotary_backward = staticmethod(rotary.backward)
    attention_forward = staticmethod(attention.forward)
    attention_backward = staticmethod(attention.backward)
    rotary_attention_forward = staticmethod(attention.rotary_forward)
    rotary_attention_backward = staticmethod(attention.rotary_backward)
    prefix_attention_forward = staticmethod(prefix_attention.forward)
    prefix_attention_backward = staticmethod(prefix_attention.backward)

    def unavailable(self) -> str | None:
        """None, or why the native core is not there."""
        module = native()
        return module if isinstance(module, str) else None

    def unsupported(self, call: Call) -> str | None:
        """None, or what the native core does not take."""
        if call.device != "cpu":
            return f"runs on the CPU, the tensors are on {call.device}"
        if isinstance(call, DoraNormCall | PromptEmbeddingCall):
            return f"has no kernel for {call.op} yet"
        if call.dtype not in DTYPES:
            return f"takes float32 and bfloat16, not {call.dtype}"
        if isinstance(call, AttentionCall | CrossEntropyCall | GatedCall | RotaryCall):
            return None
        if isinstance(call, PrefixAttentionCall):
            known = call.prefix_dtype in DTYPES
            return None if known else f"takes a float32 or bfloat16 prefix, not {call.prefix_dtype}"
        if not isinstance(call, DeltaLinearCall):
            foreign = [t for t in call.parameter_dtypes if t not in DTYPES]
            return f"takes float32 and bfloat16 parameters, not {foreign[0]}" if foreign else None
        foreign = [t for t in call.adapter_dtypes if t not in DTYPES]
        if foreign:
            return f"takes float32 and bfloat16 adapters, not {foreign[0]}"
        if call.weight_layout == "strided":
            return "the weight needs rows or columns of adjacent elements"
        return None

    def outrun(self, call: Call) -> str | None:
        """None, or where torch's own attention is faster. With a prefix it needs copies and is not:
        measured with AVX-512 and two threads, within a tenth for one query, slower from 8 on."""
        return attention.outrun(call) if isinstance(call, AttentionCall) else None
