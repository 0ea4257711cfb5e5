"""Every method once more, in torch's own functions: hooks on a plain model that read plain tensors.

Independent of the package: what a hook computes is the formula at the top of the method's file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaops import (
    IA3,
    Adapter,
    BitFit,
    Compacter,
    IntrinsicAdapter,
    IntrinsicPrompt,
    LNTuning,
    LoRA,
    ParallelAdapter,
    Prefix,
    PrefixPool,
    Prompt,
    PromptPool,
)
from deltaops.methods import Delta, Site
from deltaops.methods.base import STACK

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
    everywhere = {k[k.rindex("adapter.") :]: v for k, v in state.items() if k.endswith("phm_rule")}
    if isinstance(delta, Prefix):
        state = encoded(state, places) if delta.reparameterised else state
    if isinstance(delta, IntrinsicAdapter):
        places = tuple(site for site in places if site.path)
        state = _decoded(delta, state, places)
    for site in places:
        start = site.key("")
        own = {k[len(start) :]: v for k, v in state.items() if k.startswith(start)}
        found = everywhere | own
        _PLAIN[type(delta)](model, delta, site, found)


def _lora(model: nn.Module, delta: Any, site: Site, t: dict[str, Tensor]) -> None:
    if delta.init_lora_weights == "pissa":
        _take_out(model.get_submodule(site.path), delta.r)

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


def _take_out(module: Any, rank: int) -> None:
    """The weight without its first singular triplets; transposed, it has the same."""
    u, sigma, v = torch.linalg.svd(module.weight.detach(), full_matrices=False)
    sigma[:rank] = 0.0
    module.weight = nn.Parameter((u * sigma) @ v, requires_grad=False)


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


def _decoded(
    delta: IntrinsicAdapter, state: dict[str, Tensor], places: tuple[Site, ...]
) -> dict[str, Tensor]:
    """All adapters from z: numbers of the seed, biases and norms at their plain start."""
    z, layout = state["intrinsic_adapter.intrinsic"], []
    for site in places:
        width, rank = site.out_features, delta.size
        assert rank is not None
        shapes = {"down_bias": (rank,), "up_bias": (width,)}
        if delta.layer_norm:
            shapes |= {"norm_weight": (width,), "norm_bias": (width,)}
        layout += [(site, n, s) for n, s in shapes.items()]
        layout += [(site, "down.weight", (rank, width)), (site, "up.weight", (width, rank))]
    sizes = [torch.Size(shape).numel() for _, _, shape in layout]
    random = torch.Generator().manual_seed(delta.seed)
    base = torch.empty(sum(sizes))
    nn.init.trunc_normal_(base, std=0.01, a=-0.02, b=0.02, generator=random)
    for (_, name, _), part in zip(layout, base.split(sizes), strict=True):
        if "weight" not in name or name == "norm_weight":
            part.fill_(1.0 if name == "norm_weight" else 0.0)
    projection = torch.randn(len(z), sum(sizes), generator=random).to(z.dtype)
    theta = base.to(z.dtype) + 0.1 / len(z) ** 0.5 * (z @ projection)
    return {
        f"{site.path}.adapter.{name}": part.reshape(shape)
        for (site, name, shape), part in zip(layout, theta.split(sizes), strict=True)
    }


def _compacter(model: nn.Module, delta: Any, site: Site, t: dict[str, Tensor]) -> None:
    weights = {}
    for side in ("down", "up"):
        rule = t[f"adapter.{'down' if delta.shared_phm_rule else side}.phm_rule"]
        s, columns = t[f"adapter.{side}.s"], t[f"adapter.{side}.t"]
        weights[f"adapter.{side}.weight"] = torch.stack(
            [torch.kron(rule[i], s[i] @ columns[i].T) for i in range(delta.phm_dim)]
        ).sum(0)
    _adapter(model, delta, site, t | weights)


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


def _prompt(model: nn.Module, delta: Any, site: Site, t: dict[str, Tensor]) -> None:
    vectors = t["prompt_embeddings"]
    _before_tokens(model, site, len(vectors), lambda embeds: vectors.expand(len(embeds), -1, -1))


def _intrinsic(model: nn.Module, delta: Any, site: Site, t: dict[str, Tensor]) -> None:
    """Everything but z is of the seed: tokens, the scatter of embeddings, the projection."""
    stack: Any = model.get_submodule(site.path)
    random, z = torch.Generator().manual_seed(delta.seed), t["intrinsic"]
    length, width = delta.num_virtual_tokens, site.out_features
    if hasattr(stack, "get_input_embeddings"):
        table = stack.get_input_embeddings().weight.detach()
        base = table[torch.randint(0, len(table), (length,), generator=random)]
        spread = table[torch.randint(0, len(table), (64,), generator=random)].std()
    else:
        base, spread = torch.randn(length, width, generator=random) * 0.02, torch.tensor(0.02)
    projection = torch.randn(len(z), length * width, generator=random).to(z.dtype)
    moved = (z @ projection).view(length, width) * spread.to(z.dtype) / len(z) ** 0.5
    _prompt(model, delta, site, {"prompt_embeddings": base.to(z.dtype) + moved})


def _pool(model: nn.Module, delta: Any, site: Site, t: dict[str, Tensor]) -> None:
    prompts, keys = t["prompt_pool.prompts"], t["prompt_pool.keys"]

    def vectors(embeds: Tensor) -> Tensor:
        rows = []
        for sample in embeds:
            rows.append(torch.cat([prompts[i] for i in _chosen(delta, sample, keys)]))
        return torch.stack(rows)

    _before_tokens(model, site, delta.top_k * delta.length, vectors)


def _before_tokens(
    model: nn.Module, site: Site, length: int, vectors: Callable[[Tensor], Tensor]
) -> None:
    """Call the stack with ``vectors`` of the embeddings of its tokens before these."""
    stack: Any = model.get_submodule(site.path)

    def lengthen(module: Any, args: Any, named: dict[str, Any]) -> Any:
        embeds = named.pop("inputs_embeds", None)
        if embeds is None:
            embeds = module.get_input_embeddings()(named.pop("input_ids"))
        before = vectors(embeds).to(embeds.dtype)
        return args, named | {"inputs_embeds": torch.cat([before, embeds], 1)}

    stack.register_forward_pre_hook(lengthen, with_kwargs=True)
    if site.path != "encoder" or site.kind == "CLIPEncoder":
        stack.register_forward_hook(_without(length))


def _without(length: int) -> Callable[[Any, Any, Any], Any]:
    def hook(module: Any, args: Any, out: Any) -> Any:
        out.last_hidden_state = out.last_hidden_state[:, length:]
        return out

    return hook


def encoded(state: dict[str, Tensor], places: tuple[Site, ...]) -> dict[str, Tensor]:
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


def _prefix_pool(model: nn.Module, delta: Any, site: Site, t: dict[str, Tensor]) -> None:
    """Each sample's prefixes are picked out, and stand alone before its tokens."""
    if site.place != STACK:
        _prefix(model, delta, site, t)
        attention = model.get_submodule(site.path).__dict__
        whole = attention["plain_prefix"]
        attention["plain_prefix"] = lambda: (
            torch.stack([part[:, rows] for rows in model.__dict__["plain_choice"]])
            for part in whole
        )
        return
    keys = t["prefix_pool.keys"]

    def choose(stack: Any, args: Any, named: dict[str, Any]) -> None:
        embeds = named.get("inputs_embeds")
        if embeds is None:
            ids = args[0] if args else named["input_ids"]
            embeds = stack.get_input_embeddings()(ids)
        positions = torch.arange(delta.size * delta.length).view(delta.size, -1)
        model.__dict__["plain_choice"] = [
            positions[_chosen(delta, sample, keys)].flatten() for sample in embeds
        ]

    model.get_submodule(site.path).register_forward_pre_hook(choose, with_kwargs=True)


def _chosen(delta: Any, sample: Tensor, keys: Tensor) -> list[int]:
    query = sample[: delta.query_tokens].mean(0)
    cosines = functional.cosine_similarity(query[None], keys, dim=1)
    return sorted(cosines.topk(delta.top_k).indices.tolist())


def _attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float,
    is_causal: bool | None = None, position_bias: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """All scores written out, those of the prefix in front."""
    prefix = module.__dict__.get("plain_prefix", (k[0, :, :0], v[0, :, :0]))
    prefix = tuple(prefix() if callable(prefix) else prefix)
    k, v = (
        torch.cat([shared.expand(len(q), -1, -1, -1), own], 2)
        .repeat_interleave(q.shape[1] // own.shape[1], 1)
        for shared, own in zip(prefix, (k, v), strict=True)
    )  # fmt: skip
    scores = scaling * q @ k.mT
    tokens = scores[..., k.shape[2] - (own := k.shape[2] - prefix[0].shape[-2]) :]
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
    Compacter: _compacter,
    ParallelAdapter: _parallel,
    BitFit: _bitfit,
    LNTuning: _ln_tuning,
    IA3: _ia3,
    Prompt: _prompt,
    PromptPool: _pool,
    IntrinsicPrompt: _intrinsic,
    IntrinsicAdapter: _adapter,
    Prefix: _prefix,
    PrefixPool: _prefix_pool,
}
