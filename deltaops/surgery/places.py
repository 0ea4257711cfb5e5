"""The kinds of place that a delta may bind to: which of them a module is, how large, and why not.

Linear layers, norms and embeddings are told by their exact type, because a subclass may compute
something else; attentions and stacks by what the module tree says of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from deltaops.methods.base import ATTENTION, EMBEDDING, EXPERTS, LINEAR, NORM, ROUTER, STACK
from deltaops.modules import (
    DOWN,
    LinearPlace,
    delta_class,
    features,
    holds_experts,
    is_norm,
    is_router,
)

from .anatomy import Whole
from .experts import unlike_experts

WORDS = {
    LINEAR: "linear layers",
    NORM: "norms",
    EMBEDDING: "embeddings",
    ATTENTION: "attentions",
    STACK: "stacks of blocks",
    EXPERTS: "experts",
    ROUTER: "routers",
}
"""What messages call the places of a kind."""

_SINGULAR = {
    LINEAR: "no linear layer",
    NORM: "no LayerNorm or RMSNorm",
    EMBEDDING: "no nn.Embedding",
    ATTENTION: "no attention of a transformer's block",
    STACK: "no stack of blocks that takes inputs_embeds",
    EXPERTS: "no experts of a mixture",
    ROUTER: "no router of one",
}

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def place_of(
    path: str, module: nn.Module, places: frozenset[str], wholes: dict[str, Whole]
) -> str | None:
    """What ``module`` is among ``places``; None where it is none of them.

    Args:
        path: of the module.
        module: any.
        places: kinds, of a delta.
        wholes: of the model; see :func:`~.anatomy.wholes`.
    """
    whole = wholes.get(path)
    if whole is not None and whole.place in places:
        return whole.place
    if NORM in places and is_norm(module):
        return NORM
    if EMBEDDING in places and type(module) is nn.Embedding:
        return EMBEDDING
    if EXPERTS in places and holds_experts(module):
        return EXPERTS
    if ROUTER in places and is_router(module):
        return ROUTER
    # whether it is a layer that can be swapped is for :func:`unswappable` to say, with a reason
    return LINEAR if LINEAR in places else None


def unswappable(
    module: nn.Module, place: str | None, parent: nn.Module | None, foreign: str = ""
) -> str | None:
    """Why surgery leaves ``module`` alone, in words; None when a delta can be bound to it.

    Args:
        module: any.
        place: what it is; None where it is nothing that the delta binds to.
        parent: the ``nn.TransformerEncoderLayer`` that the module is a child of, if any.
        foreign: what to say where ``place`` is None.
    """
    kind = type(module)
    if parametrize.is_parametrized(module):
        return "parametrized: its weight is computed at every access"
    if place is None:
        return f"{kind.__name__} is {foreign}"
    if place == LINEAR and delta_class(kind) is None:
        return _why_not_kind(module)
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (accelerate's offload does that)"
    if place in (ATTENTION, STACK):
        return None
    if place == EXPERTS:
        return unlike_experts(module) or next(
            filter(None, (_unfit(p) for p in module.parameters(recurse=False))), None
        )
    weight: Any = module.weight
    reason = _unfit(weight)
    if reason is not None or place == NORM:
        return reason
    if weight.dim() != 2 or 0 in weight.shape:
        return f"its weight has the shape {list(weight.shape)}, not two sizes above 0"
    if place == LINEAR and parent is not None:
        return "its nn.TransformerEncoderLayer reads .weight in a fast path that skips deltas"
    return None


def _unfit(weight: Any) -> str | None:
    """Why a delta cannot be beside ``weight``, whatever its shape."""
    if type(weight) is not nn.Parameter:
        return (
            f"its weight is a {type(weight).__name__}, not a plain parameter (quantized, sharded)"
        )
    if weight.dtype not in _FLOATS:
        return f"its weight is {weight.dtype}; a delta needs float16, bfloat16, float32 or float64"
    return None


def foreign(places: Iterable[str]) -> str:
    """What a module is that is none of ``places``."""
    return " and ".join(_SINGULAR[place] for place in sorted(places))


def size_of(path: str, module: nn.Module, place: str, wholes: dict[str, Whole]) -> tuple[int, int]:
    """``(in, out)`` of a linear layer or a whole, ``(entries, width)`` of an embedding, ``(hidden,
    inner)`` of experts.

    Of a router ``(hidden, experts)``; a norm has its one size twice.
    """
    if place in (ATTENTION, STACK):
        return wholes[path].in_features, wholes[path].out_features
    if place == LINEAR:
        return features(module)
    if place == EXPERTS:
        _, hidden, inner = module.get_parameter(DOWN).shape
        return hidden, inner
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    if place == ROUTER:
        return weight.shape[1], weight.shape[0]
    return weight.shape[0], weight.shape[-1]


def frozen_linears(modules: dict[str, nn.Module]) -> list[str]:
    """Paths of the linear layers without a delta that the op could run as they are."""
    parents = encoder_children(modules)
    return [
        path
        for path, module in modules.items()
        if not isinstance(module, LinearPlace)
        and unswappable(module, LINEAR, parents.get(path)) is None
    ]


def encoder_children(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Path of a child → its torch encoder layer, whose fast path reads linear1.weight directly."""
    return {
        f"{path}.{child}" if path else child: module
        for path, module in modules.items()
        if isinstance(module, nn.TransformerEncoderLayer)
        for child, _ in module.named_modules()
        if child
    }


def wanted(places: Iterable[str]) -> str:
    """The kinds of place in words."""
    return " and ".join(WORDS[place] for place in sorted(places))


def _why_not_kind(module: nn.Module) -> str:
    kind = type(module)
    home = kind.__module__.split(".")[0]
    if home == "bitsandbytes":
        return (
            f"quantized by {home} ({kind.__name__}); PEFT binds LoRA to it, and "
            "deltaops.accelerate runs that as one op"
        )
    if home in ("auto_gptq", "gptqmodel", "awq", "hqq", "eetq", "aqlm"):
        return f"quantized by {home} ({kind.__name__})"
    if isinstance(module, nn.Linear):
        return f"{kind.__name__} is a subclass of nn.Linear; only the exact type is swapped"
    if isinstance(module, nn.Embedding):
        return f"{kind.__name__} is not a linear layer but an embedding"
    if next(module.children(), None) is not None:  # an attention, a stack of blocks
        return f"{kind.__name__} is not a linear layer but a module with others inside"
    return f"{kind.__name__} is not a linear layer"
