"""Backend ``reference``: eager torch on any device and any floating dtype. The last resort."""

from __future__ import annotations

from torch import Tensor

from deltaops.reference import (
    attention,
    bottleneck,
    cross_entropy,
    delta_linear,
    dora_norm,
    gated,
    norm_bias,
    prefix_attention,
    prompt_embedding,
    rotary,
)

from .calls import Call


class ReferenceBackend:
    """The specification itself, run as it is written."""

    name = "reference"
    forward = staticmethod(delta_linear.forward)
    backward = staticmethod(delta_linear.backward)
    bottleneck_forward = staticmethod(bottleneck.forward)
    bottleneck_backward = staticmethod(bottleneck.backward)
    norm_bias_forward = staticmethod(norm_bias.forward)
    norm_bias_backward = staticmethod(norm_bias.backward)
    cross_entropy_backward = staticmethod(cross_entropy.backward)
    gated_forward = staticmethod(gated.forward)
    gated_backward = staticmethod(gated.backward)
    rotary_forward = staticmethod(rotary.forward)
    rotary_backward = staticmethod(rotary.backward)
    attention_forward = staticmethod(attention.forward)
    attention_backward = staticmethod(attention.backward)
    prefix_attention_forward = staticmethod(prefix_attention.forward)
    prefix_attention_backward = staticmethod(prefix_attention.backward)
    dora_norm = staticmethod(dora_norm.forward)
    prompt_embedding_forward = staticmethod(prompt_embedding.forward)
    prompt_embedding_backward = staticmethod(prompt_embedding.backward)

    def unavailable(self) -> str | None:
        """Always there."""
        return None

    def unsupported(self, call: Call) -> str | None:
        """Takes every floating dtype on every device that torch has."""
        return None

    def outrun(self, call: Call) -> str | None:
        """It is torch."""
        return None

    def cross_entropy_forward(
        self, logits: Tensor, target: Tensor, ignore_index: int, mean: bool
    ) -> tuple[Tensor, Tensor]:
        """The targets are looked at first: torch's own errors do not name the row."""
        cross_entropy.check_target(target, logits.shape[1], ignore_index)
        return cross_entropy.forward(logits, target, ignore_index, mean)
