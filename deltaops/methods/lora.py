"""LoRA: low-rank adaptation.      y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ

W [N, K] stays frozen; A [r, K] and B [N, r] are trained; s = alpha / r, with ``use_rslora``
s = alpha / √r. Merged, the weight is W + s · B A.
Source: Hu et al. 2021 (arXiv 2106.09685); rank-stabilised scaling: Kalajdzievski 2023 (2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaops.errors import CheckpointError, ConfigError
from deltaops.modules import (
    LoraPlace,
    LoraSettings,
    become,
    features,
    lora_class,
    start_values,
    unbecome,
)

from .base import ALL_LINEAR, Delta, Promise, names, selector

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, repr=False)
class LoRA(Delta):
    """Settings of a LoRA delta. Names and meanings are PEFT's.

    Args:
        r: rank, ≥ 1.
        alpha: scale; the branch is multiplied by ``alpha / r`` (``alpha / √r`` with rsLoRA).
        dropout: probability of dropping an element of the branch's input while training, in [0, 1).
        target_modules: "all-linear" (every linear layer but the output embedding), names matched
            from the end of the path (``["q_proj", "v_proj"]``), or a regular expression for the
            whole path.
        exclude_modules: names or a regular expression, taken out of the targets.
        modules_to_save: modules that are trained whole and saved along, such as a new head.
        use_rslora: scale by ``alpha / √r``.
        layers_to_transform: indices of the layers that get the delta (with a list of names only).
        layers_pattern: names of the module list that the indices count, such as "layers".
        autocast_adapter_dtype: keep A and B in float32 where the weight is float16 or bfloat16.
        task_type: PEFT's label, such as "CAUSAL_LM"; kept in files, and "SEQ_CLS" keeps the
            classification head out of "all-linear".
    Raises: ConfigError.
    """

    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    use_rslora: bool = False
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    autocast_adapter_dtype: bool = True
    task_type: str | None = None

    kind: ClassVar[str] = "lora"
    promises: ClassVar[frozenset[Promise]] = frozenset(Promise)

    def __post_init__(self) -> None:
        """Check every value; lists become tuples."""
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ConfigError(f"LoRA: r must be an integer ≥ 1, got {self.r!r}. 8 is usual.")
        if not _is_number(self.alpha) or not math.isfinite(self.alpha):
            raise ConfigError(f"LoRA: alpha must be finite, got {self.alpha!r}. Try 2·r.")
        if not _is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(
                f"LoRA: dropout must be in [0, 1), got {self.dropout!r}. Pass 0.05 for 5 %."
            )
        for flag in ("use_rslora", "autocast_adapter_dtype"):
            if not isinstance(getattr(self, flag), bool):
                raise ConfigError(f"LoRA: {flag} must be a bool, got {getattr(self, flag)!r}.")
        put = object.__setattr__  # the dataclass is frozen; this normalises what was passed
        put(self, "target_modules", selector("LoRA: target_modules", self.target_modules))
        if self.exclude_modules is not None:
            put(self, "exclude_modules", selector("LoRA: exclude_modules", self.exclude_modules))
        put(self, "modules_to_save", names("LoRA: modules_to_save", self.modules_to_save))
        put(self, "layers_pattern", names("LoRA: layers_pattern", self.layers_pattern))
        put(self, "layers_to_transform", _indices(self.layers_to_transform))
        for subject, value in (
            ("target_modules", self.target_modules),
            ("exclude_modules", self.exclude_modules),
        ):
            if isinstance(value, str):
                _check_regex(subject, value)
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError(
                "LoRA: layers_to_transform needs a list of names in target_modules, got the string "
                f"{self.target_modules!r}. Put the layers into the regular expression."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                "LoRA: layers_pattern says what layers_to_transform counts, and that is missing. "
                "Pass both or neither."
            )

    def __repr__(self) -> str:
        """Rank, alpha and whatever differs from its default."""
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name in ("r", "alpha") or getattr(self, field.name) != field.default
        ]
        return f"LoRA({', '.join(shown)})"

    @property
    def scaling(self) -> float:
        """The factor of the branch."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    # ------------------------------------------------------------------------------- binding

    def unfit(self, in_features: int, out_features: int) -> str | None:
        """A rank above either dimension adds parameters and no rank."""
        if self.r > min(in_features, out_features):
            return f"r={self.r} is above its smaller dimension ({in_features}→{out_features})"
        return None

    def place(self, kind: type[nn.Module]) -> type[nn.Module] | None:
        """LoRA binds to linear layers."""
        return lora_class(kind)

    def bind(
        self,
        module: nn.Module,
        name: str,
        *,
        backend: str,
        strict: bool,
        generator: torch.Generator | None,
    ) -> None:
        """See :meth:`Delta.bind`."""
        place = lora_class(type(module))
        assert place is not None, f"{type(module)} passed matching and has no place"
        in_features, out_features = features(module)
        weight = module.weight
        assert isinstance(weight, Tensor)
        upcast = self.autocast_adapter_dtype and weight.dtype in _HALF
        a, b = start_values(
            self.r,
            in_features,
            out_features,
            device=weight.device,
            dtype=torch.float32 if upcast else weight.dtype,
            generator=generator,
        )
        become(module, place, backend, strict)
        assert isinstance(module, LoraPlace)
        module.add_lora(
            name, LoraSettings(self.r, float(self.alpha), self.scaling, float(self.dropout)), a, b
        )

    def unbind(self, module: nn.Module) -> None:
        """See :meth:`Delta.unbind`."""
        unbecome(module)

    def activate(self, module: nn.Module, active: bool) -> None:
        """See :meth:`Delta.activate`."""
        assert isinstance(module, LoraPlace)
        module.delta_active = active

    # ------------------------------------------------------------------------------- merging

    @torch.no_grad()
    def delta_weight(self, module: nn.Module, name: str) -> Tensor:
        """``s · B A`` [N, K], multiplied in float32 at least."""
        assert isinstance(module, LoraPlace)
        tensors = self.tensors(module, name)
        a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
        wide = torch.promote_types(a.dtype, torch.float32)
        # autocast would take the product in half precision
        with torch.autocast(a.device.type, enabled=False):
            return (b.to(wide) @ a.to(wide)) * module.lora[name].scaling

    # ----------------------------------------------------------------------------------- files

    def tensors(self, module: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """PEFT's suffixes."""
        assert isinstance(module, LoraPlace)
        found = {}
        for side in ("lora_A", "lora_B"):
            weight = getattr(module, side)[name].weight
            assert isinstance(weight, nn.Parameter)
            found[f"{side}.weight"] = weight
        return found

    def shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """See :meth:`Delta.shapes`."""
        return {"lora_A.weight": (self.r, in_features), "lora_B.weight": (out_features, self.r)}

    def to_peft(self) -> dict[str, Any]:
        """The fields of peft's LoraConfig that this delta sets; the others keep their defaults."""
        listed = isinstance(self.target_modules, tuple)
        excluded = self.exclude_modules
        return {
            "peft_type": "LORA",
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "bias": "none",
            "use_rslora": self.use_rslora,
            "init_lora_weights": True,
            "target_modules": sorted(self.target_modules) if listed else self.target_modules,
            "exclude_modules": sorted(excluded) if isinstance(excluded, tuple) else excluded,
            "modules_to_save": list(self.modules_to_save) or None,
            "layers_to_transform": (
                None if self.layers_to_transform is None else list(self.layers_to_transform)
            ),
            "layers_pattern": list(self.layers_pattern) or None,
            "task_type": self.task_type,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> LoRA:
        """See :meth:`Delta.from_peft`. Values of the wrong type are a CheckpointError too."""
        _refuse_unknown_features(config)
        try:
            return cls(
                r=config.get("r", 8),
                alpha=config.get("lora_alpha", 8),
                dropout=config.get("lora_dropout", 0.0),
                target_modules=_required(config, "target_modules"),
                exclude_modules=config.get("exclude_modules") or None,
                modules_to_save=_listed(config, "modules_to_save") or (),
                use_rslora=config.get("use_rslora", False),
                layers_to_transform=config.get("layers_to_transform"),
                layers_pattern=_listed(config, "layers_pattern") or (),
                task_type=config.get("task_type"),
            )
        except ConfigError as error:
            raise CheckpointError(f"adapter_config.json: {error}") from error


# ------------------------------------------------------------------------- PEFT's configuration

_EXPRESSED = frozenset(
    {
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "use_rslora",
        "layers_to_transform",
        "layers_pattern",
        "task_type",
        "peft_type",
    }
)
"""Fields that :class:`LoRA` has."""

_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "fan_in_fan_out",  # read off the layer itself
        "inference_mode",
        "megatron_core",  # names a package; only megatron_config switches it on
        "peft_version",
        "qalora_group_size",  # only use_qalora switches it on
        "revision",
    }
)
"""Fields that change nothing about what the saved tensors mean."""

_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Start values that leave the base weights alone; PiSSA, OLoRA, CorDA and LoftQ change them."""


def _refuse_unknown_features(config: Mapping[str, Any]) -> None:
    """Anything switched on that a LoRA branch cannot express is an error that names it."""
    refused = []
    for key, value in config.items():
        if key in _EXPRESSED or key in _HARMLESS:
            continue
        if key == "init_lora_weights":
            if value not in _STARTS:
                refused.append(f"{key}={value!r} (it changes the base weights)")
        elif key == "eva_config" and config.get("init_lora_weights") == "eva":
            continue  # how the start was found, nothing about what it means
        elif value not in (None, False, "none") and value != {} and value != []:
            refused.append(f"{key}={value!r}")
    if refused:
        raise CheckpointError(
            "adapter_config.json uses what deltaops.LoRA does not express: "
            f"{', '.join(sorted(refused))}. Load it with peft and, where it helps, call "
            "deltaops.accelerate on the result."
        )


def _required(config: Mapping[str, Any], key: str) -> str | tuple[str, ...]:
    value = config.get(key)
    if value is None:
        raise CheckpointError(f"adapter_config.json has no {key}, so nothing says where it binds.")
    return value if isinstance(value, str) else _listed(config, key) or ()


def _listed(config: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
    value = config.get(key)
    if value is None or value == []:
        return None
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"adapter_config.json: {key} must be a list of names, got {value!r}.")
    return tuple(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _indices(value: int | Iterable[int] | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        found = (value,) if isinstance(value, int) else tuple(value)
    except TypeError:
        found = ()
    if not found or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in found):
        raise ConfigError(
            f"LoRA: layers_to_transform must be layer indices ≥ 0, got {value!r}. Pass [0, 1]."
        )
    return found


def _check_regex(subject: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"LoRA: {subject}={pattern!r} is a string, so it is a regular expression, and it does "
            f"not compile: {error}. Pass a list for plain names."
        ) from error
