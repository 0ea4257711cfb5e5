"""Where OpenDelta's parallel adapters begin and end, which its file says by halves.

An adapter reads what one module is given and adds to what another returns. The file has its tensors
under the first alone (under both where nobody filtered); ``modified_modules`` of the configuration
says which go together: of the modules whose names end so, in the model's order, each two are a
pair, or one is a pair by itself where its two names are alike.
Source: ``opendelta/delta_models/parallel_adapter.py`` and ``utils/name_based_addressing.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaops.errors import CheckpointError
from deltaops.methods import Delta, ParallelAdapter
from deltaops.methods.targets import FEED_FORWARD

from .anatomy import anatomy, resolve
from .match import selects
from .opendelta_common import (
    BOTTLENECK,
    CONFIG,
    LINEARS,
    Found,
    State,
    activation_of,
    needs,
    settings,
)

_WHOLE = (
    "T5DenseActDense", "T5DenseGatedActDense", "GPT2MLP", "FFN", "LlamaMLP", "Qwen3MLP", "CLIPMLP",
)  # fmt: skip
"""Classes of transformers that are a feed-forward: given what its first layer reads, it returns
what its last does, but for dropout."""
_REGEX = "[r]"
"""What a name begins with that is a regular expression there."""
_SUITED = "ours stand beside whole feed-forwards and single linear layers"
_ANEW = "Train it anew with deltaops.ParallelAdapter()."


class Place(NamedTuple):
    """Where an adapter stands."""

    path: str
    """Of the linear layer to whose output it adds."""
    whole: bool
    """Whether it is beside the whole feed-forward that ends there, not beside the layer."""


def parallel(
    model: nn.Module, config: Mapping[str, Any], found: Found, saved: tuple[str, ...]
) -> tuple[Delta, State]:
    """f(x) + Up φ(Down x + d) + u, as the converters of the other kinds."""
    if config.get("scaled", 1.0) not in (None, 1.0):
        raise CheckpointError(
            f"OpenDelta's {CONFIG} has scaled={config['scaled']!r}, which none of its versions "
            "passes on to parallel adapters, so what the file means cannot be told. Set it to 1 if "
            "one of them trained it."
        )
    pairs = ends(model, config)
    adapters = _once(found, pairs)
    needs(adapters, set(LINEARS))
    places = {path: place(model, path, pairs[path]) for path in adapters}
    wholes = {where.path for where in places.values() if where.whole}
    layers = tuple(where.path for where in places.values() if not where.whole)
    every = resolve(model, [FEED_FORWARD]) if wholes else {}
    others = tuple(path for path in every if path not in (*wholes, *layers))
    activation = activation_of(config, "gelu_new")
    delta = settings(
        lambda: ParallelAdapter(
            size=next(iter(adapters.values()))["down_proj.weight"].shape[0],
            non_linearity=activation,
            scaling=1.0,
            target_modules=(FEED_FORWARD, *layers) if wholes else layers,
            exclude_modules=others or None,
            modules_to_save=saved,
        )
    )
    state = {}
    for path, own in adapters.items():
        where = places[path]
        for key in LINEARS:
            state[f"{where.path}.{BOTTLENECK[key]}"] = own[key]
        if not where.whole:  # u is a part of the layer's bias there
            added = state.pop(f"{where.path}.adapter.up_bias")
            bias = model.get_submodule(where.path)._parameters.get("bias")
            # a sum of other shapes would be spread out
            if bias is not None and bias.shape != added.shape:
                raise CheckpointError(
                    f"OpenDelta's up_proj.bias of {path!r} must be {list(bias.shape)} for this "
                    f"model, got {list(added.shape)}. Is this the model that it was trained on?"
                )
            state[f"{where.path}.bias"] = added if bias is None else bias.detach() + added
    return delta, state


def _once(found: Found, pairs: Mapping[str, str]) -> Found:
    """Each adapter by the module whose input it reads, without the copies at its end.

    Raises: CheckpointError for one where there is none, or copies that differ.
    """
    adapters: Found = {}
    copies: list[tuple[str, str, Tensor]] = []
    starts = {end: start for start, end in pairs.items()}
    for path, own in found.items():
        for name, tensor in own.items():
            again, _, key = name.partition(".modulelist.")
            if key not in LINEARS:
                raise CheckpointError(
                    f"OpenDelta's file has {name!r} in the parallel adapter at {path!r}, expected "
                    f"{', '.join(LINEARS)} alone. Copy or save it again."
                )
            if path in pairs and not again:
                adapters.setdefault(path, {})[key] = tensor
            elif path in starts:
                copies.append((starts[path], key, tensor))
            else:
                raise CheckpointError(
                    f"OpenDelta's file has a parallel adapter at {path!r}, where modified_modules "
                    f"of its {CONFIG} puts none. Is this the model that it was trained on?"
                )
    missing = [path for path in pairs if path not in adapters]
    if missing:
        raise CheckpointError(
            f"OpenDelta's file has no parallel adapter at {missing[0]!r}, where modified_modules "
            f"of its {CONFIG} puts one. Is this the model that it was trained on?"
        )
    for start, key, tensor in copies:
        first = adapters[start].get(key)
        if first is None or not torch.equal(first, tensor):
            raise CheckpointError(
                f"OpenDelta's file has two adapters from {start!r} to {pairs[start]!r} that differ "
                f"in {key}, expected one. Copy or save it again."
            )
    return adapters


def ends(model: nn.Module, config: Mapping[str, Any]) -> dict[str, str]:
    """Path of the module whose input an adapter reads → of that to whose output it adds.

    Raises: CheckpointError where the configuration does not say it.
    """
    names, left_out = config.get("modified_modules"), config.get("exclude_modules") or []
    if config.get("common_structure") or not names:
        raise CheckpointError(
            f"OpenDelta's {CONFIG} must name modified_modules as the model has them: its own names "
            f"for what models have in common mean attentions with their norms, and {_SUITED}. "
            f"{_ANEW}"
        )
    for subject, value in (("modified_modules", names), ("exclude_modules", left_out)):
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            raise CheckpointError(
                f"OpenDelta's {CONFIG}: {subject} must be a list of names, got {value!r}. Copy "
                "or save it again."
            )
    if len(names) % 2:
        raise CheckpointError(
            f"OpenDelta's {CONFIG}: modified_modules of parallel adapters are pairs, got "
            f"{len(names)} names. Copy or save it again."
        )
    found: dict[str, str] = {}
    turn, start = 0, ""
    for path, _ in model.named_modules():
        if not _ends_so(path, names) or any(path.startswith(name) for name in left_out):
            continue
        if turn % 2 == 0:
            start = path
        if turn % 2 or names[turn] == names[turn + 1]:
            found[start] = path
            turn |= 1
        turn = (turn + 1) % len(names)
    return found


def place(model: nn.Module, start: str, end: str) -> Place:
    """Where ours stands for one from what ``start`` is given to what ``end`` returns.

    Raises: CheckpointError where ours cannot.
    """
    modules = dict(model.named_modules())
    if start == end and (type(modules[start]) is nn.Linear or hasattr(modules[start], "nf")):
        return Place(start, False)
    for block in anatomy(model):
        inner = block.feed_forward
        if inner is None:
            continue
        whole = (
            start == end
            and type(modules[start]).__name__ in _WHOLE
            and all(path.startswith(f"{start}.") for path in (*inner.inputs, inner.output))
        )
        if whole or (start in inner.inputs and end == inner.output):
            return Place(inner.output, True)
    around = f"around {start!r}, a {type(modules[start]).__name__}"
    between = f"from {start!r} to {end!r}"
    raise CheckpointError(
        f"OpenDelta's parallel adapter stands {around if start == end else between}; {_SUITED}. "
        f"{_ANEW}"
    )


def _ends_so(path: str, names: Iterable[str]) -> bool:
    """Whether ``path`` ends, part by part, with one of ``names``."""
    for name in names:
        if not name.startswith(_REGEX):
            if selects((name,), path):
                return True
            continue
        try:
            hit = re.search(name.removeprefix(_REGEX), path)
        except re.error as error:
            raise CheckpointError(
                f"OpenDelta's {CONFIG}: {name!r} in modified_modules is no regular expression: "
                f"{error}. Copy or save it again."
            ) from error
        if hit is not None and hit.end() == len(path) and path[: hit.start()][-1:] in ("", "."):
            return True
    return False
