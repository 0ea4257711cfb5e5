"""What every delta method is: a value that says where it binds, how, and what it promises.

A method is one file here. Surgery asks it, in this order: which modules (``target_modules``,
``exclude_modules``, ``modules_to_save``), whether one fits (:meth:`Delta.unfit`), to bind and
unbind (:meth:`Delta.bind`, :meth:`Delta.unbind`), what to merge (:meth:`Delta.delta_weight`) and
what to save (:meth:`Delta.tensors`, :meth:`Delta.shapes`, :meth:`Delta.to_peft`).
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaops.errors import ConfigError

ALL_LINEAR = "all-linear"


class Promise(enum.Enum):
    """What a method promises; ``tests/methods`` runs a contract test for each."""

    IDENTITY_AT_START = "a freshly attached model computes what it computed before"
    MERGE_EQUALS_APPLY = "merged weights compute what the applied delta computes"
    REVERT_RESTORES_BITS = "reverting gives back every bit and every requires_grad flag"


class Delta(ABC):
    """A delta method with its settings."""

    kind: ClassVar[str]
    """Short name, as in ``deltaops tune --delta KIND:key=value``."""
    promises: ClassVar[frozenset[Promise]]

    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] | None
    modules_to_save: tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    task_type: str | None

    @abstractmethod
    def unfit(self, in_features: int, out_features: int) -> str | None:
        """Why a layer of this size cannot have the delta; None when it can."""

    @abstractmethod
    def place(self, kind: type[nn.Module]) -> type[nn.Module] | None:
        """The class that a module of exactly ``kind`` becomes; None when it cannot."""

    @abstractmethod
    def bind(
        self,
        module: nn.Module,
        name: str,
        *,
        backend: str,
        strict: bool,
        generator: torch.Generator | None,
    ) -> None:
        """Turn ``module`` into its place and give it the start values of adapter ``name``."""

    @abstractmethod
    def unbind(self, module: nn.Module) -> None:
        """Undo :meth:`bind`; also called where ``bind`` failed halfway."""

    @abstractmethod
    def activate(self, module: nn.Module, active: bool) -> None:
        """Switch the delta of ``module`` on or off (disabled, or merged into the weight)."""

    @abstractmethod
    def delta_weight(self, module: nn.Module, name: str) -> Tensor:
        """What merging adds to the weight ``[N, K]``, in float32 (float64 for float64 weights)."""

    @abstractmethod
    def tensors(self, module: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """Suffix in a checkpoint → parameter."""

    @abstractmethod
    def shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """Suffix in a checkpoint → shape, for a layer of this size."""

    @abstractmethod
    def to_peft(self) -> dict[str, Any]:
        """This method's part of PEFT's ``adapter_config.json``."""

    @classmethod
    @abstractmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Delta:
        """The method of an ``adapter_config.json``; CheckpointError for what it cannot express."""


def names(subject: str, value: str | Iterable[str] | None) -> tuple[str, ...]:
    """``value`` as a tuple of distinct module names; a single string is one name."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    found = tuple(value) if isinstance(value, Iterable) else (value,)
    for name in found:
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"{subject} must be module names, got {name!r}. Pass strings such as 'q_proj'."
            )
    return tuple(dict.fromkeys(found))


def selector(subject: str, value: str | Iterable[str]) -> str | tuple[str, ...]:
    """``value`` as a regular expression (a string) or a tuple of names (anything else)."""
    if isinstance(value, str):
        if not value:
            raise ConfigError(f"{subject} is empty. Name modules, or leave the default.")
        return value
    found = names(subject, value)
    if not found:
        raise ConfigError(f"{subject} is empty. Name at least one module, or use {ALL_LINEAR!r}.")
    return found
