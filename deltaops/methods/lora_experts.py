"""LoRA on the experts of a mixture: its start, what it merges into, and PEFT's file for it.

Ours    A [E, r, K] and B [E, N, r] beside a parameter W [E, N, K]
PEFT's  A [E·r, K], expert after expert, and B [N, r·E], in whose rows the experts' numbers of one
        direction are neighbours; parameters of one module are wrapped one in another, the first
        one innermost, and ``base_layer.`` in a key leads inwards
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from deltaops.modules import (
    DeltaExperts,
    LoraSettings,
    become_experts,
    start_experts,
)
from deltaops.ops.paths import no_autocast

from .base import EXPERTS, PEFT_PREFIX, Binding, Site, adapter_dtype, wide

SIDES = ("lora_A", "lora_B")


def bind(
    module: nn.Module,
    site: Site,
    binding: Binding,
    settings: Callable[[str], LoraSettings],
    *,
    gaussian: bool,
    autocast: bool,
) -> None:
    """Add a branch beside each of the site's parameters.

    Args:
        module: of the experts.
        site: of the module.
        binding: how.
        settings: of the parameter at a path.
        gaussian: how A starts.
        autocast: whether A and B are float32 beside a weight in half precision.
    """
    place = become_experts(module, binding.backend, binding.strict, binding.pack)
    for name in site.parameters:
        weight = place.get_parameter(name)
        found = settings(f"{site.path}.{name}")
        experts, rows, columns = weight.shape
        a, b = start_experts(
            experts,
            found.r,
            columns,
            rows,
            device=weight.device,
            dtype=adapter_dtype(weight, autocast),
            generator=binding.generator,
            gaussian=gaussian,
        )
        place.add_lora(binding.name, name, found, a, b)


def tensors(module: DeltaExperts, name: str) -> dict[str, nn.Parameter]:
    """``lora_A.<parameter>`` and ``lora_B.<parameter>``, parameter after parameter."""
    return {
        f"{side}.{parameter}": factor
        for parameter in module.lora[name]
        for side, factor in zip(SIDES, module.factors(name, parameter), strict=True)
    }


def shapes(site: Site, module: nn.Module, rank: Callable[[str], int]) -> dict[str, tuple[int, ...]]:
    """Those of :func:`tensors`.

    Args:
        site: of the module.
        module: with or without the delta.
        rank: of the parameter at a path.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name in site.parameters:
        experts, rows, columns = module.get_parameter(name).shape
        r = rank(f"{site.path}.{name}")
        found[f"lora_A.{name}"] = (experts, r, columns)
        found[f"lora_B.{name}"] = (experts, rows, r)
    return found


@torch.no_grad()
def merged(module: DeltaExperts, name: str) -> dict[str, Tensor]:
    """``W_e + s · B_e A_e`` of every expert, by parameter, in float32 at least."""
    found: dict[str, Tensor] = {}
    for parameter, settings in module.lora[name].items():
        weight = module.get_parameter(parameter)
        a, b = module.factors(name, parameter)
        exact = torch.promote_types(wide(weight), a.dtype)
        with no_autocast(weight.device):
            found[parameter] = torch.baddbmm(
                weight.to(exact), b.to(exact), a.to(exact), alpha=settings.scaling
            )
    return found


# ----------------------------------------------------------------------------------------- files


def to_peft(found: Mapping[str, Tensor], sites: tuple[Site, ...]) -> dict[str, Tensor]:
    """Keys and tensors in PEFT's file; all but those of experts as they are, with its prefix."""
    theirs = _theirs(sites)
    return {
        PEFT_PREFIX + theirs.get(key, key): _peft_layout(key, tensor) if key in theirs else tensor
        for key, tensor in found.items()
    }


def from_peft(
    found: Mapping[str, Tensor], sites: tuple[Site, ...], rank: Callable[[str], int]
) -> dict[str, Tensor]:
    """Undo :func:`to_peft`.

    Args:
        found: of the file.
        sites: of the delta.
        rank: of the parameter at a path.
    """
    plain = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in found.items()}
    for site in sites:
        ours = _keys(site)
        # all out before any goes in: one's key in the file is no other's key here, but looks alike
        taken = {key: plain.pop(other) for key, other in ours.items()}
        for key, tensor in taken.items():
            r = rank(site.key(key.rpartition(".")[2]))
            if ".lora_A." in key:
                plain[key] = tensor.view(-1, r, tensor.shape[1])
            else:
                plain[key] = tensor.view(len(tensor), r, -1).permute(2, 0, 1)
    return plain


def _peft_layout(key: str, tensor: Tensor) -> Tensor:
    if ".lora_A." in key:
        return tensor.flatten(0, 1)
    return tensor.permute(1, 2, 0).flatten(1)


def _theirs(sites: tuple[Site, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for site in sites:
        found |= _keys(site)
    return found


def _keys(site: Site) -> dict[str, str]:
    """Our key → PEFT's, of the tensors of one site; empty where it is no mixture's."""
    if site.place != EXPERTS:
        return {}
    return {
        site.key(f"{side}.{name}"): site.key("base_layer." * depth + f"{side}.weight")
        for depth, name in enumerate(reversed(site.parameters))
        for side in SIDES
    }


# ------------------------------------------------------------- names that PEFT takes for experts'

_FORMER = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
"""Names of layers inside experts, and of routers, before transformers kept them in 3-D parameters.
From ``peft.utils.transformers_weight_conversion``, 0.21.2."""

_FAMILIES = {
    "mixtral": "mixtral minimax minimax_m2",
    "qwen2_moe": "afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 "
    "dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe glm4_moe_lite glm4v_moe glm_moe_dsa "
    "hunyuan_v1_moe longcat_flash mellum olmoe qwen3_moe qwen3_next qwen3_omni_moe "
    "qwen3_omni_moe_text qwen3_omni_moe_thinker solar_open",
}
"""Model types by the names that they had: what ``transformers.conversion_mapping`` 5.23 has of
these two, as PEFT reads it, by types alone. A copy, since it is private there; a test compares."""


def converted(model: nn.Module, names: Iterable[str]) -> str | None:
    """Why PEFT would change a file with ``names`` when it reads it; None where it would not.

    PEFT takes every target that ends in a former name for experts, also where it is a layer beside
    them, and raises the rank of what it then aims at.

    Args:
        names: of targets, or their paths.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    for family, kinds in _FAMILIES.items():
        if kind not in kinds.split():
            continue
        for name in names:
            if name.rpartition(".")[2] in _FORMER[family]:
                return f"in a {kind} it takes {name!r} for a part of experts"
    return None
