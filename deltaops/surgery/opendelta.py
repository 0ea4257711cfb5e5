"""Take over a delta that OpenDelta saved: ``config.json`` and ``pytorch_model.bin``.

    <module>.lora.lora_A, .lora_B                               LoRA
    <module>.adapter.modulelist.{down,up}_proj.{weight,bias}    Adapter
    <module>.parallel_adapter.modulelist.{down,up}_proj.{weight,bias}
                                                                ParallelAdapter
    <module>.compactor.{down,up}_sampler.{phm_rule,W_left,W_right,b}
                                                                Compacter, each with its own rule
    soft_prompt_layer.soft_embeds                               Prompt
    <module>.prefix.{past_key,past_value}                       Prefix
    <module>.reparams.{wte,control_trans.0,control_trans.2}.*   Prefix, as what this MLP computes
    <module>.bias alone, <module>.bitfit.bias                   BitFit
    every other tensor                                          of a module trained whole

OpenDelta adds an adapter to what any module returns, ours follows a linear layer: the two are one
where that module ends with the layer (T5, GPT-2, BART, DistilBERT), and refused where a norm comes
between (BERT, RoBERTa). A parallel adapter stands around any module there, ours beside a
feed-forward or a linear layer. Its prefixes are ours where no position counts them; T5's bias does
there, and they are refused. What ``.bitfit.bias`` adds to a norm's output becomes part of its bias.
Adding a kind is one pattern and one function of :data:`_KINDS`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaops.errors import CheckpointError, ConfigError, TargetError
from deltaops.methods import (
    Adapter,
    BitFit,
    Compacter,
    Delta,
    LoRA,
    Prefix,
    Prompt,
)
from deltaops.methods.targets import roles
from deltaops.modules import PREFIX_KEYS, PREFIX_VALUES, is_norm
from deltaops.modules.prefix_encoder import encode

from .files import read_tensors
from .handle import Handle
from .opendelta_common import (
    BOTTLENECK,
    CONFIG,
    LINEARS,
    SIDES,
    Found,
    State,
    activation_of,
    needs,
    settings,
)
from .opendelta_parallel import parallel
from .plan import plan
from .torch_file import read_torch_file

PICKLE = "pytorch_model.bin"
TENSORS = "model.safetensors"

_ENDS = {
    "T5Attention": "o",
    "T5DenseActDense": "wo",
    "T5DenseGatedActDense": "wo",
    "GPT2Attention": "c_proj",
    "GPT2MLP": "c_proj",
    "BartAttention": "out_proj",
    "DistilBertSelfAttention": "out_lin",
    "FFN": "lin2",
}
"""Class of transformers → its linear layer whose output it returns, but for dropout."""
_FOREIGN = {
    "low_rank_adapter": "low-rank adapters",
}
"""Part of a key → what this reader does not take over."""
_ATTENDS = {"BertAttention": ".self", "RobertaAttention": ".self", "GPT2Attention": ""}
"""Class of transformers that gets a prefix → where in it the attention itself is."""
_WIDE = {
    "BertAttention": "self.value.weight", "RobertaAttention": "self.value.weight",
    "GPT2Attention": "c_proj.weight",
}  # fmt: skip
"""Of those, a parameter with as many rows as the keys of all heads have features."""
_DIMENSIONS = {
    "lora": {"lora_A": 2, "lora_B": 2},
    "adapter": LINEARS,
    "parallel adapter": {
        f"{i}.modulelist.{name}": d for i in ("", "_1") for name, d in LINEARS.items()
    },
    "compacter": {
        f"{s}_sampler.{n}": d
        for s in SIDES
        for n, d in (("phm_rule", 3), ("W_left", 3), ("W_right", 3), ("b", 1))
    },
    "prompt": {"soft_embeds": 2},
    "prefix": {
        "past_key": 2,
        "past_value": 2,
        "wte.weight": 2,
        "control_trans.0.weight": 2,
        "control_trans.0.bias": 1,
        "control_trans.2.weight": 2,
        "control_trans.2.bias": 1,
    },
    "bitfit": {"bias": 1, "bitfit.bias": 1},
}
"""Kind → how many dimensions its tensors have, by the rest of the key."""


def is_opendelta(folder: Path) -> bool:
    """Whether ``folder`` looks like one of OpenDelta's."""
    return (folder / CONFIG).is_file() and any((folder / n).is_file() for n in (PICKLE, TENSORS))


def read_opendelta(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Its configuration and tensors. The ``.bin`` is read without unpickling it.

    Raises: CheckpointError.
    """
    folder = Path(path)
    if not is_opendelta(folder):
        raise CheckpointError(
            f"{str(folder)!r} is no folder of OpenDelta: it needs {CONFIG} and {PICKLE} or "
            f"{TENSORS}. Name the folder that `save_finetuned` wrote."
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / CONFIG} cannot be read: {error}. Copy or save it again."
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{folder / CONFIG} must hold an object, got {type(config).__name__}. Is this the "
            "folder that `save_finetuned` wrote?"
        )
    if (folder / TENSORS).is_file():
        return config, read_tensors(folder / TENSORS)
    return config, read_torch_file(folder / PICKLE)


def from_opendelta(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Handle:
    """Attach the delta of :func:`read_opendelta` to the model it was trained on.

    Args:
        model: of the class that it was trained on, with its weights, in float32.
    Raises: CheckpointError for what deltaops does not express or does not fit; the model is as it
        was then.
    """
    kind, found, saved = _sorted(model, tensors)
    _check_dimensions(kind, found)
    try:
        delta, state = _KINDS[kind][1](model, config, found, tuple(saved))
        made = plan(model, delta)
    except (TargetError, ConfigError) as error:
        raise CheckpointError(f"OpenDelta's {kind} does not fit this model: {error}") from error
    for path, own in saved.items():
        state |= {f"{path}.{name}": tensor for name, tensor in own.items()}
    # names match the end of a path
    extra = [site.path for site in made.sites if site.path not in delta.target_modules]
    if extra and not roles(delta.target_modules):
        raise CheckpointError(
            f"OpenDelta's {kind}: its names also mean {extra[0]!r} in this model, for which the "
            "file has nothing. Is this the model that it was trained on?"
        )
    handle = made.apply()
    try:
        _fill(handle, state)
    except BaseException:  # also KeyboardInterrupt: undo, then raise it
        handle.revert()
        raise
    return handle


def _sorted(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[str, Found, Found]:
    """The delta's kind, its tensors, and those of modules trained whole."""
    everything = model.state_dict().keys()
    if everything <= tensors.keys():
        raise CheckpointError(
            "OpenDelta's file holds the whole backbone beside the delta, so it does not say what "
            "was trained. Save it after `freeze_module(set_state_dict=True)`."
        )
    kinds: dict[str, Found] = {}
    saved: Found = {}
    for key, tensor in tensors.items():
        for part, what in _FOREIGN.items():
            if part in key.split("."):
                raise CheckpointError(
                    f"OpenDelta's file has {key!r}: {what}; `deltaops convert` reads "
                    f"{', '.join(_KINDS)}. Train it anew with deltaops."
                )
        for kind, (pattern, _) in _KINDS.items():
            match = pattern.fullmatch(key)
            if match is not None and not (kind == "bitfit" and _weight(key) in tensors):
                own = kinds.setdefault(kind, {}).setdefault(match.group(1) or "", {})
                own[match.group(2)] = tensor
                break
        else:
            path, _, name = key.rpartition(".")
            saved.setdefault(path, {})[name] = tensor
    if len(kinds) != 1:
        raise CheckpointError(
            f"OpenDelta's file holds {' and '.join(kinds) or 'no delta that deltaops knows'}, "
            "expected one delta. A model has one at a time here."
        )
    modules = dict(model.named_modules())
    for path, own in saved.items():
        known = modules[path].state_dict().keys() if path in modules else set()
        if own.keys() != known:
            name = next(iter(own.keys() - known or known - own.keys()))
            raise CheckpointError(
                f"OpenDelta's file and this model do not agree about {f'{path}.{name}'!r}, of a "
                "module trained whole. Is this the model class that it was trained on?"
            )
    ((kind, found),) = kinds.items()
    return kind, found, saved


def _check_dimensions(kind: str, found: Found) -> None:
    for path, own in found.items():
        for name, tensor in own.items():
            expected = _DIMENSIONS[kind].get(name, tensor.dim())
            if tensor.dim() != expected:
                raise CheckpointError(
                    f"OpenDelta's {name} of {path!r} must have {expected} dimensions, got "
                    f"{list(tensor.shape)}. Copy or save it again."
                )


def _weight(key: str) -> str:
    return key.removesuffix("bias") + "weight"


def _fill(handle: Handle, state: State) -> None:
    """Put the values in. Raises: CheckpointError where one is missing or does not fit."""
    into = handle.state()
    odd = sorted(into.keys() ^ state.keys())
    if odd:
        raise CheckpointError(
            f"OpenDelta's file and this model differ in {len(odd)} tensors, such as {odd[0]!r}. Is "
            "this the model that it was trained on?"
        )
    with torch.no_grad():
        for key, tensor in into.items():
            if tensor.shape != state[key].shape:
                raise CheckpointError(
                    f"OpenDelta's {key!r} must be {list(tensor.shape)} for this model, got "
                    f"{list(state[key].shape)}. Is this the model that it was trained on?"
                )
            if not bool(torch.isfinite(state[key].double()).all()):
                raise CheckpointError(
                    f"OpenDelta's {key!r} holds NaN or infinity; its training had diverged. Train "
                    "it anew."
                )
            tensor.copy_(state[key])


def _lora(
    model: nn.Module, config: Mapping[str, Any], found: Found, saved: tuple[str, ...]
) -> tuple[Delta, State]:
    """y + alpha/r · B A x. Some versions also save a ``lin`` that they never use."""
    needs(found, {"lora_A", "lora_B"})
    delta = settings(
        lambda: LoRA(
            r=config.get("lora_r", 8),
            alpha=config.get("lora_alpha", 16),
            dropout=config.get("lora_dropout", 0.0),
            target_modules=tuple(found),
            modules_to_save=saved,
        )
    )
    state = {f"{p}.{n}.weight": own[n] for p, own in found.items() for n in ("lora_A", "lora_B")}
    return delta, state


def _adapter(
    model: nn.Module, config: Mapping[str, Any], found: Found, saved: tuple[str, ...]
) -> tuple[Delta, State]:
    """y + Up φ(Down y + d) + u."""
    needs(found, set(LINEARS))
    activation = activation_of(config, "gelu_new")
    layers = {path: _last_linear(model, path) for path in found}
    delta = settings(
        lambda: Adapter(
            size=next(iter(found.values()))["down_proj.weight"].shape[0],
            non_linearity=activation,
            target_modules=tuple(layers.values()),
            modules_to_save=saved,
        )
    )
    state = {
        f"{layers[path]}.{BOTTLENECK[key]}": own[key]
        for path, own in found.items()
        for key in LINEARS
    }
    return delta, state


def _compacter(
    model: nn.Module, config: Mapping[str, Any], found: Found, saved: tuple[str, ...]
) -> tuple[Delta, State]:
    """x H + b with H = Σᵢ Aᵢ ⊗ (Lᵢ Rᵢ): of our W = Hᵀ the rule is Aᵀ, S is Rᵀ and T is L."""
    needs(found, set(_DIMENSIONS["compacter"]))
    layers = {path: _last_linear(model, path) for path in found}
    first = next(iter(found.values()))
    n, _, rank = first["down_sampler.W_left"].shape
    delta = settings(
        lambda: Compacter(
            size=first["down_sampler.b"].shape[0],
            phm_dim=n,
            phm_rank=rank,
            shared_phm_rule=False,
            non_linearity=activation_of(config, "relu"),
            target_modules=tuple(layers.values()),
            modules_to_save=saved,
        )
    )
    state = {}
    for path, own in found.items():
        for side in SIDES:
            into, of = f"{layers[path]}.adapter.{side}", f"{side}_sampler."
            state[f"{into}.phm_rule"] = own[of + "phm_rule"].mT
            state[f"{into}.s"] = own[of + "W_right"].mT
            state[f"{into}.t"] = own[of + "W_left"]
            state[f"{into}_bias"] = own[of + "b"]
    return delta, state


def _prompt(
    model: nn.Module, config: Mapping[str, Any], found: Found, saved: tuple[str, ...]
) -> tuple[Delta, State]:
    """Vectors before the tokens of what the model reads; where that is, ours finds by itself."""
    if len(found) > 1:
        raise CheckpointError(
            f"OpenDelta's file holds {len(found)} soft prompts, expected one. Save one of them."
        )
    ((_, own),) = found.items()
    vectors = own["soft_embeds"]
    delta = settings(
        lambda: Prompt(
            num_virtual_tokens=len(vectors), prompt_tuning_init="random", modules_to_save=saved
        )
    )
    sites = plan(model, delta).sites
    if len(sites) != 1:
        raise CheckpointError(
            f"OpenDelta's soft prompt stands before one stack, and this model has {len(sites)}. "
            "Is this the model class that it was trained on?"
        )
    return delta, {sites[0].key("prompt_embeddings"): vectors}


def _prefix(
    model: nn.Module, config: Mapping[str, Any], found: Found, saved: tuple[str, ...]
) -> tuple[Delta, State]:
    """Keys and values before those of the tokens, [P, H] with one head after the other."""
    kinds = {path: type(module).__name__ for path, module in model.named_modules()}
    computed = any("wte.weight" in own for own in found.values())
    rows = _computed(model, found, kinds) if computed else found
    needs(rows, {"past_key", "past_value"})
    layers = {}
    for path in rows:
        if kinds.get(path) not in _ATTENDS:
            raise CheckpointError(
                f"OpenDelta's prefix of {path!r}, here a {kinds.get(path, 'module that is not')}, "
                f"is not known to be one of ours; those of {', '.join(_ATTENDS)} are. Train it "
                "anew with deltaops.Prefix()."
            )
        layers[path] = path + _ATTENDS[kinds[path]]
    length = len(next(iter(rows.values()))["past_key"])
    delta = settings(
        lambda: Prefix(
            num_virtual_tokens=length, target_modules=tuple(layers.values()), modules_to_save=saved
        )
    )
    heads = {site.path: site.heads for site in plan(model, delta).sites}
    state = {}
    for path, own in rows.items():
        for name, into in (("past_key", PREFIX_KEYS), ("past_value", PREFIX_VALUES)):
            value, count = own[name], heads[layers[path]]
            if value.shape[1] % count or not value.shape[1]:
                raise CheckpointError(
                    f"OpenDelta's {name} of {path!r} must have features for {count} heads, got "
                    f"{list(value.shape)}. Is this the model that it was trained on?"
                )
            split = value.reshape(len(value), count, -1)
            state[f"{layers[path]}.{into}"] = split.transpose(0, 1)
    return delta, state


def _computed(model: nn.Module, found: Found, kinds: Mapping[str, str]) -> Found:
    """The rows that the MLP at the first attention computes for all of them."""
    names = ("wte.weight", *(f"control_trans.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")))
    paths = [path for path, kind in kinds.items() if kind in _ATTENDS]
    first = repr(paths[0]) if paths else "which this model lacks"
    if list(found) != paths[:1]:
        raise CheckpointError(
            f"OpenDelta's MLP computes the prefixes of every attention and is in the first, {first}"
            f", got one in {', '.join(map(repr, found))}. Of some layers alone it cannot be told "
            "which are meant: train it anew with deltaops.Prefix()."
        )
    needs(found, set(names))
    ((_, own),) = found.items()
    odd = sorted(own.keys() - {*names, "input_tokens"})
    if odd:
        raise CheckpointError(
            f"OpenDelta's file has {odd[0]!r} beside the MLP of a prefix, expected {names} alone. "
            "Copy or save it again."
        )
    embedding, down, down_bias, up, up_bias = (own[name].float() for name in names)
    fits = down.shape == (len(down_bias), embedding.shape[1]) and up.shape == (
        len(up_bias), len(down_bias),
    )  # fmt: skip
    width = len(model.get_parameter(f"{paths[0]}.{_WIDE[kinds[paths[0]]]}"))
    if not fits or len(up) != 2 * len(paths) * width:
        raise CheckpointError(
            f"OpenDelta's MLP computes {len(up)} numbers for each position, expected the keys and "
            f"values of this model's {len(paths)} attentions, {2 * len(paths)}·{width}. Was it "
            "trained on this model, and on all of its layers?"
        )
    rows = encode(embedding, down, down_bias, up, up_bias).detach()
    parts = iter(rows.chunk(2 * len(paths), dim=1))
    return {path: {"past_key": next(parts), "past_value": next(parts)} for path in paths}


def _last_linear(model: nn.Module, path: str) -> str:
    """The linear layer whose output the module returns."""
    modules = dict(model.named_modules())
    module = modules.get(path)
    if module is None:
        raise CheckpointError(
            f"OpenDelta's adapter follows {path!r}, which this model does not have. Is this the "
            "model class that it was trained on?"
        )
    if type(module) is nn.Linear or hasattr(module, "nf"):
        return path
    child = _ENDS.get(type(module).__name__)
    if child is None:
        raise CheckpointError(
            f"OpenDelta's adapter follows {path!r}, a {type(module).__name__}, which is not known "
            "to end with a linear layer; ours follow such layers. Train it anew with "
            "deltaops.Adapter()."
        )
    return f"{path}.{child}"


def _bitfit(
    model: nn.Module, config: Mapping[str, Any], found: Found, saved: tuple[str, ...]
) -> tuple[Delta, State]:
    """A bias itself, or what is added to a norm's output: to its own bias, if it has one."""
    state = {}
    modules = dict(model.named_modules())
    for path, own in found.items():
        value = own.get("bias")
        if "bitfit.bias" in own:
            module = modules.get(path)
            if module is None or not is_norm(module):
                raise CheckpointError(
                    f"OpenDelta's BitFit adds to the output of {path!r}; deltaops adds to linear "
                    "layers and norms. Train it anew with deltaops.BitFit()."
                )
            before = value if value is not None else module._parameters.get("bias")
            added = own["bitfit.bias"]
            width = module.get_parameter("weight").shape
            for tensor in (added, added if value is None else value):
                if tensor.shape != width:  # a sum of other shapes would be spread out
                    raise CheckpointError(
                        f"OpenDelta's bias of {path!r} must be {list(width)} for this model, got "
                        f"{list(tensor.shape)}. Is this the model that it was trained on?"
                    )
            value = added if before is None else before.detach() + added
        assert value is not None  # one of the two put the path here
        state[f"{path}.bias"] = value
    delta = settings(lambda: BitFit(target_modules=tuple(found), modules_to_save=saved))
    return delta, state


_Make = Callable[[nn.Module, Mapping[str, Any], Found, tuple[str, ...]], tuple[Delta, State]]
_KINDS: dict[str, tuple[re.Pattern[str], _Make]] = {
    "lora": (re.compile(r"(.+)\.lora\.(lora_A|lora_B|lin\.weight|lin\.bias)"), _lora),
    "adapter": (
        re.compile(r"(.+)\.adapter\.modulelist\.((?:down|up)_proj\.(?:weight|bias))"), _adapter
    ),
    "parallel adapter": (re.compile(r"(.+)\.parallel_adapter((?:_1)?\..+)"), parallel),
    "compacter": (re.compile(r"(.+)\.compactor\.(.+)"), _compacter),
    "prefix": (re.compile(r"(.+)\.(?:prefix|reparams)\.(.+)"), _prefix),
    "prompt": (re.compile(r"(?:(.+)\.)?soft_prompt_layer\.(soft_embeds)"), _prompt),
    "bitfit": (re.compile(r"(.+?)\.((?:bitfit\.)?bias)"), _bitfit),
}  # fmt: skip
"""Kind → its keys (path of the module, rest), and what makes a delta of them."""
