"""A change to a model as a value: look at it, then apply it, all or nothing.

plan = surgery.plan(model, LoRA(r=16)); print(plan); handle = plan.apply()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from deltaops.backends import DeltaLinearCall
from deltaops.dispatch import explain_call
from deltaops.errors import AttachError, ConfigError, TargetError
from deltaops.methods import Combined, Delta, parts_of
from deltaops.methods.base import ATTENTION, MODEL, Binding, Site
from deltaops.modules import become, frozen_class, unbecome
from deltaops.packing import Policy, check_policy

from .anatomy import wholes
from .conflicts import refuse_conflicts
from .gates import bind_gate, gate_shapes, refuse_gates
from .handle import Handle, gathered
from .match import Match, inside, match, refuse_second_delta
from .places import foreign, frozen_linears, place_of, size_of, unswappable
from .record import Record, exchange, take_over, write
from .tree import Leaf, draw

Generators = torch.Generator | Mapping[str, torch.Generator]
"""One that draws the start values of all parts in turn, or one for each part by its name: a part
then starts as it would alone."""


@dataclass(frozen=True)
class Plan:
    """What :meth:`apply` will change. Printing it shows the tree; nothing is changed before."""

    model: nn.Module = field(repr=False)
    delta: Delta | Combined
    name: str
    sites: tuple[Site, ...]
    saved: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    frozen: tuple[str, ...]
    """Paths of the other linear layers, which the same op runs without a delta."""
    backend: str
    strict: bool
    pack: Policy

    @property
    def gated(self) -> bool:
        """Whether every part gets gates."""
        return isinstance(self.delta, Combined) and self.delta.gated

    def __str__(self) -> str:
        sizes = dict.fromkeys(self.sites, 0)
        for site, _, shape in self.tensors():
            sizes[site] += torch.Size(shape).numel()
        leaves = gathered(sizes, lambda site: site.part, self.skipped)
        leaves += [Leaf(p, "trained whole", f"{_count(self.model, p):,}") for p in self.saved]
        return f"{self.delta} on {type(self.model).__name__}\n{draw(leaves)}"

    def apply(self, *, generator: Generators | None = None) -> Handle:
        """Change the model and return the handle. If anything fails the model is as it was.

        Args:
            generator: draws the start values, or one for each part by its name; torch's global CPU
                generator without one.
        Raises: AttachError when the model changed since the plan was made, or has a delta now;
            ConfigError for generators of other parts than the delta has.
        """
        modules = dict(self.model.named_modules())
        self._check_unchanged(modules)
        parts = parts_of(self.delta)
        drawn_by = _by_part(generator, [part or self.name for part in parts])
        parameters = dict(self.model.named_parameters())
        trained = frozenset(n for n, p in parameters.items() if p.requires_grad)
        originals: dict[str, dict[str, torch.Tensor]] = {}
        # what was begun, so that nothing else is undone
        entered = False
        bound: list[Site] = []
        swapped: list[str] = []
        try:
            for path in self.saved:
                originals[path] = take_over(modules[path])
            for parameter in parameters.values():
                parameter.requires_grad_(False)
            entered = True
            for delta in parts.values():
                delta.enter(self.model)
            bindings = {
                part: Binding(
                    part or self.name,
                    self.backend,
                    self.strict,
                    self.pack,
                    drawn_by[part or self.name],
                    {},
                )
                for part in parts
            }
            for site in self.sites:
                bound.append(site)
                parts[site.part].bind(site, modules, bindings[site.part])
                if self.gated:
                    name = bindings[site.part].name
                    bind_gate(site, parts[site.part], modules[site.path], name)
            for path in self.frozen:
                place = frozen_class(type(modules[path]))
                if place is not None:  # None: no longer the type that the plan saw
                    swapped.append(path)
                    become(modules[path], place, self.backend, self.strict, self.pack)
        except BaseException:  # also KeyboardInterrupt and out of memory: undo, then raise it
            for site in bound:
                parts[site.part].unbind(site, modules)
            for delta in parts.values() if entered else ():
                delta.leave(self.model)
            for path in swapped:
                unbecome(modules[path])
            for path, tensors in originals.items():
                exchange(modules[path], tensors)
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in trained)
            raise
        record = Record(
            self.delta,
            self.name,
            self.sites,
            self.saved,
            self.skipped,
            trained,
            self.frozen,
            originals,
        )
        write(self.model, record)
        return Handle(self.model, record)

    def tensors(self) -> Iterator[tuple[Site, str, tuple[int, ...]]]:
        """``(site, suffix, shape)`` of all that the delta will train; what sites share, once."""
        parts = parts_of(self.delta)
        begun: set[str] = set()
        for site in self.sites:
            delta = parts[site.part]
            shapes = delta.shapes(site, self.model.get_submodule(site.path))
            if self.gated:
                shapes = shapes | gate_shapes(site, delta)
            for suffix, shape in shapes.items():
                if site.part not in begun or not delta.shared(suffix):
                    yield site, suffix, shape
            begun.add(site.part)

    def _check_unchanged(self, modules: dict[str, nn.Module]) -> None:
        refuse_second_delta(modules)
        parts = parts_of(self.delta)
        whole = wholes(self.model, frozenset().union(*(d.places for d in parts.values())))
        for site in self.sites:
            places = parts[site.part].places
            if site.place == MODEL:
                continue
            module = modules.get(site.path)
            if module is None:
                reason: str | None = "it is gone"
            else:
                place = place_of(site.path, module, places, whole)
                reason = unswappable(module, place, None, foreign(places))
                if reason is None and place is not None:
                    now = size_of(site.path, module, place, whole)
                    if now != (site.in_features, site.out_features):
                        reason = f"it is now {now[0]}→{now[1]}"
            if reason is not None:
                raise AttachError(
                    f"plan.apply: {site.path!r} is not what the plan saw: {reason}. "
                    "Make a new plan."
                )
        for path in self.saved:
            if path not in modules:
                raise AttachError(f"plan.apply: {path!r} is gone. Make a new plan.")


def plan(
    model: nn.Module,
    delta: Delta | Combined,
    *,
    name: str = "default",
    backend: str = "auto",
    strict: bool = False,
    frozen: bool = True,
    pack: Policy = "auto",
) -> Plan:
    """What attaching ``delta`` to ``model`` would change; nothing is changed.

    Args:
        model: any torch model.
        delta: such as :class:`deltaops.LoRA`, or several joined by ``+``.
        name: of the adapter, in the keys of ``state_dict`` and for ``save``.
        backend: for every place, see :func:`deltaops.ops.delta_linear`.
        strict: raise instead of falling back to eager torch.
        frozen: see :func:`deltaops.attach`.
        pack: see :func:`deltaops.attach`.
    Raises: TargetError, AttachError, ConfigError (a name that cannot be one, or a rank above a
        layer's dimensions).
    """
    return make_plan(
        model, delta, name=name, backend=backend, strict=strict, frozen=frozen, pack=pack,
        lenient=False,
    )  # fmt: skip


def make_plan(
    model: nn.Module,
    delta: Delta | Combined,
    *,
    name: str,
    backend: str,
    strict: bool,
    frozen: bool = True,
    pack: Policy = "auto",
    lenient: bool,
) -> Plan:
    """:func:`plan`; ``lenient`` for a configuration read from a file, see ``match``.

    A file may also have a rank above a layer's dimensions: PEFT writes such, and it loads.
    """
    if not isinstance(delta, (Delta, Combined)):
        raise ConfigError(
            f"attach: expected a delta such as deltaops.LoRA(r=16), got {type(delta).__name__}."
        )
    check_name(name)
    check_backend(backend)
    check_policy(pack)
    parts = parts_of(delta)
    for part in filter(None, parts):
        check_name(part)
    sites: list[Site] = []
    skipped: list[tuple[str, str]] = []
    saved: tuple[str, ...] = ()
    for part, single in parts.items():
        try:
            found, bound = _sites(model, single, part, lenient)
        except (TargetError, ConfigError) as error:
            if not part:
                raise
            reason = str(error).removeprefix("attach: ")
            raise type(error)(f"attach: the part {part!r}: {reason}") from error
        saved = found.saved  # those of all parts
        skipped += [(path, f"{part}: {why}" if part else why) for path, why in found.skipped]
        sites += bound
    refuse_conflicts(model, parts, sites)
    if isinstance(delta, Combined) and delta.gated:
        refuse_gates(model, parts, tuple(sites), strict)
    others = []
    if frozen:
        taken = {site.path for site in sites} | {site.entry for site in sites}
        others = [
            path
            for path in frozen_linears(dict(model.named_modules()))
            if path not in taken and not inside(path, saved)
        ]
    return Plan(
        model, delta, name, tuple(sites), saved, tuple(skipped), tuple(others), backend, strict,
        pack,
    )  # fmt: skip


def _sites(model: nn.Module, delta: Delta, part: str, lenient: bool) -> tuple[Match, list[Site]]:
    """What ``delta`` matches, and its sites, of the part ``part`` of a combination."""
    found = match(model, delta, lenient=lenient)
    modules = dict(model.named_modules())
    sites = []
    unfit = []
    for path in found.sites:
        role = found.found.get(path)
        place = found.places[path]
        site = Site(
            path,
            place,
            type(modules[path]).__name__,
            *size_of(path, modules[path], place, found.wholes),
            *(("", "") if role is None else (role.role, role.entry)),
            heads=found.wholes[path].heads if place == ATTENTION else 0,
            parameters=found.parameters.get(path, ()),
            part=part,
        )
        reason = delta.unfit(site)
        if reason is not None:
            unfit.append(f"  {path}: {reason}")
        sites.append(site)
    if unfit and not lenient:
        listing = "\n".join(unfit[:10])
        raise ConfigError(
            f"attach: the delta does not fit {len(unfit)} of the {len(sites)} matched "
            f"layers:\n{listing}\nChange its size, or name those layers in exclude_modules (a new "
            "head belongs in modules_to_save)."
        )
    reason = delta.unfit_together(tuple(sites))
    if reason is not None:
        raise TargetError(f"attach: {reason}")
    whole = delta.on_model(tuple(sites))
    if whole is not None:
        sites.insert(0, Site("", MODEL, type(model).__name__, *whole, part=part))
    return found, sites


def check_name(name: str) -> None:
    """An adapter's name is a key of ``state_dict`` and a folder name, so not every string is one.

    Raises: ConfigError.
    """
    plain = isinstance(name, str) and name.replace("-", "_").isidentifier() and name.isascii()
    # of instances: "training" is no attribute of the classes
    taken = plain and any(hasattr(kind(), name) for kind in (nn.ModuleDict, nn.ParameterDict))
    if not plain or taken or name.startswith("lora_"):
        raise ConfigError(
            f"attach: {name!r} cannot name an adapter: letters, digits, - and _ only, starting "
            "with a letter, no word that nn.ModuleDict uses, not starting with lora_. Try "
            "'default'."
        )


def check_backend(backend: str) -> None:
    """An unknown backend should stop here, not in the first forward pass.

    Raises: NoBackendError.
    """
    explain_call(DeltaLinearCall("cpu", torch.float32, (), 1, 1, 1, (), False, "row"), backend)


def _by_part(
    generator: Generators | None, parts: Sequence[str]
) -> Mapping[str, torch.Generator | None]:
    """What draws each part's start values. Raises: ConfigError."""
    if not isinstance(generator, Mapping):
        return dict.fromkeys(parts, generator)
    if generator.keys() != set(parts):
        raise ConfigError(
            f"attach: generator must have one for each of {', '.join(parts)}, got "
            f"{', '.join(generator) or 'none'}. Name them as the parts are, or give one for all."
        )
    return generator


def _count(model: nn.Module, path: str) -> int:
    return sum(p.numel() for p in model.get_submodule(path).parameters())
