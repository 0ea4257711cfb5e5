"""Which modules of a model a delta binds to, and why not the others.

The rules for names are PEFT's (``peft.tuners.tuners_utils.check_target_module_exists``, 0.21.2), so
that one configuration means the same modules in both. The rule for types is stricter: only the
exact type is swapped, because a subclass may compute something else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from deltaops.errors import AttachError, TargetError
from deltaops.methods.base import LINEAR, NORM, Delta
from deltaops.methods.targets import ALL_LINEAR, plain, roles
from deltaops.modules import LinearPlace, delta_class, has_copies, is_norm

from .anatomy import Found, misses, resolve

_HEADS = ("score", "classifier")
"""Where transformers keeps a sequence classification head."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Skip(NamedTuple):
    """A module that the names would take and the types do not."""

    path: str
    reason: str


class Match(NamedTuple):
    """The answer: paths of the places, paths of the modules trained whole, and what was skipped."""

    sites: tuple[str, ...]
    saved: tuple[str, ...]
    skipped: tuple[Skip, ...]
    found: dict[str, Found]
    """What sites are, by path, as far as the delta has to know; others were named."""


def match(model: nn.Module, delta: Delta, *, lenient: bool = False) -> Match:
    """Match ``delta`` against ``model``; nothing is changed.

    Args:
        lenient: for a configuration read from a file, whose names may list modules that this model
            does not have (PEFT writes such); what the file must contain is checked elsewhere.
    Raises: TargetError when nothing matches, or a name that the user wrote cannot have the delta;
        AttachError when the model has a delta already.
    """
    modules = dict(model.named_modules())
    _refuse_second_delta(modules)
    saved = _saved_paths(modules, delta, lenient)
    parents = encoder_children(modules)
    wished = roles(delta.target_modules)
    found = resolve(model, wished)
    heads = _output_heads(model, delta) if ALL_LINEAR in wished else set()
    wanted: list[str] = []
    skipped: list[Skip] = []
    refused: list[Skip] = []
    for path, module in modules.items():
        if not path or inside(path, saved):
            continue
        named = _named(path, delta)
        if not named and (path not in found or id(module) in heads):
            continue
        if not _in_chosen_layer(path, delta):
            continue
        if delta.exclude_modules is not None and selects(delta.exclude_modules, path):
            continue
        entry = "" if named else found[path].entry
        reason = unswappable(module, delta, parents.get(path)) or delta.unbindable(module)
        if reason is None and entry:
            reason = unswappable(modules[entry], delta, parents.get(entry))
        if reason is None:
            wanted.append(path)
        else:
            (refused if named else skipped).append(Skip(path, reason))
    for path, reason in misses(model, wished).items():
        if _in_chosen_layer(f"{path}.", delta) and not inside(path, saved):
            skipped.append(Skip(path, reason))
    if not lenient:
        _refuse_unmatched_names(modules, delta)
    if not wanted:
        raise TargetError(_nothing_matched(modules, delta, skipped + refused))
    if refused:
        raise TargetError(
            f"target_modules={_spelt(delta.target_modules)} names modules that cannot have this "
            f"delta:\n{_listing(refused)}\nName the {_wanted(delta)} inside them, or take them out "
            "with exclude_modules."
        )
    by_role = {p: found[p] for p in wanted if p in found and not _named(p, delta)}
    apart = resolve(model, delta.told_apart(), lenient=True)
    by_role |= {p: apart[p] for p in wanted if p in apart and p not in by_role}
    return Match(tuple(wanted), saved, tuple(skipped), by_role)


def selects(pattern: str | Iterable[str], path: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, names match its end."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in pattern)


def unswappable(module: nn.Module, delta: Delta | None, parent: nn.Module | None) -> str | None:
    """Why surgery leaves ``module`` alone, in words; None when it is swapped.

    Args:
        delta: the delta to bind, or None for the frozen layer.
        parent: the ``nn.TransformerEncoderLayer`` that the module is a child of, if any.
    """
    kind = type(module)
    if parametrize.is_parametrized(module):
        return "parametrized: its weight is computed at every access"
    norm = delta is not None and NORM in delta.places and is_norm(module)
    if not norm and delta is not None and LINEAR not in delta.places:
        return f"{kind.__name__} is no LayerNorm or RMSNorm"
    if not norm and delta_class(kind) is None:
        return _why_not_kind(module)
    weight = module.weight
    if type(weight) is not nn.Parameter:
        return (
            f"its weight is a {type(weight).__name__}, not a plain parameter (quantized, sharded)"
        )
    if weight.dtype not in _FLOATS:
        return f"its weight is {weight.dtype}; a delta needs float16, bfloat16, float32 or float64"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (accelerate's offload does that)"
    if norm:
        return None
    if weight.dim() != 2 or 0 in weight.shape:
        return f"its weight has the shape {list(weight.shape)}, not [out, in]"
    if parent is not None:
        return "its nn.TransformerEncoderLayer reads .weight in a fast path that skips deltas"
    return None


def frozen_linears(modules: dict[str, nn.Module]) -> list[str]:
    """Paths of the linear layers without a delta that the op could run as they are."""
    parents = encoder_children(modules)
    return [
        path
        for path, module in modules.items()
        if not isinstance(module, LinearPlace)
        and unswappable(module, None, parents.get(path)) is None
    ]


def nearest(path: str, known: Iterable[str], count: int = 5) -> list[str]:
    """Known paths whose last parts look most like ``path``, best first."""
    depth = path.count(".") + 1
    ends: dict[str, str] = {}
    for candidate in known:
        if candidate:
            ends.setdefault(".".join(candidate.split(".")[-depth:]), candidate)
    return difflib.get_close_matches(path, ends, n=count, cutoff=0.5)


# --------------------------------------------------------------------------------------- details


def _named(path: str, delta: Delta) -> bool:
    """Whether ``target_modules`` takes ``path`` by a name or a regular expression."""
    pattern = plain(delta.target_modules)
    return bool(pattern) and selects(pattern, path)


def _wanted(delta: Delta) -> str:
    return " and ".join({LINEAR: "linear layers", NORM: "norms"}[p] for p in sorted(delta.places))


def _in_chosen_layer(path: str, delta: Delta) -> bool:
    if delta.layers_to_transform is None:
        return True
    found = None
    for pattern in delta.layers_pattern or (r"[^.]*",):
        # the first index of the path: a later one may count experts
        start = r"(?:^|.*?\.)" if delta.layers_pattern else r".*?\."
        found = re.match(rf"{start}{pattern}\.(\d+)\.", path)
        if found:
            break
    return found is not None and int(found.group(1)) in delta.layers_to_transform


def _output_heads(model: nn.Module, delta: Delta) -> set[int]:
    """Ids of the modules that "all-linear" leaves out, as PEFT does: heads get no low rank."""
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    if output is not None:
        return {id(output)}
    if delta.task_type == "SEQ_CLS":
        for name in _HEADS:
            head = getattr(model, name, None)
            if isinstance(head, nn.Module):
                return {id(head)}
    return set()


def _saved_paths(modules: dict[str, nn.Module], delta: Delta, lenient: bool) -> tuple[str, ...]:
    found: list[str] = []
    for name in delta.modules_to_save:
        # PEFT compares the end of the string, not whole parts: "classifier" takes pre_classifier
        hits = [path for path in modules if path and path.endswith(name)]
        if not hits and not lenient:
            raise TargetError(_no_such_name("modules_to_save", name, modules))
        found += hits
    outermost = [p for p in dict.fromkeys(found) if not inside(p, [q for q in found if q != p])]
    return tuple(outermost)


def inside(path: str, roots: Iterable[str]) -> bool:
    """Whether ``path`` is one of ``roots`` or below one."""
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def encoder_children(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Path of a child → its torch encoder layer, whose fast path reads linear1.weight directly."""
    return {
        f"{path}.{child}" if path else child: module
        for path, module in modules.items()
        if isinstance(module, nn.TransformerEncoderLayer)
        for child, _ in module.named_modules()
        if child
    }


def _why_not_kind(module: nn.Module) -> str:
    kind = type(module)
    home = kind.__module__.split(".")[0]
    if home in ("bitsandbytes", "auto_gptq", "gptqmodel", "awq", "hqq", "eetq", "aqlm"):
        return f"quantized by {home} ({kind.__name__})"
    if isinstance(module, nn.Linear):
        return f"{kind.__name__} is a subclass of nn.Linear; only the exact type is swapped"
    return f"{kind.__name__} is not a linear layer"


def _refuse_second_delta(modules: dict[str, nn.Module]) -> None:
    for path, module in modules.items():
        if isinstance(module, LinearPlace) or has_copies(module):
            raise AttachError(
                f"the model has a delta already, at {path or 'its root'!r}. Call handle.revert() "
                "or handle.merge_and_unload() first (deltaops.surgery.handle_of(model) finds it)."
            )
        if type(module).__module__.startswith("peft.tuners."):
            raise AttachError(
                f"the model has a PEFT adapter already, at {path or 'its root'!r}. Use "
                "deltaops.accelerate(model) to speed it up, or merge_and_unload() it first."
            )


def _refuse_unmatched_names(modules: dict[str, nn.Module], delta: Delta) -> None:
    if isinstance(delta.target_modules, str):
        return
    for name in plain(delta.target_modules):
        if not any(selects((name,), path) for path in modules):
            raise TargetError(_no_such_name("target_modules", name, modules))


def _no_such_name(subject: str, name: str, modules: Iterable[str]) -> str:
    close = nearest(name, modules)
    hint = f"Nearest: {', '.join(close)}." if close else f"It has {_ends(modules)}."
    return f"{subject} names {name!r}, and no module of the model is called that. {hint}"


def _nothing_matched(modules: dict[str, nn.Module], delta: Delta, skipped: list[Skip]) -> str:
    target = delta.target_modules
    head = f"target_modules={_spelt(target)} leaves no module for {delta.kind}"
    if skipped:
        return f"{head}; each of those it matches is left alone:\n{_listing(skipped)}"
    if isinstance(target, str) and not roles(target):
        close = nearest(target, modules)
        hint = f"nearest names: {', '.join(close)}" if close else f"it has {_ends(modules)}"
        return (
            f"{head}: a string is a regular expression for the whole path ({hint}). For names pass "
            f"a list: [{target!r}]."
        )
    return f"{head}: after exclude_modules and modules_to_save nothing is left of {_ends(modules)}."


def _ends(modules: Iterable[str]) -> str:
    ends = sorted({path.rsplit(".", 1)[-1] for path in modules if path and not path[-1].isdigit()})
    shown = ", ".join(ends[:12]) or "no modules at all"
    return f"{shown}, …" if len(ends) > 12 else shown


def _spelt(pattern: str | tuple[str, ...]) -> str:
    if isinstance(pattern, str):
        return repr(pattern)
    shown = ", ".join(repr(name) for name in pattern[:6])
    return f"[{shown}, …]" if len(pattern) > 6 else f"[{shown}]"


def _listing(skipped: list[Skip], limit: int = 10) -> str:
    lines = [f"  {path}: {reason}" for path, reason in skipped[:limit]]
    if len(skipped) > limit:
        lines.append(f"  … and {len(skipped) - limit} more")
    return "\n".join(lines)
