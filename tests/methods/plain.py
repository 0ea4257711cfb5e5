"""Every method once more, in torch's own functions: hooks on a plain model that read plain tensors.

Independent of the package: what a hook computes is the formula at the top of the method's file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaops import IA3, Adapter, BitFit, LNTuning, LoRA, ParallelAdapter, Prefix
from deltaops.methods import Delta, Site

_PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "identity": lambda h: h,
}


def apply_plainly(
    model: nn.Module, delta: Delta, places: tuple[Site, ...], state: dict[str, Tensor]
) -> None:
    """Let ``model``, without a delta, compute what ``delta`` with the tensors in ``state`` does.

    Args:
        model: changed in place, by hooks.
        delta: of the handle.
        places: of the handle.
        state: ``handle.state()``, in the dtype of the model; what requires a gradient gets one.
    """
    if isinstance(delta, Prefix):
        state = _encoded(state, places) if delta.reparameterised else state
    for site in places:
        found = {
            k[len(site.path) + 1 :]: v for k, v in state.items() if k.startswith(site.path + ".")
        }
        _PLAIN[type(delta)](model, delta, site, found)


def _lora(model: nn.Module, delta: Any, site: Site, t: dict[str, Tensor]) -> None:
    def hook(module: Any, args: Any, y: Tensor) -> Tensor:
        a, b = t["lora_A.weight"], t["lora_B.weight"]
        y = y + delta.scaling * (args[0] @ a.T @ b.T)
        if not delta.use_dora:
            return y
        weight = module.weight.T if hasattr(module, "nf") else module.weight
        norm = (weight + delta.scaling * (b @ a).detach()).norm(dim=1)
        bias = torch.zeros(()) if module.bias is None else module.bias
        return (y - bias) * (t["lora_magnitude_vector"] / norm) + bias

    model.get_submodule(site.path).register_forward_hook(hook)


def _bottleneck(delta: Any, x: Tensor, t: dict[str, Tensor]) -> Tensor:
    if "adapter.norm_weight" in t:
        weight, bias = t["adapter.norm_weight"], t["adapter.norm_bias"]
        x = functional.layer_norm(x, x.shape[-1:], weight, bias)
    inner = _PHI[delta.non_linearity](x @ t["adapter.down.weight"].T + t["adapter.down_bias"])
    return delta.scaling * (inner @ t["adapter.up.weight"].T)


def _adapter(model: nn.Module, delta: Any, site: Site, t: dict[str, Tensor]) -> None:
    def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y + _bottleneck(delta, y, t) + t["adapter.up_bias"]

    model.get_submodule(site.path).register_forward_hook(hook)


def _parallel(model: nn.Module, delta: Any, site: Site, t: dict[str, Tensor]) -> None:
    module = model.get_submodule(site.path)
    if not site.entry:
        _replace(module, "bias", t["bias"])

        def beside(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            return y + _bottleneck(delta, args[0], t)

        module.register_forward_hook(beside)
        return
    read: list[Tensor] = []
    model.get_submodule(site.entry).register_forward_pre_hook(lambda m, args: read.append(args[0]))

    def span(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y + _bottleneck(delta, read.pop(), t) + t["adapter.up_bias"]

    module.register_forward_hook(span)


def _bitfit(model: nn.Module, delta: Any, site: Site, t: dict[str, Tensor]) -> None:
    module = model.get_submodule(site.path)
    if isinstance(module, nn.Linear | nn.LayerNorm) or hasattr(module, "nf"):
        _replace(module, "bias", t["bias"])
    else:
        module.register_forward_hook(lambda m, args, y: y + t["bias"])


def _ln_tuning(model: nn.Module, delta: Any, site: Site, t: dict[str, Tensor]) -> None:
    for key, value in t.items():
        _replace(model.get_submodule(site.path), key.removeprefix("ln_tuning_layers."), value)


def _ia3(model: nn.Module, delta: Any, site: Site, t: dict[str, Tensor]) -> None:
    module, gain = model.get_submodule(site.path), t["ia3_l"]
    if site.role == "feed-forward-output":
        module.register_forward_pre_hook(lambda m, args: (args[0] * gain[0],))
    else:
        module.register_forward_hook(lambda m, args, y: y * gain[:, 0])


def _encoded(state: dict[str, Tensor], places: tuple[Site, ...]) -> dict[str, Tensor]:
    """The keys and values that the MLP computes, in the order of the attentions."""
    t = {k.removeprefix("prefix_encoder."): v for k, v in state.items()}
    inner = torch.tanh(t["embedding"] @ t["down"].T + t["down_bias"])
    columns = (inner @ t["up"].T + t["up_bias"]).T
    found: dict[str, Tensor] = {}
    for site in (site for site in places if site.path):
        for name in ("prefix_k", "prefix_v"):
            mine, columns = columns[: site.out_features], columns[site.out_features :]
            found[f"{site.path}.{name}"] = mine.reshape(site.heads, -1, mine.shape[1]).mT
    return found


def _prefix(model: nn.Module, delta: Any, site: Site, t: dict[str, Tensor]) -> None:
    if not site.path:
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("plain prefix", _attend)
    AttentionMaskInterface.register("plain prefix", sdpa_mask)
    model.set_attn_implementation("plain prefix")  # type: ignore[operator]  # transformers'
    model.get_submodule(site.path).__dict__["plain_prefix"] = t["prefix_k"], t["prefix_v"]


def _attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float,
    is_causal: bool | None = None, position_bias: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """All scores written out, those of the prefix in front."""
    k, v = (
        torch.cat([shared.expand(len(q), -1, -1, -1), own], 2)
        .repeat_interleave(q.shape[1] // own.shape[1], 1)
        for shared, own in zip(module.plain_prefix, (k, v), strict=True)
    )  # fmt: skip
    scores = scaling * q @ k.mT
    tokens = scores[..., k.shape[2] - (own := k.shape[2] - module.plain_prefix[0].shape[1]) :]
    if position_bias is not None:
        tokens += position_bias
    if mask is None and (module.is_causal if is_causal is None else is_causal):
        mask = torch.ones(q.shape[2], own, dtype=torch.bool).tril()
    if mask is not None:
        tokens.masked_fill_(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2), None


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    module._parameters.pop(name, None)
    setattr(module, name, value)


_PLAIN: dict[type[Delta], Callable[[nn.Module, Any, Site, dict[str, Tensor]], None]] = {
    LoRA: _lora,
    Adapter: _adapter,
    ParallelAdapter: _parallel,
    BitFit: _bitfit,
    LNTuning: _ln_tuning,
    IA3: _ia3,
    Prefix: _prefix,
}
