"""PEFT's LoRA on a layer that bitsandbytes quantised (QLoRA), with its forward in one op.

Imports bitsandbytes, so it is imported only by ``deltaops.accelerate`` on a model that has such
layers. Codes are read where bitsandbytes keeps them; of scales that are codes themselves (double
quantisation) numbers are made in each pass, by bitsandbytes, as it does in its own.

The op multiplies x by the weight that the codes stand for. bitsandbytes' int8 product rounds x to
int8 as well (LLM.int8), which the op does not: it is the more accurate of the two.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Int8Params, Params4bit
from bitsandbytes.nn import Linear4bit as Base4bit
from bitsandbytes.nn import Linear8bitLt as Base8bit
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import Tensor, nn

from deltaops.ops import Branch, QuantizedWeight, quantized_linear

from .peft_linear import adapters, busy, unreadable


class _PeftQuantized(nn.Module):
    """What both kinds share. ``_read`` and ``_dtype`` are theirs."""

    backend: str
    """Passed to :func:`deltaops.ops.quantized_linear`."""
    strict: bool
    """Passed to :func:`deltaops.ops.quantized_linear`."""

    layout = "row"
    """Of the weight that the codes stand for; see :func:`deltaops.backends.calls.weight_layout`."""

    _modules: dict[str, Any]

    def base(self) -> tuple[Tensor, Tensor | None]:
        """One number in the shape ``[N, K]`` of the weight, in the dtype of the products, and bias
        ``[N]``."""
        layer = self._modules["base_layer"]
        n, k = layer.out_features, layer.in_features
        like = torch.empty((1, 1), dtype=self._dtype(layer), device=layer.weight.device)
        return like.expand(n, k), layer.bias

    def branches(self) -> list[Branch]:
        """The branches of the active adapters; empty where PEFT's own forward runs."""
        found = self._resolve()
        return [] if isinstance(found, str) else found[1]

    def slow_reason(self) -> str | None:
        """Why the next call runs PEFT's own forward; None when the op runs it."""
        found = self._resolve()
        return found if isinstance(found, str) else None

    def note(self) -> str:
        """What a report adds: the calls that go to PEFT's forward nevertheless."""
        found = self._resolve()
        if isinstance(found, str):
            return ""
        weight, _ = found
        fixed = self._fixed(self._modules["base_layer"])
        inputs = "" if fixed is None else f" and for inputs other than {fixed}"
        return (
            f"; {weight.kind} codes, blocks of {weight.block}; PEFT's forward for adapter_names"
            f"{inputs}"
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: ``[..., K]`` → ``[..., N]``, in the dtype of x."""
        found = None if args or kwargs else self._resolve(_product_dtype(x))
        if found is None or isinstance(found, str):
            theirs: Tensor = super().forward(x, *args, **kwargs)
            return theirs
        weight, branches = found
        bias = self._modules["base_layer"].bias
        if bias is not None:
            bias = bias.to(x.dtype)
        y = quantized_linear(x, weight, bias, branches, backend=self.backend, strict=self.strict)
        return y.to(x.dtype)  # under autocast bitsandbytes returns the dtype of x, too

    def _resolve(
        self, dtype: torch.dtype | None = None
    ) -> tuple[QuantizedWeight, list[Branch]] | str:
        """What the op takes for the next call, or the reason why PEFT's own forward must run it.

        dtype: in which the op would multiply; None where no call is at hand.
        """
        reason = busy(self)
        if reason is not None:
            return reason
        layer = self._modules["base_layer"]
        fixed = self._fixed(layer)
        if dtype is not None and fixed not in (None, dtype):
            return f"the layer multiplies in {fixed}, its input is {dtype}: PEFT's forward"
        weight = self._read(layer)
        if isinstance(weight, str):
            return weight
        branches = adapters(self, dtype or self._dtype(layer))
        return branches if isinstance(branches, str) else (weight, branches)

    def _fixed(self, layer: Any) -> torch.dtype | None:
        """The dtype of the layer's products where it is not that of x."""
        return None

    def _dtype(self, layer: Any) -> torch.dtype:
        raise NotImplementedError

    def _read(self, layer: Any) -> QuantizedWeight | str:
        raise NotImplementedError


class PeftLinear4bit(_PeftQuantized, Linear4bit):
    """An exact ``peft.tuners.lora.bnb.Linear4bit`` of NF4 after ``deltaops.accelerate``."""

    base_class = Linear4bit

    def _fixed(self, layer: Any) -> torch.dtype | None:
        found: torch.dtype | None = layer.compute_dtype
        return found

    def _dtype(self, layer: Any) -> torch.dtype:
        state = layer.weight.quant_state
        found: torch.dtype = layer.compute_dtype or (
            torch.float32 if state is None else state.dtype
        )
        return found

    def _read(self, layer: Any) -> QuantizedWeight | str:
        reason = never(layer) or unreadable(layer, "base_layer", Params4bit)
        if reason is not None:
            return reason
        weight = layer.weight
        state = weight.quant_state
        if state is None:
            return "the weight is not quantised yet: PEFT's forward"
        if getattr(state, "packing_format_for_cpu", False):
            return "bitsandbytes keeps its codes in an order for the CPU: PEFT's forward"
        scales = state.absmax
        if state.nested:
            scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
        n, k = state.shape
        codes = weight.data.view(torch.uint8).reshape(-1)
        return QuantizedWeight(codes, scales.float(), (n, k), "nf4", state.blocksize)


class PeftLinear8bit(_PeftQuantized, Linear8bitLt):
    """An exact ``peft.tuners.lora.bnb.Linear8bitLt`` after ``deltaops.accelerate``."""

    base_class = Linear8bitLt

    def _dtype(self, layer: Any) -> torch.dtype:
        # of what the weight was before, nothing is left
        return torch.float16 if layer.bias is None else layer.bias.dtype

    def _read(self, layer: Any) -> QuantizedWeight | str:
        reason = never(layer) or unreadable(layer, "base_layer", Int8Params)
        if reason is not None:
            return reason
        # they move from the weight to the state in bitsandbytes' first forward pass
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        codes = layer.weight.data
        if scales is None or codes.dtype != torch.int8:
            return "the weight is not quantised yet: PEFT's forward"
        n, k = codes.shape
        return QuantizedWeight(codes, scales.float() / 127.0, (n, k), "int8", k)


CLASSES: dict[type, type[_PeftQuantized]] = {
    Linear4bit: PeftLinear4bit,
    Linear8bitLt: PeftLinear8bit,
}
"""Of PEFT → what it becomes."""


def never(base: Any) -> str | None:
    """Why the op can never read this layer of bitsandbytes; None where it may."""
    if type(base) not in (Base4bit, Base8bit):
        return f"base_layer is a {type(base).__name__}: PEFT's forward"
    if type(base) is Base4bit and base.weight.quant_type != "nf4":
        return f"its codes are {base.weight.quant_type}, not nf4: PEFT's forward"
    if type(base) is Base8bit and base.state.has_fp16_weights:
        return "its weight is quantised anew in each call: PEFT's forward"
    return None


def _product_dtype(x: Tensor) -> torch.dtype:
    """In which the op multiplies, under autocast too."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
