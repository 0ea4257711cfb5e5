"""A batch whose samples have adapters of their own, in training too.

On a model of ``deltaops.attach`` the names are its parts', and :mod:`.by_part` does it. On a PEFT
model, PEFT's ``model(..., adapter_names=[...])`` refuses training mode. Its layers do not: they
compute each sample with its own adapter, and gradients reach those adapters of the batch that
require them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from deltaops.errors import AttachError, ConfigError, TargetError

from .by_part import attached_to, parts_by_sample

BASE = "__base__"
"""PEFT's name for no adapter."""

_KINDS = ("LoraLayer", "AuxiliaryTrainingWrapper")


@contextmanager
def adapters_by_sample(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """While it is open, sample i of each batch runs with the adapter ``names[i]``.

    In evaluation it does what PEFT's argument ``adapter_names`` does; in training, too, and the
    forward pass alone needs it. Layers that ``deltaops.accelerate`` swapped run a batch in one op.
    PEFT has the active adapter alone require gradients, and others after its
    ``model.set_requires_grad(names)``.

    Args:
        model: a PEFT model, one with injected LoRA layers, or one of ``deltaops.attach``, whose
            parts that are on are all LoRA on linear layers.
        names: the adapter of each sample, "__base__" for none; as many as the batch has samples.
    Raises: TargetError when the model has no LoRA layer of PEFT; ConfigError for names that are no
        list of its adapters; AttachError under gradient checkpointing in training, whose second
        forward pass would come when this has closed; and, in a layer, PEFT's ValueError for
        another number of samples, merged adapters or DoRA. Of an attached model: AttachError for
        parts that go by no sample or are off, and, in a layer, ConfigError for another number of
        samples.
    """
    handle = attached_to(model)
    if handle is not None:
        check_names(names, set(handle.parts), "parts")
        check_checkpointing(model)
        with parts_by_sample(handle, names):
            yield
        return
    tell = partial(_adapter_names_pre_forward_hook, adapter_names=_checked(model, names))
    handles: list[Any] = []
    try:
        for module in model.modules():
            if _is_peft(module):
                handles.append(module.register_forward_pre_hook(tell, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adapter_names_pre_forward_hook(
    _module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[Any, dict[str, Any]]:
    # as PEFT calls its own: layers that share an input know by the name that x stays as it is
    return args, {**kwargs, "adapter_names": adapter_names}


def _checked(model: nn.Module, names: Sequence[str]) -> list[str]:
    layers: list[Any] = [m for m in model.modules() if _is_peft(m, "LoraLayer")]
    if not layers:
        raise TargetError(
            "adapters_by_sample: the model has no LoRA layer of PEFT, and none of deltaops.attach. "
            "Call peft.get_peft_model(model, LoraConfig(...)) or deltaops.attach first."
        )
    known = {name for layer in layers for name in (*layer.lora_A, *layer.lora_embedding_A)}
    check_names(names, known, "adapters")
    check_checkpointing(model)
    return list(names)


def check_names(names: Sequence[str], known: set[str], what: str) -> None:
    """Raises: ConfigError unless ``names`` is a list of ``known`` ones and :data:`BASE`."""
    if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            "adapters_by_sample: names must be a list of strings, one for each sample of the "
            f"batch, got {names!r}."
        )
    unknown = sorted(set(names) - known - {BASE})
    if unknown:
        raise ConfigError(
            f"adapters_by_sample: the model has the {what} {', '.join(sorted(known))} and no "
            f"{', '.join(unknown)}. Check the spelling, or load the adapter first."
        )


def check_checkpointing(model: nn.Module) -> None:
    """Raises: AttachError where the layers would run again behind the context."""
    if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise AttachError(
            "adapters_by_sample: gradient checkpointing runs the layers again in the backward "
            "pass, without the names. Call model.gradient_checkpointing_disable() first."
        )


def _is_peft(module: nn.Module, *kinds: str) -> bool:
    """Whether PEFT tells ``module`` of adapters; told by name, so that peft is not imported."""
    return any(
        kind.__name__ in (kinds or _KINDS) and kind.__module__.startswith("peft.")
        for kind in type(module).__mro__
    )
