"""Norms as places: what counts as one, and a bias for those that have none."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .block import Block, RmsNormBlock

_OF_CHANNELS = (
    nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a LayerNorm or RMSNorm, of torch's or anybody's.

    Told by what it is made of: a vector ``weight``, perhaps a ``bias``, no children, no running
    statistics, and a class that is called a norm. torch's norms of channels are none.
    """
    if isinstance(module, _OF_CHANNELS):
        return False
    parameters = {name for name, p in module._parameters.items() if p is not None}
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.dim() == 1
        and parameters <= {"weight", "bias"}
        and not module._modules
        and not any(buffer is not None for buffer in module._buffers.values())
        and "norm" in _base(module).__name__.lower()
    )


def lacks_bias(module: nn.Module) -> bool:
    """Whether the norm's own forward knows no bias, so that one has to be added after it.

    A class that reads a bias registers one, if only as None; what :func:`allow_bias` made a block
    did not.
    """
    return isinstance(module, Block) or "bias" not in module._parameters


class BiasedNorm(Block):
    """Any norm without a bias (RMSNorm), and a bias after it."""

    kind = "norm"

    def told(self, tokens: int) -> tuple[str, str]:
        """See :class:`Block`."""
        return "torch", f"{self.base_class.__name__}'s own forward; its bias is added after it"

    def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> Tensor:
        """``[..., K]`` → ``[..., K]``; what else a norm takes (a gate) goes to its own forward."""
        y: Tensor = super().forward(hidden_states, *args, **named)
        bias = self._parameters.get("bias")
        return y if bias is None else y + bias


def allow_bias(module: nn.Module, backend: str, strict: bool) -> None:
    """Let the norm read ``bias`` where its own forward does not."""
    if not lacks_bias(module) or isinstance(module, RmsNormBlock):
        return
    module.__dict__["backend"] = backend
    module.__dict__["strict"] = strict
    module.__class__ = BiasedNorm.over(type(module), backend, strict)


def disallow_bias(module: nn.Module) -> None:
    """Undo :func:`allow_bias`; a block that runs on its op is left to those who made it."""
    if isinstance(module, Block) and module.mixin is BiasedNorm:
        module.__class__ = module.base_class  # type: ignore[assignment]  # its class of before
        for name in ("backend", "strict"):
            module.__dict__.pop(name, None)


def _base(module: Any) -> type[nn.Module]:
    found: type[nn.Module] = module.base_class if isinstance(module, Block) else type(module)
    return found
