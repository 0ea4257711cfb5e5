"""PEFT's LoRA on experts in calls of the op; parameters, keys and methods are PEFT's own.

Imports peft, so it is imported only by ``deltaops.accelerate``.

PEFT wraps each parameter of a module in a ``ParamWrapper``, one around the other, and adds up the
weights and their deltas of all experts in every step. The outermost one, swapped for the class
here, hands the tokens to :func:`run_experts` with the factors of all. As in
:mod:`deltaops.modules.peft_linear`, PEFT's state decides each call anew.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from deltaops.ops import Branch
from deltaops.packing import Policy

from .experts import DOWN, GATE_UP, StackedBranch, Way, run_experts
from .peft_linear import unreadable
from .place import UNFROZEN


class PeftExperts(ParamWrapper):
    """An exact ``ParamWrapper``, the outermost around experts, after ``deltaops.accelerate``."""

    base_class = ParamWrapper

    backend: str
    """Passed to :func:`deltaops.ops.delta_linear`."""
    strict: bool
    """Passed to :func:`deltaops.ops.delta_linear`."""
    pack: Policy
    """See :class:`deltaops.modules.LinearPlace`."""

    def wrappers(self) -> list[ParamWrapper]:
        """This one and those inside, one for each parameter with a delta."""
        found: list[ParamWrapper] = [self]
        while isinstance(inner := found[-1].base_layer, ParamWrapper):
            found.append(inner)
        return found

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the experts': ``[T, H]`` → ``[T, H]``, for their indices and weights ``[T, J]``."""
        stacks = self._resolve()
        if isinstance(stacks, str) or len(args) != 2 or kwargs:
            theirs: Tensor = super().forward(x, *args, **kwargs)
            return theirs
        experts = self._experts()
        return run_experts(
            x,
            *args,
            (experts.gate_up_proj, stacks.get(GATE_UP, [])),
            (experts.down_proj, stacks.get(DOWN, [])),
            experts.act_fn,
            Way(self.backend, self.strict, self.pack),
        )

    def slow_reason(self) -> str | None:
        """Why the next call runs PEFT's own forward; None when the op runs it."""
        found = self._resolve()
        return found if isinstance(found, str) else None

    def base(self) -> tuple[Tensor, None]:
        """The weight ``[N, K]`` of the first expert, as an example for the report."""
        weights: Tensor = getattr(self._experts(), self.parameter_name)
        return weights[0], None

    def branches(self) -> list[Branch]:
        """Those of that expert; empty where PEFT's own forward runs."""
        found = self._resolve()
        stacks = [] if isinstance(found, str) else found[self.parameter_name]
        return [Branch(s.a[0], s.b[0], s.scaling, s.dropout) for s in stacks]

    def matrices(self) -> list[Tensor]:
        """Every weight ``[N, K]`` that the op reads."""
        experts = self._experts()
        return [*experts.gate_up_proj.unbind(), *experts.down_proj.unbind()]

    def _experts(self) -> Any:
        return self.get_base_layer()

    def _resolve(self) -> dict[str, list[StackedBranch]] | str:
        """Parameter → its branches in the next call; or why PEFT's own forward must run it."""
        experts = self._experts()
        if experts.gate_up_proj.requires_grad or experts.down_proj.requires_grad:
            return UNFROZEN
        reason = _watched(experts, "the experts")
        if reason is not None:
            return reason
        found: dict[str, list[StackedBranch]] = {}
        for wrapper in self.wrappers():
            stacks = _stacks(wrapper, getattr(experts, wrapper.parameter_name))
            if isinstance(stacks, str):
                return stacks
            if wrapper is not self and (reason := _watched(wrapper, "an inner wrapper")):
                return reason
            found[wrapper.parameter_name] = stacks
        return found


PeftExperts.__name__ = ParamWrapper.__name__  # by which PEFT tells its own, to unwrap them


def _stacks(wrapper: ParamWrapper, weight: Tensor) -> list[StackedBranch] | str:
    """The branches of the active adapters; or why PEFT's own forward must run them."""
    if wrapper.disable_adapters:
        return "adapters are disabled: PEFT's forward"
    if wrapper.merged_adapters:
        return "adapters are merged: PEFT's forward"
    if not getattr(wrapper, "_did_swap_in_out_features", False):
        return "its A reads what the experts return (a PEFT before 0.19): PEFT's forward"
    found: list[StackedBranch] = []
    for name in wrapper.active_adapters:
        if name not in wrapper.lora_A:
            continue
        a: Any = wrapper.lora_A[name]
        b: Any = wrapper.lora_B[name]
        reason = unreadable(a, "lora_A") or unreadable(b, "lora_B")
        if reason is not None:
            return reason
        if (
            type(a) is not nn.Linear
            or type(b) is not nn.Linear
            or b._parameters["bias"] is not None
        ):
            return "lora_A or lora_B is no plain linear layer: PEFT's forward"
        if a.weight.dtype is not weight.dtype and a.weight.dtype is not torch.float32:
            return f"adapter {a.weight.dtype} on {weight.dtype}: PEFT's forward"
        experts = len(weight)
        down = a.weight.view(experts, -1, a.weight.shape[1])
        # rank after rank, in each the experts: copied, a small part of what PEFT adds up
        up = b.weight.view(len(b.weight), -1, experts).permute(2, 0, 1).contiguous()
        found.append(StackedBranch(down, up, wrapper.scaling[name], 0.0))
    return found


def _watched(module: nn.Module, name: str) -> str | None:
    """Hooks and offloading act when a module is called; here it is only read."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks)
    if any(hooks) or module._backward_pre_hooks:
        return f"hooks sit on {name}: PEFT's forward"
    if "forward" in module.__dict__:
        return f"the forward of {name} was replaced (offloading): PEFT's forward"
    return None
