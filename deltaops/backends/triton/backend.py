"""What the Triton backend takes, and which function runs what."""

from __future__ import annotations

import torch

from deltaops.backends.calls import (
    BottleneckCall,
    Call,
    DeltaLinearCall,
    DoraNormCall,
    GatedCall,
    NormBiasCall,
    PrefixAttentionCall,
    PromptEmbeddingCall,
    RotaryCall,
)

from . import (
    adapters,
    core,
    delta_linear,
    dora_norm,
    gated,
    group,
    prefix_attention,
    produce,
    prompt_embedding,
    rotary,
)


class TritonBackend:
    """Forward and backward on a GPU. Its kernels have no atomics and sum in a fixed order: the same
    bits every run. Where a plan leaves a product or an attention to the library, that holds as far
    as the library's promise does: torch's attention repeats the gradients of q, k and v under
    torch.use_deterministic_algorithms(True) alone."""

    name = "triton"
    forward = staticmethod(delta_linear.forward)
    backward = staticmethod(delta_linear.backward)
    prepare = staticmethod(group.prepare)
    prefix_attention_forward = staticmethod(prefix_attention.forward)
    prefix_attention_backward = staticmethod(prefix_attention.backward)
    bottleneck_forward = staticmethod(adapters.bottleneck_forward)
    bottleneck_backward = staticmethod(adapters.bottleneck_backward)
    norm_bias_forward = staticmethod(adapters.norm_bias_forward)
    norm_bias_backward = staticmethod(adapters.norm_bias_backward)
    may_produce = staticmethod(produce.may_produce)
    produces = staticmethod(produce.produces)
    norm_and_s = staticmethod(produce.norm_and_s)
    gated_and_s = staticmethod(produce.gated_and_s)
    gated_forward = staticmethod(gated.forward)
    gated_backward = staticmethod(gated.backward)
    rotary_forward = staticmethod(rotary.forward)
    rotary_backward = staticmethod(rotary.backward)
    dora_norm = staticmethod(dora_norm.forward)
    prompt_embedding_forward = staticmethod(prompt_embedding.forward)
    prompt_embedding_backward = staticmethod(prompt_embedding.backward)

    def unavailable(self) -> str | None:
        """None, or what is missing here."""
        if not core.installed():
            return "triton is not installed; pip install triton"
        if not core.interpreting() and not torch.cuda.is_available():
            return "torch finds no GPU; it needs one with its driver, and a torch built for it"
        return None

    def unsupported(self, call: Call) -> str | None:
        """None, or what the kernels do not take."""
        if call.device != "cuda" and not (call.device == "cpu" and core.interpreting()):
            return f"runs on a GPU, the tensors are on {call.device}"
        if isinstance(call, PrefixAttentionCall):
            return prefix_attention.unsupported(call)
        if isinstance(call, DeltaLinearCall):
            return delta_linear.unsupported(call)
        if isinstance(call, BottleneckCall | NormBiasCall):
            return adapters.unsupported(call)
        if isinstance(call, GatedCall):
            return gated.unsupported(call)
        if isinstance(call, RotaryCall):
            return rotary.unsupported(call)
        if isinstance(call, DoraNormCall):
            return dora_norm.unsupported(call)
        if isinstance(call, PromptEmbeddingCall):
            return prompt_embedding.unsupported(call)
        return f"has no kernel for {call.op} yet"

    def planned(self, call: Call) -> str | None:
        """Which of several ways the call goes here, and why; None where there is one."""
        if isinstance(call, DeltaLinearCall):
            return delta_linear.planned(call)
        if isinstance(call, PrefixAttentionCall):
            return prefix_attention.planned(call)
        return produce.planned(call)

    def outrun(self, call: Call) -> str | None:
        """None. Measured on an H200, delta_linear, groups of it and a merged prefix_attention are
        faster than torch's own. prefix_attention in one kernel, which a mask or float32 needs, is
        not (2983 µs without a mask, joined keys by torch 2155); other ops were not measured."""
        return None
