"""Which modules of a model a delta binds to, and why not the others.

The rules for names are PEFT's (``peft.tuners.tuners_utils.check_target_module_exists``, 0.21.2), so
that one configuration means the same modules in both. The rule for types is stricter: only the
exact type is swapped, because a subclass may compute something else.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from deltaops.errors import AttachError, TargetError
from deltaops.methods.base import BY_PARAMETER, EXPERTS, Delta
from deltaops.methods.targets import ALL_LINEAR, plain, roles
from deltaops.modules import ROUTER_WEIGHT, holds_delta, holds_experts, is_router

from .anatomy import Found, Whole, misses, resolve, wholes
from .places import WORDS, encoder_children, foreign, place_of, unswappable, wanted
from .record import read

_HEADS = ("score", "classifier")
"""Where transformers keeps a sequence classification head."""


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
    places: dict[str, str]
    """Kind of the place of each site."""
    wholes: dict[str, Whole]
    """Attentions and stacks, where the delta binds to such."""
    parameters: dict[str, tuple[str, ...]]
    """Of experts, those that get the delta."""


def match(model: nn.Module, delta: Delta, *, lenient: bool = False) -> Match:
    """Match ``delta`` against ``model``; nothing is changed.

    Args:
        lenient: for a configuration read from a file, whose names may list modules that this model
            does not have (PEFT writes such); what the file must contain is checked elsewhere.
    Raises: TargetError when nothing matches, or a name that the user wrote cannot have the delta;
        AttachError when the model has a delta already.
    """
    modules = dict(model.named_modules())
    refuse_second_delta(modules)
    saved = _saved_paths(modules, delta, lenient)
    parents = encoder_children(modules)
    wished = roles(delta.target_modules)
    found = resolve(model, wished)
    heads = _output_heads(model, delta) if ALL_LINEAR in wished else set()
    whole = wholes(model, delta.places)
    places: dict[str, str] = {}
    skipped: list[Skip] = []
    refused: list[Skip] = []
    parameters: dict[str, tuple[str, ...]] = {}
    for path, module in modules.items():
        whole_mixture = path in found and found[path].role == EXPERTS
        if not whole_mixture and (chosen := delta.named_parameters(path, module)):
            if not path:
                refused.append(Skip("the model itself", _at_the_root(module, chosen)))
                continue
            parameters[path] = chosen
            reason = _why_not_parameters(path, module, chosen, delta, saved, lenient)
            if reason is not None:
                refused.append(Skip(path, reason))
            else:
                place = place_of(path, module, delta.places, whole)
                assert place is not None  # one without a reason has one
                places[path] = place
            continue
        if (not path and path not in found) or inside(path, saved):
            continue
        named = _named(path, delta)
        if not named and (path not in found or id(module) in heads):
            continue
        if not _in_chosen_layer(path, delta):
            continue
        if delta.exclude_modules is not None and selects(delta.exclude_modules, path):
            continue
        entry = "" if named else found[path].entry
        place = place_of(path, module, delta.places, whole)
        reason = unswappable(module, place, parents.get(path), foreign(delta.places))
        reason = reason or delta.unbindable(module)
        if reason is None and entry:
            reason = unswappable(modules[entry], place, parents.get(entry))
        if place in BY_PARAMETER and named:
            reason = reason or f"{WORDS[place]} are parameters: name those in target_parameters"
        if reason is None and place is not None:
            places[path] = place
            if place == EXPERTS:
                parameters[path] = tuple(n for n, p in module._parameters.items() if p is not None)
        elif reason is not None:
            (refused if named else skipped).append(Skip(path, reason))
    for path, reason in misses(model, wished).items():
        if _in_chosen_layer(f"{path}.", delta) and not inside(path, saved):
            skipped.append(Skip(path, reason))
    if not lenient:
        _refuse_unmatched_names(modules, delta)
    if not places:
        raise TargetError(_nothing_matched(modules, delta, skipped + refused))
    if refused:
        layers = any(path not in parameters for path, _ in refused)
        by_name = any(path in parameters for path, _ in refused)
        remedies = [
            f" Name the {wanted(delta.places)} inside them, or take them out with exclude_modules."
        ] * layers + [" Take parameters that it cannot have out of target_parameters."] * by_name
        raise TargetError(
            f"{_wish(delta)} names what cannot have this delta:\n{_listing(refused)}\n"
            f"{''.join(remedies).lstrip()}"
        )
    by_role = {p: found[p] for p in places if p in found and not _named(p, delta)}
    apart = resolve(model, delta.told_apart(), lenient=True)
    by_role |= {p: apart[p] for p in places if p in apart and p not in by_role}
    return Match(tuple(places), saved, tuple(skipped), by_role, places, whole, parameters)


def selects(pattern: str | Iterable[str], path: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, names match its end."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in pattern)


def nearest(path: str, known: Iterable[str], count: int = 5) -> list[str]:
    """Known paths whose last parts look most like ``path``, best first."""
    depth = path.count(".") + 1
    ends: dict[str, str] = {}
    for candidate in known:
        if candidate:
            ends.setdefault(".".join(candidate.split(".")[-depth:]), candidate)
    return difflib.get_close_matches(path, ends, n=count, cutoff=0.5)


def refuse_second_delta(modules: Mapping[str, nn.Module]) -> None:
    """Raises: AttachError where one of ``modules`` has a delta, ours or PEFT's."""
    for path, module in modules.items():
        if holds_delta(module) or read(module) is not None:
            raise AttachError(
                f"the model has a delta already, at {path or 'its root'!r}. Call handle.revert() "
                "or handle.merge_and_unload() first (deltaops.surgery.handle_of(model) finds it)."
            )
        if type(module).__module__.startswith("peft.tuners."):
            raise AttachError(
                f"the model has a PEFT adapter already, at {path or 'its root'!r}. Use "
                "deltaops.accelerate(model) to speed it up, or merge_and_unload() it first."
            )


# --------------------------------------------------------------------------------------- details


def _named(path: str, delta: Delta) -> bool:
    """Whether ``target_modules`` takes ``path`` by a name or a regular expression."""
    pattern = plain(delta.target_modules)
    return bool(pattern) and selects(pattern, path)


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


def _why_not_parameters(
    path: str,
    module: nn.Module,
    chosen: tuple[str, ...],
    delta: Delta,
    saved: tuple[str, ...],
    lenient: bool,
) -> str | None:
    """Why the parameters ``chosen`` of ``module`` cannot have the delta; None when they can."""
    if not (holds_experts(module) or (is_router(module) and chosen == (ROUTER_WEIGHT,))):
        return (
            f"{', '.join(chosen)} of {type(module).__name__}: target_parameters is for experts in "
            "3-D parameters and for the weight of a router; name layers in target_modules"
        )
    if inside(path, saved):
        return "modules_to_save trains it whole"
    excluded = delta.exclude_modules is not None and selects(delta.exclude_modules, path)
    if not lenient and excluded:
        return (
            "exclude_modules takes it, and says nothing of target_parameters, as in PEFT; name in "
            "target_parameters, in full, only those that get the delta, and drop it there"
        )
    if not lenient and not _in_chosen_layer(path, delta):
        return (
            f"it is in none of layers_to_transform={list(delta.layers_to_transform or ())}, which "
            "says nothing of target_parameters, as in PEFT; name in target_parameters, in full, "
            "only those of these layers"
        )
    place = place_of(path, module, delta.places, {})
    reason = unswappable(module, place, None, foreign(delta.places)) or delta.unbindable(module)
    return reason


def _at_the_root(module: nn.Module, chosen: tuple[str, ...]) -> str:
    return (
        f"{', '.join(chosen)} of {type(module).__name__} is at the model's root, where it has no "
        "path for a file; attach to a model that holds this one as a part"
    )


def _refuse_unmatched_names(modules: dict[str, nn.Module], delta: Delta) -> None:
    parameters = [f"{p}.{n}" for p, m in modules.items() for n in m._parameters]
    for name in getattr(delta, "target_parameters", ()):
        if not any(selects((name,), key) for key in parameters):
            raise TargetError(_no_such_name("target_parameters", name, parameters, "parameter"))
    if isinstance(delta.target_modules, str):
        return
    for name in plain(delta.target_modules):
        if not any(selects((name,), path) for path in modules):
            raise TargetError(_no_such_name("target_modules", name, modules))


def _no_such_name(subject: str, name: str, known: Iterable[str], what: str = "module") -> str:
    close = nearest(name, known)
    hint = f"Nearest: {', '.join(close)}." if close else f"It has {_ends(known)}."
    return f"{subject} names {name!r}, and no {what} of the model is called that. {hint}"


def _nothing_matched(modules: dict[str, nn.Module], delta: Delta, skipped: list[Skip]) -> str:
    target = delta.target_modules
    head = f"{_wish(delta)} leaves no module for {delta.kind}"
    if skipped:
        return f"{head}; each of those it matches is left alone:\n{_listing(skipped)}"
    if isinstance(target, str) and not roles(target):
        close = nearest(target, modules)
        hint = f"nearest names: {', '.join(close)}" if close else f"it has {_ends(modules)}"
        return (
            f"{head}: a string is a regular expression for the whole path ({hint}). For names pass "
            f"a list: [{target!r}]."
        )
    if delta.exclude_modules is None and not delta.modules_to_save:
        kinds = Counter(type(m).__name__ for m in modules.values() if not any(m.children()))
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6))
        return f"{head}: the model has none of that kind. Found: {found or 'no modules at all'}."
    return f"{head}: after exclude_modules and modules_to_save nothing is left of {_ends(modules)}."


def _ends(modules: Iterable[str]) -> str:
    ends = sorted({path.rsplit(".", 1)[-1] for path in modules if path and not path[-1].isdigit()})
    shown = ", ".join(ends[:12]) or "no modules at all"
    return f"{shown}, …" if len(ends) > 12 else shown


def _wish(delta: Delta) -> str:
    """What the delta says of its targets."""
    wish = f"target_modules={_spelt(delta.target_modules)}"
    more: tuple[str, ...] = getattr(delta, "target_parameters", ())
    return f"{wish}, target_parameters={_spelt(more)}" if more else wish


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
