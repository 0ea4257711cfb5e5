"""What two places, or two parts of a combination, cannot both have; found before any change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from deltaops.errors import AttachError
from deltaops.methods.base import MODEL, Delta, Site


def refuse_conflicts(model: nn.Module, parts: Mapping[str, Delta], sites: Iterable[Site]) -> None:
    """Raises: AttachError where two of ``parts`` would train the same of ``model``, or need a
    parameter for themselves that the other changes; and where two modules have one parameter, of
    which each would train a copy."""
    by_once: dict[str, str] = {}
    for name, delta in parts.items():
        if delta.once is None:
            continue
        other = by_once.setdefault(delta.once, name)
        if other != name:
            raise AttachError(
                f"attach: the parts {other!r} and {name!r} both want to be {delta.once}, which a "
                "model has once. Take one of them out."
            )
    claims: dict[tuple[str, str], list[tuple[str, bool]]] = {}
    copied: dict[int, str] = {}
    for site in sites:
        if site.place == MODEL:
            continue
        delta, module = parts[site.part], model.get_submodule(site.path)
        for key, alone in delta.claims(site, module).items():
            claims.setdefault((site.path, key), []).append((site.part, alone))
            original = module._parameters.get(key)
            if alone and delta.trains_copies and original is not None:
                other = copied.setdefault(id(original), site.path)
                if other != site.path:
                    raise AttachError(
                        f"attach: the {key} of {site.path!r} is also that of {other!r}, and each "
                        "would train a copy of its own. Name one of the two in exclude_modules, "
                        "or untie them first."
                    )
    found = [
        f"  {path}: its {key}, by {' and '.join(repr(name) for name, _ in claimed)}"
        for (path, key), claimed in claims.items()
        if len(claimed) > 1 and any(alone for _, alone in claimed)
    ]
    if found:
        more = [f"  … and {len(found) - 10} more"] if len(found) > 10 else []
        raise AttachError(
            "attach: these parts change the same parameter, and one of them needs it for itself:\n"
            + "\n".join([*found[:10], *more])
            + "\nTake those modules out of one of them, with target_modules or exclude_modules."
        )
