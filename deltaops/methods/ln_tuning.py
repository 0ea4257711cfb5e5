"""LN tuning: train the weights and biases of the norms.      y = (x − mean) · rstd · γ + β

What is trained is a copy of each norm's parameters in their places; the originals wait and come
back by their bits. RMSNorms, which have only γ, count as well.
Source: Zhao et al. 2023 (arXiv 2312.11420).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from deltaops.errors import CheckpointError, ConfigError
from deltaops.modules import activate_copies, copies, give_back, owners, train_copies

from .base import EXACT, NORM, Binding, Delta, Promise, Site, wide
from .peft_config import listed, refuse_unknown, required, target_fields
from .targets import ALL_NORM, normalise

_SUFFIX = "ln_tuning_layers"
"""Of the keys in PEFT's file."""


@dataclass(frozen=True, repr=False)
class LNTuning(Delta):
    """Settings of LN tuning. Names and files are PEFT's; a norm is trained in its own dtype.

    Args:
        target_modules: which norms: the role "all-norm", names or a regular expression as for
            :class:`deltaops.LoRA`.
        exclude_modules: names or a regular expression, taken out of the targets.
        modules_to_save: modules that are trained whole and saved along, such as a new head.
        layers_to_transform: indices of the layers that get the delta.
        layers_pattern: names of the module list that the indices count, such as "layers".
        task_type: PEFT's label, such as "CAUSAL_LM"; kept in files.
    Raises: ConfigError.
    """

    target_modules: str | tuple[str, ...] = ALL_NORM
    exclude_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    task_type: str | None = None

    kind: ClassVar[str] = "lntuning"
    peft_type: ClassVar[str | None] = "LN_TUNING"
    places: ClassVar[frozenset[str]] = frozenset({NORM})
    trains_copies: ClassVar[bool] = True
    promises: ClassVar[frozenset[Promise]] = EXACT

    def __post_init__(self) -> None:
        """Check every value; lists become tuples."""
        normalise(self)

    def __repr__(self) -> str:
        """Whatever differs from its default."""
        return self._shown()

    def claims(self, site: Site, module: nn.Module) -> dict[str, bool]:
        """See :meth:`Delta.claims`."""
        return dict.fromkeys(_parameters(module), True)

    def bind(self, site: Site, modules: Mapping[str, nn.Module], binding: Binding) -> None:
        """See :meth:`Delta.bind`."""
        module = modules[site.path]
        # BitFit may have given a norm without a bias one, which is BitFit's alone
        others = {name for owner in owners(module) for name in copies(module, owner)}
        parameters = {k: p for k, p in _parameters(module).items() if k not in others}
        train_copies(module, parameters, binding.name)

    def unbind(self, site: Site, modules: Mapping[str, nn.Module]) -> None:
        """See :meth:`Delta.unbind`."""
        give_back(modules[site.path])

    def activate(self, module: nn.Module, active: bool, name: str) -> None:
        """See :meth:`Delta.activate`."""
        activate_copies(module, active, name)

    def unmergeable(self, module: nn.Module) -> str | None:
        """See :meth:`Delta.unmergeable`."""
        return None

    def merged(self, module: nn.Module, name: str) -> dict[str, Tensor]:
        """The trained parameters themselves."""
        return {k: v.detach().to(wide(v), copy=True) for k, v in copies(module, name).items()}

    def tensors(self, module: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """PEFT's suffixes."""
        return {f"{_SUFFIX}.{key}": parameter for key, parameter in copies(module, name).items()}

    def shapes(self, site: Site, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """See :meth:`Delta.shapes`."""
        return {f"{_SUFFIX}.{k}": tuple(p.shape) for k, p in _parameters(module).items()}

    def unlike_peft(
        self, model: nn.Module, sites: tuple[Site, ...], *, writing: bool
    ) -> str | None:
        """See :meth:`Delta.unlike_peft`: one module in two places has the delta in both here."""
        first = {site.path for site in sites}
        by_id = {id(model.get_submodule(path)): path for path in first}
        for path, module in model.named_modules(remove_duplicate=False):
            if path not in first and id(module) in by_id:
                return f"{by_id[id(module)]!r} is also at {path!r}, where it trains nothing"
        return None

    def to_peft(self, sites: tuple[Site, ...] = ()) -> dict[str, Any]:
        """The fields of peft's LNTuningConfig."""
        fields = target_fields(self, sites)
        if self.layers_to_transform is not None:  # PEFT has no such field: every path in full
            fields["target_modules"] = sorted(site.path for site in sites)
        return fields | {"peft_type": self.peft_type}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> LNTuning:
        """See :meth:`Delta.from_peft`."""
        refuse_unknown(cls.__name__, config, ())
        try:
            return cls(
                target_modules=required(config, "target_modules"),
                exclude_modules=config.get("exclude_modules") or None,
                modules_to_save=listed(config, "modules_to_save") or (),
                task_type=config.get("task_type"),
            )
        except ConfigError as error:
            raise CheckpointError(f"adapter_config.json: {error}") from error


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    """A norm's weight, and its bias where it has one."""
    return {name: p for name, p in module._parameters.items() if p is not None}
