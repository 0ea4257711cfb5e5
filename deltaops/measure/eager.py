"""Every method as one writes it in eager torch, by hooks on a plain model: the peer of our ops.

    LoRA, DoRA       y + s · B(A x);  DoRA: the sum's rows rescaled to trained lengths
    Adapter          y + s · Up φ(Down norm(y) + d) + u, y the output of a sub-layer
    ParallelAdapter  the same of the sub-layer's or layer's input
    BitFit, LNTuning the parameter itself is trained, or a bias is added where there was none
    (IA)³            the output, or a feed-forward's inner activation, times a gain
    Compacter        Adapter, its matrices formed of their Kronecker factors
    IntrinsicAdapter Adapter, all parameters decoded once a pass
    Prompt, PromptPool, Prefix, PrefixPool, IntrinsicPrompt   see :mod:`.eager_tokens`

What is trained comes under the keys of ``handle.state()``, so that losses and gradients can be held
to ours one by one. Adding a method is one function and one entry of :data:`EAGER`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaops.methods import Combined, Delta, Site
from deltaops.methods.base import MODEL
from deltaops.methods.targets import FEED_FORWARD_OUTPUT
from deltaops.modules import STATES, DecodedAdapters, DecodedBottleneck
from deltaops.surgery import Handle

from .eager_decoded import Decoded, decoding
from .eager_tokens import intrinsic_prompt, prefix, prefix_pool, prompt, prompt_pool

_DECODED = "eager_decoded"
"""In the ``__dict__`` of the model: its :class:`.eager_decoded.Decoded`."""

Leaves = dict[str, nn.Parameter]
"""Suffix of a place's tensor → what is trained."""

_PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda h: functional.gelu(h, approximate="tanh"),
    "silu": functional.silu,
    "identity": lambda h: h,
}


def missing(delta: Delta | Combined) -> str | None:
    """Why there is no eager form of ``delta`` to time; None where there is one."""
    if getattr(delta, "query", None) == STATES:
        return "a pool that chooses by states has no eager form in measure/eager.py"
    return None if delta.kind in EAGER else f"{delta.kind} has no eager form in measure/eager.py"


def eager_twin(
    base: nn.Module, handle: Handle, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy of ``base`` that computes in eager torch what the model of ``handle`` computes.

    Args:
        base: the model without a delta.
        handle: of the delta, attached to another copy of ``base``.
        dtype: of the copy and all that it trains.
    Returns: the copy, and what is trained by the keys of ``handle.state()``, in its order.
    """
    twin = copy.deepcopy(base).requires_grad_(False).to(dtype)
    leaves = {k: nn.Parameter(t.detach().to(dtype, copy=True)) for k, t in handle.state().items()}
    left = dict(leaves)
    delta = handle.delta
    assert isinstance(delta, Delta), "a combination has no eager form; see missing"
    for site in handle.places:
        bound = handle.model.get_submodule(site.path)
        own = {suffix: left.pop(site.key(suffix)) for suffix in delta.tensors(bound, handle.name)}
        EAGER[delta.kind](twin, delta, site, own, bound)
    for key, leaf in left.items():  # of modules_to_save
        path, _, name = key.rpartition(".")
        twin.get_submodule(path)._parameters[name] = leaf
    return twin, leaves


def _lora(model: nn.Module, delta: Any, site: Site, t: Leaves, bound: nn.Module) -> None:
    a, b, s = t["lora_A.weight"], t["lora_B.weight"], float(delta.scaling)

    def add(module: Any, args: Any, y: Tensor) -> Tensor:
        branch = functional.linear(functional.linear(args[0], a), b) * s
        if not delta.use_dora:
            return y + branch
        weight: Tensor = module.weight.T if hasattr(module, "nf") else module.weight
        length: Tensor = (weight + s * (b @ a).detach()).norm(dim=1)
        gain: Tensor = t["lora_magnitude_vector"] / length
        bias: Tensor | None = module.bias
        if bias is None:
            return (y + branch) * gain
        return (y - bias + branch) * gain + bias

    model.get_submodule(site.path).register_forward_hook(add)


def _bottleneck(delta: Any, x: Tensor, t: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    if "adapter.norm_weight" in t:
        x = functional.layer_norm(x, x.shape[-1:], t["adapter.norm_weight"], t["adapter.norm_bias"])
    h = _PHI[delta.non_linearity](
        functional.linear(x, t["adapter.down.weight"], t["adapter.down_bias"])
    )
    # the up bias is not scaled, so it cannot be the product's own where s is not 1
    y = functional.linear(h, t["adapter.up.weight"]) * float(delta.scaling)
    return y if bias is None else y + bias


def _adapter(model: nn.Module, delta: Any, site: Site, t: Leaves, bound: nn.Module) -> None:
    model.get_submodule(site.path).register_forward_hook(
        lambda module, args, y: y + _bottleneck(delta, y, t, t["adapter.up_bias"])
    )


def _intrinsic_adapter(
    model: nn.Module, delta: Any, site: Site, t: Leaves, bound: nn.Module
) -> None:
    """The model comes first, with z."""
    if site.place == MODEL:
        (z,) = t.values()
        (source,) = (m for m in bound.children() if isinstance(m, DecodedAdapters))
        decoded = model.__dict__[_DECODED] = Decoded(decoding(source.decoder, z, model))
        model.register_forward_pre_hook(decoded)
        return
    (adapter,) = bound.get_submodule("adapter").children()
    assert isinstance(adapter, DecodedBottleneck)
    tensors = model.__dict__[_DECODED].next(adapter.layout)

    def after(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        own = tensors()
        return y + _bottleneck(delta, y, own, own["adapter.up_bias"])

    model.get_submodule(site.path).register_forward_hook(after)


def _parallel(model: nn.Module, delta: Any, site: Site, t: Leaves, bound: nn.Module) -> None:
    module = model.get_submodule(site.path)
    if not site.entry:  # beside one layer, whose bias is trained
        module._parameters["bias"] = t["bias"]
        module.register_forward_hook(
            lambda module, args, y: y + _bottleneck(delta, args[0], t, None)
        )
        return
    read: list[Tensor] = []
    model.get_submodule(site.entry).register_forward_pre_hook(
        lambda module, args: read.append(args[0])
    )
    module.register_forward_hook(
        lambda module, args, y: y + _bottleneck(delta, read.pop(), t, t["adapter.up_bias"])
    )


def _bitfit(model: nn.Module, delta: Any, site: Site, t: Leaves, bound: nn.Module) -> None:
    module = model.get_submodule(site.path)
    if "bias" in module._parameters:  # also one that is None: the layer's own forward adds it
        module._parameters["bias"] = t["bias"]
    else:
        module.register_forward_hook(lambda module, args, y: y + t["bias"])


def _ln_tuning(model: nn.Module, delta: Any, site: Site, t: Leaves, bound: nn.Module) -> None:
    for key, leaf in t.items():
        model.get_submodule(site.path)._parameters[key.rpartition(".")[2]] = leaf


def _ia3(model: nn.Module, delta: Any, site: Site, t: Leaves, bound: nn.Module) -> None:
    module, gain = model.get_submodule(site.path), t["ia3_l"].flatten()
    if site.role == FEED_FORWARD_OUTPUT:
        module.register_forward_pre_hook(lambda module, args: (args[0] * gain,))
    else:
        module.register_forward_hook(lambda module, args, y: y * gain)


def _compacter(model: nn.Module, delta: Any, site: Site, t: Leaves, bound: nn.Module) -> None:
    """A rule that all layers share is a tensor of the first one."""
    rule = t.get("adapter.down.phm_rule")
    if rule is None:
        rule = model.__dict__["eager_rule"]
    model.__dict__["eager_rule"] = rule
    rules = {"down": rule, "up": t.get("adapter.up.phm_rule", rule)}

    def after(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        formed = {
            f"adapter.{side}.weight": _kronecker(a, t[f"adapter.{side}.s"], t[f"adapter.{side}.t"])
            for side, a in rules.items()
        }
        return y + _bottleneck(delta, y, {**t, **formed}, t["adapter.up_bias"])

    model.get_submodule(site.path).register_forward_hook(after)


def _kronecker(a: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Σᵢ Aᵢ ⊗ (Sᵢ Tᵢᵀ)."""
    blocks = torch.einsum("ijk,ipr,iqr->jpkq", a, s, t)
    return blocks.reshape(a.shape[1] * s.shape[1], a.shape[2] * t.shape[1])


EAGER: dict[str, Callable[[nn.Module, Any, Site, Leaves, nn.Module], None]] = {
    "lora": _lora,
    "adapter": _adapter,
    "intrinsic-adapter": _intrinsic_adapter,
    "compacter": _compacter,
    "parallel": _parallel,
    "bitfit": _bitfit,
    "lntuning": _ln_tuning,
    "ia3": _ia3,
    "prefix": prefix,
    "prompt": prompt,
    "prompt-pool": prompt_pool,
    "prefix-pool": prefix_pool,
    "intrinsic-prompt": intrinsic_prompt,
}
"""Kind of a delta → what gives a place of the plain model its eager form: of the model, the delta,
the place, its leaves, and the module that has the delta there, for what is not trained."""
