"""(IA)³: a gain for each feature of keys, values and the feed-forward.

    y = l ⊙ (x Wᵀ + b)        keys and values,     l [N, 1]
    y = (l ⊙ x) Wᵀ + b        feed-forward,        l [1, K]

l starts at one. Merged, it scales the rows of W and b, or the columns of W.
Source: Liu et al. 2022 (arXiv 2205.05638).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaops.errors import CheckpointError, ConfigError
from deltaops.modules import DeltaPlace, unbecome

from .base import EXACT, Binding, Delta, Promise, Site, adapter_dtype, wide
from .linear import become_place, laid_out
from .peft_config import listed, refuse_unknown, required, target_fields
from .targets import (
    FEED_FORWARD_OUTPUT,
    KEY_VALUE,
    check_flags,
    normalise,
    plain,
    roles,
    selector,
)


@dataclass(frozen=True, repr=False)
class IA3(Delta):
    """Settings of (IA)³. Names, meanings and files are PEFT's.

    Args:
        target_modules: roles, names or a regular expression as for :class:`deltaops.LoRA`. By
            default the key and value projections of each attention and the last layer of each
            feed-forward. A fused projection (GPT-2) gets gains for its queries too, as in PEFT.
        feedforward_modules: which of them get the gain on their input, by role (also those that
            ``target_modules`` names), by the end of the path, or by a regular expression.
        exclude_modules: names or a regular expression, taken out of the targets.
        modules_to_save: modules that are trained whole and saved along, such as a new head.
        layers_to_transform: indices of the layers that get the delta.
        layers_pattern: names of the module list that the indices count, such as "layers".
        autocast_adapter_dtype: keep the gains in float32 where the weight is float16 or bfloat16.
        task_type: PEFT's label, such as "CAUSAL_LM"; kept in files.
    Raises: ConfigError.
    """

    target_modules: str | tuple[str, ...] = (KEY_VALUE, FEED_FORWARD_OUTPUT)
    feedforward_modules: str | tuple[str, ...] = (FEED_FORWARD_OUTPUT,)
    exclude_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    autocast_adapter_dtype: bool = True
    task_type: str | None = None

    kind: ClassVar[str] = "ia3"
    peft_type: ClassVar[str | None] = "IA3"
    promises: ClassVar[frozenset[Promise]] = EXACT
    merges_last: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check every value; lists become tuples."""
        check_flags(self, "autocast_adapter_dtype")
        value: Any = self.feedforward_modules
        listed_none = value is None or (not isinstance(value, str) and not list(value))
        found = () if listed_none else selector("IA3: feedforward_modules", value)
        object.__setattr__(self, "feedforward_modules", found)  # the dataclass is frozen
        normalise(self)

    def __repr__(self) -> str:
        """Whatever differs from its default."""
        return self._shown()

    def on_input(self, site: Site) -> bool:
        """Whether the gain of ``site`` is on its input: by its role, or PEFT's rule for names."""
        if site.role in roles(self.feedforward_modules):
            return True
        named = plain(self.feedforward_modules)
        if isinstance(named, str):
            return re.fullmatch(named, site.path) is not None
        return site.path.endswith(named)

    def told_apart(self) -> tuple[str, ...]:
        """See :meth:`Delta.told_apart`."""
        return roles(self.feedforward_modules)

    def claims(self, site: Site, module: nn.Module) -> dict[str, bool]:
        """See :meth:`Delta.claims`."""
        return {"weight": False}

    def bind(self, site: Site, modules: Mapping[str, nn.Module], binding: Binding) -> None:
        """See :meth:`Delta.bind`."""
        module = modules[site.path]
        weight = module.weight
        assert isinstance(weight, Tensor)
        (shape,) = self.shapes(site, module).values()
        dtype = adapter_dtype(weight, self.autocast_adapter_dtype)
        gain = torch.ones(shape, dtype=dtype, device=weight.device)
        become_place(module, self.kind, binding).add_gain(
            binding.name, gain, before=self.on_input(site)
        )

    def unbind(self, site: Site, modules: Mapping[str, nn.Module]) -> None:
        """See :meth:`Delta.unbind`."""
        unbecome(modules[site.path])

    def activate(self, module: nn.Module, active: bool, name: str) -> None:
        """See :meth:`Delta.activate`."""
        assert isinstance(module, DeltaPlace)
        module.turn(name, active)

    def unmergeable(self, module: nn.Module) -> str | None:
        """See :meth:`Delta.unmergeable`."""
        return None

    def merged(self, module: nn.Module, name: str) -> dict[str, Tensor]:
        """``l ⊙ W`` by rows and ``l ⊙ b``, or ``l ⊙ W`` by columns."""
        assert isinstance(module, DeltaPlace)
        (gain,) = self.tensors(module, name).values()
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        exact = gain.to(wide(gain))
        found = {"weight": weight.to(exact.dtype) * laid_out(module, exact)}
        if isinstance(bias, Tensor) and not module.gains_input(name):
            found["bias"] = bias.to(exact.dtype) * exact.flatten()
        return found

    def tensors(self, module: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """PEFT's suffix."""
        assert isinstance(module, DeltaPlace)
        gain = module.ia3_l[name]
        assert isinstance(gain, nn.Parameter)
        return {"ia3_l": gain}

    def shapes(self, site: Site, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """See :meth:`Delta.shapes`."""
        return {"ia3_l": (1, site.in_features) if self.on_input(site) else (site.out_features, 1)}

    def to_peft(self, sites: tuple[Site, ...] = ()) -> dict[str, Any]:
        """The fields of peft's IA3Config; where it binds is written as full paths.

        PEFT compares names of feed-forward layers by the end of the string, so that "output.dense"
        would take an attention's output too; a full path means one layer.
        """
        return target_fields(self, sites) | {
            "peft_type": self.peft_type,
            "target_modules": sorted(site.path for site in sites),
            "feedforward_modules": sorted(s.path for s in sites if self.on_input(s)),
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> IA3:
        """See :meth:`Delta.from_peft`."""
        refuse_unknown(cls.__name__, config, ("feedforward_modules", "init_ia3_weights"))
        forward = config.get("feedforward_modules")
        try:
            return cls(
                target_modules=required(config, "target_modules"),
                feedforward_modules=(
                    forward
                    if isinstance(forward, str)
                    else listed(config, "feedforward_modules") or ()
                ),
                exclude_modules=config.get("exclude_modules") or None,
                modules_to_save=listed(config, "modules_to_save") or (),
                task_type=config.get("task_type"),
            )
        except ConfigError as error:
            raise CheckpointError(f"adapter_config.json: {error}") from error
