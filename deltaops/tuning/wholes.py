"""What a task has in full, of which few numbers are to recover as much as they can.

A prompt, or the adapters of a model: how it is trained, put into one vector ``[n]``, coded, and
saved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaops.errors import CheckpointError, ConfigError
from deltaops.methods import Adapter, IntrinsicAdapter, IntrinsicPrompt, Prompt
from deltaops.methods.base import MODEL, Delta
from deltaops.methods.decoder import ADAPTER, FACTS, PROMPT, AdapterSizes, Sizes
from deltaops.methods.intrinsic_adapter import adapter_in
from deltaops.modules import DecodedAdapters, exchange_prompt
from deltaops.surgery import Handle, attach

from .autoencoder import AutoEncoder, Coded, CodedAdapters, CodedPrompt

HIDDEN = 64
"""h of adapters: there are so many numbers that W₂ [n, d] would be as large as the model."""


_OF_BOTH = ("target_modules", "exclude_modules", "autocast_adapter_dtype", "task_type")
"""Settings that a prompt and its few numbers share."""


class Whole(ABC):
    """A kind of full delta."""

    of: ClassVar[str]
    lr: ClassVar[float]
    """Peak learning rate where none is named."""
    intrinsic_lr: ClassVar[float]
    """The same of its few numbers."""
    title: ClassVar[str]
    """What people call one."""

    def __init__(self, delta: Delta) -> None:
        self.delta = delta

    def vector(self, handle: Handle) -> Tensor:
        """A copy ``[n]`` of what is bound, float32."""
        return torch.cat([p.detach().float().flatten() for p in self._tensors(handle)])

    @abstractmethod
    def sizes(self, handle: Handle, q: int) -> Sizes | AdapterSizes:
        """Of a decoder of what is bound."""

    @abstractmethod
    def intrinsic(self, *, q: int | None = None, decoder: Path | None = None) -> Delta:
        """The numbers of it: q by a random projection, or those of a decoder."""

    @abstractmethod
    def facts(self, handle: Handle) -> dict[str, Any]:
        """What a decoder's file says of it."""

    @abstractmethod
    def coded(
        self, model: nn.Module, full: Tensor, coder: AutoEncoder
    ) -> AbstractContextManager[Coded]:
        """A context: inside, ``model`` has one of ``full [N, n]``, coded, and gives it."""

    @contextmanager
    def bound(self, model: nn.Module, vector: Tensor) -> Iterator[Handle]:
        """Inside, ``model`` has what is in ``vector``."""
        handle = attach(model, self.delta)
        try:
            parameters = list(self._tensors(handle))
            with torch.no_grad():
                for p, part in zip(parameters, _parts(vector, parameters), strict=True):
                    p.copy_(part)
            yield handle
        finally:
            handle.revert()

    def _tensors(self, handle: Handle) -> Iterator[Tensor]:
        """In the order of a decoder."""
        yield from handle.parameters()


class WholePrompt(Whole):
    """Prompt tuning."""

    of: ClassVar[str] = PROMPT
    lr: ClassVar[float] = 0.02
    intrinsic_lr: ClassVar[float] = 0.05
    title: ClassVar[str] = "full prompt"
    delta: Prompt

    def sizes(self, handle: Handle, q: int) -> Sizes:
        """See :meth:`Whole.sizes`; h is d, as in the paper."""
        (prompt,) = handle.parameters()
        length, width = prompt.shape
        return Sizes(q, length, width, width)

    def intrinsic(self, *, q: int | None = None, decoder: Path | None = None) -> IntrinsicPrompt:
        """See :meth:`Whole.intrinsic`."""
        same = {name: getattr(self.delta, name) for name in _OF_BOTH}
        if decoder is not None:
            return IntrinsicPrompt(decoder=str(decoder), **same)
        return IntrinsicPrompt(q, self.delta.num_virtual_tokens, **same)

    def facts(self, handle: Handle) -> dict[str, Any]:
        """See :meth:`Whole.facts`."""
        return {"prompt": self.delta.settings()}

    @contextmanager
    def coded(self, model: nn.Module, full: Tensor, coder: AutoEncoder) -> Iterator[Coded]:
        """See :meth:`Whole.coded`."""
        handle = attach(model, self.delta)
        try:
            (prompt,) = handle.parameters()
            made = CodedPrompt(full, coder, prompt.shape[1])
            exchange_prompt(model.get_submodule(handle.sites[0]), made)
            yield made
        finally:
            handle.revert()


class WholeAdapter(Whole):
    """Adapter tuning."""

    of: ClassVar[str] = ADAPTER
    lr: ClassVar[float] = 1e-3
    intrinsic_lr: ClassVar[float] = 0.05
    title: ClassVar[str] = "full adapters"
    delta: Adapter

    def sizes(self, handle: Handle, q: int) -> AdapterSizes:
        """See :meth:`Whole.sizes`."""
        return AdapterSizes(q, sum(p.numel() for p in handle.parameters()), HIDDEN)

    def intrinsic(self, *, q: int | None = None, decoder: Path | None = None) -> IntrinsicAdapter:
        """See :meth:`Whole.intrinsic`."""
        if decoder is not None:
            return IntrinsicAdapter(decoder=str(decoder))
        same = {field.name: getattr(self.delta, field.name) for field in fields(Adapter)}
        return IntrinsicAdapter(**same, intrinsic_dim=q)

    def facts(self, handle: Handle) -> dict[str, Any]:
        """See :meth:`Whole.facts`: settings and places, which the numbers are for in turn."""
        places = [[site.path, site.out_features] for site in handle.places]
        return {"adapter": self.delta.settings(), "places": places}

    @contextmanager
    def coded(self, model: nn.Module, full: Tensor, coder: AutoEncoder) -> Iterator[Coded]:
        """See :meth:`Whole.coded`."""
        handle = attach(model, self.intrinsic(q=1))
        try:
            (source,) = (m for m in model.modules() if isinstance(m, DecodedAdapters))
            made = CodedAdapters(full, coder)
            source.decoder = made
            yield made
        finally:
            handle.revert()

    def _tensors(self, handle: Handle) -> Iterator[Tensor]:
        state = handle.state()
        for site in handle.places:
            if site.place != MODEL:
                for suffix in self.delta.shapes(site, handle.model):
                    yield state[site.key(suffix)]


def whole_of(delta: Delta) -> Whole:
    """The kind that ``delta`` is of. Raises: ConfigError where it is neither, or more."""
    if getattr(delta, "modules_to_save", ()):
        raise ConfigError(
            f"--of: nothing but a prompt or adapters is decoded, and modules_to_save="
            f"{delta.modules_to_save!r} would train beside them. Leave it out."
        )
    if type(delta) is Prompt:
        return WholePrompt(delta)
    if type(delta) is Adapter:
        return WholeAdapter(delta)
    raise ConfigError(
        f"--of must be prompt or adapter, which few numbers are decoded to, got {delta!r}. Write "
        "prompt:num_virtual_tokens=20, or adapter:style=pfeiffer,size=8."
    )


def whole_in(facts: Mapping[str, Any]) -> Whole:
    """What the decoder makes whose file says ``facts``. Raises: CheckpointError."""
    if facts["of"] == PROMPT:
        return WholePrompt(_prompt_in(facts))
    return WholeAdapter(adapter_in(facts))


def _prompt_in(facts: Mapping[str, Any]) -> Prompt:
    try:
        delta = Prompt(**facts["prompt"])
        if delta.num_virtual_tokens != facts["num_virtual_tokens"]:
            raise ValueError("num_virtual_tokens")
        return delta
    except (ConfigError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{FACTS} of a decoder must have the settings of a prompt of its length: "
            f"{type(error).__name__}: {error}. Fit it again with `deltaops intrinsic fit`."
        ) from error


def _parts(vector: Tensor, like: list[Tensor]) -> Iterator[Tensor]:
    parts = torch.split(vector, [tensor.numel() for tensor in like])
    return (part.view_as(tensor) for part, tensor in zip(parts, like, strict=True))
