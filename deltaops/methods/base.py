"""What every delta method is: a value that says where it binds, how, and what it promises.

A method is one file here. Surgery asks it, in this order: which modules (``target_modules`` and the
other fields about targets; :meth:`Delta.told_apart`), whether they can have it and its sizes suit
(:meth:`Delta.unbindable`, :meth:`Delta.unfit`, :meth:`Delta.unfit_together`), what no other delta
may have beside it (:attr:`Delta.once`, :meth:`Delta.claims`), what they share
(:meth:`Delta.on_model`, :meth:`Delta.shared`), to bind and unbind (:meth:`Delta.enter`,
:meth:`Delta.bind`, :meth:`Delta.unbind`, :meth:`Delta.leave`), to switch on and off
(:meth:`Delta.activate`, :meth:`Delta.switch`), how fast it learns (:meth:`Delta.pace`), what to
merge (:meth:`Delta.unmergeable`, :meth:`Delta.merged`) and what to save (:meth:`Delta.tensors`,
:meth:`Delta.shapes`, :meth:`Delta.portable`, :meth:`Delta.labelled`), where PEFT has a name for the
delta in its words (:meth:`Delta.unlike_peft`, :meth:`Delta.peft_takes`, :meth:`Delta.to_peft`,
:meth:`Delta.from_peft` and the same of tensors).
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from deltaops.errors import ConfigError
from deltaops.packing import Policy

if TYPE_CHECKING:
    from .combined import Combined

LINEAR, NORM, EMBEDDING, ATTENTION, STACK = "linear", "norm", "embedding", "attention", "stack"
"""Kinds of place; an attention is a whole module with its projections, a stack all blocks of a
model with what embeds its tokens."""
EXPERTS = "experts"
"""The kind of place of a mixture's experts, all of them, which are 3-D parameters of one module."""
ROUTER = "router"
"""The kind of place of what chooses among experts by a matrix of its own, and is no layer."""
BY_PARAMETER = frozenset({EXPERTS, ROUTER})
"""Kinds of place that PEFT's file names by their parameters."""
MODEL = "model"
"""The model itself, which has what all places share; see :meth:`Delta.on_model`."""
PEFT_PREFIX = "base_model.model."
"""Of the keys in PEFT's file."""
HALF = (torch.float16, torch.bfloat16)


class Promise(enum.Enum):
    """What a method promises; ``tests/methods`` runs a contract test for each."""

    IDENTITY_AT_START = "a freshly attached model computes what it computed before"
    NEAR_IDENTITY_AT_START = "a freshly attached model computes nearly what it computed before"
    STATED_AT_START = "a freshly attached model is not what it was; the method states what is drawn"
    MERGE_EQUALS_APPLY = "merged weights compute what the applied delta computes"
    REVERT_RESTORES_BITS = "reverting gives back every bit and every requires_grad flag"


EXACT = frozenset(
    {Promise.IDENTITY_AT_START, Promise.MERGE_EQUALS_APPLY, Promise.REVERT_RESTORES_BITS}
)
"""What a method promises that starts as the model and can become part of it."""


@dataclass(frozen=True)
class Site:
    """One place that gets a delta."""

    path: str
    place: str
    """Its kind, such as "linear"."""
    kind: str
    """Name of the module's class."""
    in_features: int
    out_features: int
    """Of a linear layer; a norm's size twice, an embedding's entries and width, an attention's
    hidden size and that of its keys (all heads), a stack's hidden size twice, the experts' hidden
    and inner size."""
    role: str = ""
    """The one by which it was found, or of :meth:`Delta.told_apart`; empty where it has neither."""
    entry: str = ""
    """Path of the layer where the sub-layer begins that ends here, with the role "feed-forward"."""
    heads: int = 0
    """Of an attention's keys."""
    parameters: tuple[str, ...] = ()
    """Of experts and routers: the names of those that have the delta, in the module's own order."""
    part: str = ""
    """Of a :class:`deltaops.Combined`, the name of the part that binds here; else empty."""

    def key(self, suffix: str) -> str:
        """The name of a tensor of this place in ``handle.state()``; the model has no path."""
        key = f"{self.path}.{suffix}" if self.path else suffix
        return f"{self.part}/{key}" if self.part else key


class Binding(NamedTuple):
    """How a delta is bound to all of its sites."""

    name: str
    """Of the adapter."""
    backend: str
    strict: bool
    pack: Policy
    generator: torch.Generator | None
    """Draws the start values; torch's global CPU generator without one."""
    common: dict[str, nn.Module]
    """What the first site made for all of them, by the method's own names."""


class Stored(NamedTuple):
    """What a file holds of a delta."""

    delta: Delta
    """Its settings."""
    state: Mapping[str, Tensor]
    """Its tensors and those of ``modules_to_save``, by the keys of ``handle.state()``."""
    sites: tuple[Site, ...]
    """Where it is bound, or would be."""


class Delta(ABC):
    """A delta method with its settings: a frozen dataclass."""

    kind: ClassVar[str]
    """Short name, as in ``deltaops tune --delta KIND:key=value``."""
    promises: ClassVar[frozenset[Promise]]
    places: ClassVar[frozenset[str]] = frozenset({LINEAR})
    """Kinds of place that it binds to."""
    peft_type: ClassVar[str | None] = None
    """PEFT's name for it; None where PEFT has none, and our own manifest holds it."""
    peft_role: ClassVar[str | None] = None
    """Where PEFT binds it, if nothing but that can be said in PEFT's file."""
    peft_sizes: ClassVar[tuple[str, ...]] = ()
    """Fields of PEFT's config that follow from the model; a file with others is another's."""
    once: ClassVar[str | None] = None
    """What of the whole model it has for itself, so that a combination has it once; or None."""
    trains_copies: ClassVar[bool] = False
    """Whether it trains copies of what it :meth:`claims` for itself, in the originals' places."""
    merges_last: ClassVar[bool] = False
    """Whether what it multiplies a layer by applies to what others have added to it."""

    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] | None
    modules_to_save: tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    task_type: str | None

    # ----------------------------------------------------------------------------- combining

    def __add__(self, other: Delta | Combined) -> Combined:
        """Both on one model; see :class:`deltaops.Combined`."""
        from .combined import combined  # it knows methods, which are deltas

        return combined(self, other)

    def named(self, name: str) -> Combined:
        """This as the part ``name`` of a combination, instead of by its method's name."""
        from .combined import Combined  # it knows methods, which are deltas

        return Combined({name: self})

    # ------------------------------------------------------------------------------- binding

    def enter(self, model: nn.Module) -> None:
        """Change what concerns ``model`` as a whole, before anything is bound; most change nothing.

        Raises: AttachError where it cannot be; the model is as it was then.
        """
        return None

    def leave(self, model: nn.Module) -> None:
        """Undo :meth:`enter`, after everything is unbound; also where that never came."""
        return None

    def switch(self, model: nn.Module, active: bool) -> None:
        """Switch what :meth:`enter` changed, as :meth:`activate` does a place's delta."""
        return None

    def on_model(self, sites: tuple[Site, ...]) -> tuple[int, int] | None:
        """Sizes, for people, of what all ``sites`` share; None where they share nothing.

        The model itself becomes the first site then, of the kind "model" and without a path.
        """
        return None

    def told_apart(self) -> tuple[str, ...]:
        """Roles whose modules are bound in a way of their own, also where they are named."""
        return ()

    def unbindable(self, module: nn.Module) -> str | None:
        """What this module lacks, so that a role leaves it alone and a name is refused; or None."""
        return None

    def named_parameters(self, path: str, module: nn.Module) -> tuple[str, ...]:
        """Which parameters of ``module`` the delta names, to be bound to one by one."""
        return ()

    def unfit(self, site: Site) -> str | None:
        """Why the delta's sizes do not suit the site; None when they do.

        Attaching is refused then, before anything is changed.
        """
        return None

    def unfit_together(self, sites: tuple[Site, ...]) -> str | None:
        """Why the delta cannot be on all of ``sites``; None when it can.

        Attaching is refused then, before anything is changed.
        """
        return None

    def claims(self, site: Site, module: nn.Module) -> dict[str, bool]:
        """Parameters of ``module`` that it trains or changes → whether no other delta may as well.

        Two deltas are refused on one module, before anything is changed, where both name a
        parameter and one of them needs it for itself.
        """
        return {}

    def gate_width(self, site: Site) -> int | None:
        """Features of what a gate on this delta reads at ``site``; None where it can have none."""
        return None

    @abstractmethod
    def bind(self, site: Site, modules: Mapping[str, nn.Module], binding: Binding) -> None:
        """Turn the module of ``site`` into its place and give it the start values."""

    @abstractmethod
    def unbind(self, site: Site, modules: Mapping[str, nn.Module]) -> None:
        """Undo :meth:`bind`; also called where ``bind`` failed halfway, or never came."""

    @abstractmethod
    def activate(self, module: nn.Module, active: bool, name: str) -> None:
        """Switch the adapter ``name`` on or off (disabled, or merged); again is nothing new."""

    def weighed(self, factor: float) -> Delta:
        """The delta that adds ``factor`` times what this one adds, with the same tensors.

        Raises: ConfigError where there is none, because it does not just add.
        """
        raise ConfigError(
            f"{type(self).__name__}: what it does cannot be weighed, since it is no sum of the "
            "layer and one product; it can be on or off. LoRA can be."
        )

    def reread(self, site: Site, module: nn.Module, name: str) -> None:
        """Have the adapter ``name`` of ``module`` go by the settings of this :meth:`weighed`."""
        raise NotImplementedError  # only asked of what weighed returned

    def pace(self, suffix: str) -> float:
        """The factor of the learning rate for the tensor ``suffix``; see ``Handle``."""
        return 1.0

    # ------------------------------------------------------------------------------- merging

    @abstractmethod
    def unmergeable(self, module: nn.Module) -> str | None:
        """Why the delta of ``module`` cannot become part of its parameters; None when it can."""

    @abstractmethod
    def merged(self, module: nn.Module, name: str) -> dict[str, Tensor]:
        """Name of a parameter → its merged value, in float32 at least, laid out as it is."""

    # ----------------------------------------------------------------------------------- files

    @abstractmethod
    def tensors(self, module: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """Suffix in a checkpoint → parameter."""

    @abstractmethod
    def shapes(self, site: Site, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """Suffix in a checkpoint → shape, before anything is bound."""

    def shared(self, suffix: str) -> bool:
        """Whether all sites have one tensor ``suffix``, which counts as the first one's."""
        return False

    def labelled(self, model: nn.Module) -> Delta:
        """The delta with what PEFT's file needs to say of ``model``; most have that already."""
        return self

    def unlike_peft(
        self, model: nn.Module, sites: tuple[Site, ...], *, writing: bool
    ) -> str | None:
        """Why PEFT's file would mean something else than this does; None where it means this.

        Args:
            model: with or without the delta.
            sites: where it is bound.
            writing: of a file that is written; one that is read need not be able to hold more.
        """
        return None

    def peft_takes(self, module: nn.Module) -> bool:
        """Whether PEFT binds the delta to this module, which has the role ``peft_role``."""
        return True

    def to_peft_tensors(
        self, tensors: Mapping[str, Tensor], sites: tuple[Site, ...]
    ) -> dict[str, Tensor]:
        """What PEFT's file holds for these tensors, whose keys are ``<module>.<suffix>``.

        Also asked for tensors on the device "meta", to know what a file must hold, and for those of
        ``modules_to_save``.
        """
        return {f"{PEFT_PREFIX}{key}": tensor for key, tensor in tensors.items()}

    def from_peft_tensors(
        self, tensors: Mapping[str, Tensor], sites: tuple[Site, ...]
    ) -> dict[str, Tensor]:
        """Undo :meth:`to_peft_tensors`, of a file whose keys and shapes were checked."""
        return {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}

    def portable(
        self,
        modules: Mapping[str, nn.Module],
        name: str,
        state: Mapping[str, Tensor],
        sites: tuple[Site, ...],
        *,
        flat: bool,
    ) -> Stored:
        """What a file holds; for most, what is bound.

        That differs where the bound tensors are relative to weights that the delta itself changed,
        and where ``flat`` leaves out what only training needs.

        Args:
            modules: by path, of the sites.
            name: of the adapter.
            state: of the handle, on the CPU.
            sites: where it is bound.
            flat: write the delta that computes the same with tensors alone.
        Raises: CheckpointError where no file could say what is bound.
        """
        return Stored(self, state, sites)

    def to_peft(self, sites: tuple[Site, ...] = ()) -> dict[str, Any]:
        """This method's part of PEFT's ``adapter_config.json``, where there is one.

        Args:
            sites: where it is bound; for what PEFT lists by name.
        """
        raise NotImplementedError  # only asked of a method that has a peft_type

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Delta:
        """The method of an ``adapter_config.json``; CheckpointError for what it cannot express."""
        raise NotImplementedError  # only asked of a method that has a peft_type

    def settings(self) -> dict[str, Any]:
        """Every field, as JSON can hold it; for our own manifest."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]  # every method is a dataclass
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    def _shown(self, *always: str) -> str:
        """For ``__repr__``: the fields ``always`` and whatever differs from its default."""
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)  # type: ignore[arg-type]  # every method is a dataclass
            if field.name in always or getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


def adapter_dtype(weight: Tensor, autocast: bool) -> torch.dtype:
    """The dtype of what is added beside ``weight``: float32 for half precision, if asked for."""
    return torch.float32 if autocast and weight.dtype in HALF else weight.dtype


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype in which ``tensor`` is merged: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)
