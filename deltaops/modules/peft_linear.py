"""PEFT's LoRA ``Linear`` with its forward in one op; parameters, keys and methods are PEFT's own.

Imports peft, so it is imported only by ``deltaops.accelerate``.

PEFT's state decides each call anew: adapters can be disabled, merged, switched or added at any
time. Whatever the op cannot do goes to PEFT's own forward, and :meth:`PeftLoraLinear.slow_reason`
says why; the same function decides in ``forward``, so the report cannot disagree with the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from deltaops.ops import Branch, Layer, delta_linear
from deltaops.packing import PACKING, Policy

from .kinds import is_conv1d
from .linear import FrozenLinear
from .place import UNFROZEN
from .sharing import shared

TELLER = "_adapter_names_pre_forward_hook"
"""The function of a hook that tells a layer ``adapter_names``, as PEFT calls it."""


class PeftLoraLinear(PeftLinear):
    """An exact ``peft.tuners.lora.layer.Linear`` after ``deltaops.accelerate``."""

    base_class = PeftLinear

    backend: str
    """Passed to :func:`deltaops.ops.delta_linear`."""
    strict: bool
    """Passed to :func:`deltaops.ops.delta_linear`."""
    pack: Policy
    """See :class:`deltaops.modules.LinearPlace`."""

    # torch types these as holding None, which those of a PEFT layer do not
    _modules: dict[str, Any]
    _parameters: dict[str, Any]

    def base(self) -> tuple[Tensor, Tensor | None]:
        """Weight ``[N, K]`` and bias ``[N]`` of the base layer, as the op takes them."""
        layer = self._modules["base_layer"]
        weight = layer._parameters["weight"]
        if not isinstance(layer, nn.Linear):
            weight = weight.t()
        return weight, layer._parameters["bias"]

    def branches(self) -> list[Branch]:
        """The branches of the active adapters; empty where PEFT's own forward runs."""
        found = self._resolve()
        return [] if isinstance(found, str) else found

    def slow_reason(self) -> str | None:
        """Why the next call runs PEFT's own forward; None when the op runs it."""
        found = self._resolve()
        return found if isinstance(found, str) else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: ``[..., K]`` → ``[..., N]``, in the dtype that the base layer returns."""
        layer = None
        if not args and not kwargs:
            y = shared(self, x)
            if y is not None:
                return y
            layer = self.layer(x)
        elif not args and kwargs.keys() == {"adapter_names"}:  # others are aLoRA offsets and such
            names = kwargs["adapter_names"]
            y = None if names is None else shared(self, x, names)
            if y is not None:
                return y
            layer = self.layer_by_row(x, names)
        if layer is None:
            theirs: Tensor = super().forward(x, *args, **kwargs)
            return theirs
        return delta_linear(x, *layer, backend=self.backend, strict=self.strict)

    def layer(self, x: Tensor) -> Layer | None:
        """What the op takes for the next call, of ``x``; None where PEFT's own forward runs it."""
        return self._layer(self._resolve())

    @staticmethod
    def is_told(hook: Any) -> bool:
        """Whether a forward pre-hook only brings ``adapter_names``, PEFT's or ours."""
        return getattr(getattr(hook, "func", None), "__name__", "") == TELLER

    def layer_by_row(self, x: Tensor, names: Sequence[str] | None) -> Layer | None:
        """The same where sample i of x ``[samples, ..., K]`` has the adapter ``names[i]``.

        "__base__" and adapters that this layer lacks add nothing, as in PEFT. Raises: what PEFT
        raises for names that do not fit the layer's state.
        """
        if names is None or x.dim() < 2:
            return None
        self._check_forward_args(x, adapter_names=names)  # type: ignore[no-untyped-call]  # PEFT's
        here = self._modules["lora_A"]._modules
        present = list(dict.fromkeys([name for name in names if name in here]))
        layer = self._layer(self._resolve(present))
        if layer is None or not present:
            return layer
        numbers = [present.index(name) if name in present else -1 for name in names]
        if numbers == [0] * len(numbers):
            return layer  # one adapter for all: nothing to tell apart
        ids = torch.tensor(numbers, dtype=torch.int32, device=x.device)
        by_sample = ids.reshape(-1, *[1] * (x.dim() - 2))
        return layer._replace(adapter=by_sample.expand(x.shape[:-1]))

    def _layer(self, branches: list[Branch] | str) -> Layer | None:
        if isinstance(branches, str):
            return None
        weight, bias = self.base()
        if self.pack != "auto":
            PACKING.keep_policy(weight, self.pack)
        return Layer(weight, bias, branches)

    def _resolve(self, names: Sequence[str] | None = None) -> list[Branch] | str:
        """The branches of the next call, or the reason why PEFT's own forward must run it.

        names: of the adapters; None: the active ones.
        """
        reason = busy(self)
        if reason is not None:
            return reason
        layer = self._modules["base_layer"]
        reason = unreadable(layer, "base_layer")
        if reason is not None:
            return reason
        if not is_base(type(layer)):
            return f"base_layer is a {type(layer).__name__}: PEFT's forward"
        weight = layer._parameters["weight"]
        if weight.requires_grad:
            return UNFROZEN
        return adapters(self, weight.dtype, names)


def busy(layer: Any) -> str | None:
    """Why a LoRA layer of PEFT is in no state for the op, whatever its base."""
    if layer._disable_adapters:
        return "adapters are disabled: PEFT's forward"
    if layer.merged_adapters:
        return "adapters are merged: PEFT's forward"
    if layer.lora_variant:
        return f"a LoRA variant is set ({_variants(layer)}): PEFT's forward"
    return None


def adapters(
    layer: Any, dtype: torch.dtype, names: Sequence[str] | None = None
) -> list[Branch] | str:
    """The branches of a LoRA layer of PEFT, or the reason why PEFT's own forward must run.

    Args:
        layer: of PEFT.
        dtype: of the base layer's products.
        names: of the adapters; None: the active ones.
    """
    modules = layer._modules
    down, up = modules["lora_A"]._modules, modules["lora_B"]._modules
    drops = modules["lora_dropout"]._modules
    branches = []
    active = layer._active_adapter if names is None else names
    for name in (active,) if isinstance(active, str) else active:
        if name not in down:
            continue
        a: Any = down[name]
        b: Any = up[name]
        drop: Any = drops[name]
        reason = unreadable(a, "lora_A") or unreadable(b, "lora_B") or unreadable(drop, "dropout")
        if reason is not None:
            return reason
        if type(a) is not nn.Linear or type(b) is not nn.Linear:
            return f"lora_A and lora_B are {_pair(a, b)}: PEFT's forward"
        if a._parameters["bias"] is not None or b._parameters["bias"] is not None:
            return "lora_bias is on: PEFT's forward"
        if type(drop) is nn.Dropout:
            p = drop.p if drop.training else 0.0
        elif type(drop) is nn.Identity:
            p = 0.0
        else:
            return f"its dropout is a {type(drop).__name__}: PEFT's forward"
        lower: Any = a._parameters["weight"]
        upper: Any = b._parameters["weight"]
        if lower.dtype is not dtype and lower.dtype is not torch.float32:
            return f"adapter {lower.dtype} on {dtype}: PEFT's forward"
        branches.append(Branch(lower, upper, layer.scaling[name], p))
    return branches


def is_base(kind: type) -> bool:
    """Whether a base layer of exactly ``kind`` has a weight that the op can read."""
    return (
        kind is nn.Linear
        or kind is FrozenLinear
        or is_conv1d(kind)
        or (kind.__name__ == "FrozenConv1D" and kind.__module__ == "deltaops.modules.conv1d")
    )


def unreadable(module: Any, name: str, kind: type = nn.Parameter) -> str | None:
    """Hooks, offloading and tensor parallelism act when a module is *called*; the op only reads.

    kind: of the module's weight.
    """
    if module._forward_pre_hooks or module._forward_hooks:
        return f"hooks sit on {name}: PEFT's forward"
    if module._backward_pre_hooks or module._backward_hooks:
        return f"backward hooks sit on {name}: PEFT's forward"
    own = module.__dict__
    if "forward" in own:
        return f"the forward of {name} was replaced (offloading): PEFT's forward"
    if own.get("_hf_device_mesh") is not None:
        return f"{name} is tensor-parallel: PEFT's forward"
    if "weight" not in module._parameters:
        if type(module) is nn.Dropout or type(module) is nn.Identity or name == "dropout":
            return None
        return f"the weight of {name} is computed or sharded: PEFT's forward"
    weight = module._parameters["weight"]
    if type(weight) is not kind:
        return f"the weight of {name} is a {type(weight).__name__}: PEFT's forward"
    return None


def _variants(module: Any) -> str:
    return ", ".join(sorted({type(v).__name__ for v in module.lora_variant.values()}))


def _pair(a: nn.Module, b: nn.Module) -> str:
    return f"{type(a).__name__} and {type(b).__name__}"
