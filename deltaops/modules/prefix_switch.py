"""Whether a whole model attends by the function that knows prefixes, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import unwrap
from typing import Any

from torch import nn

from deltaops.errors import AttachError, ConfigError

from .attention_functions import TABLE
from .prefix import NAME, register
from .prefix_encoder import Rows
from .prefix_positions import Shift

_BEFORE = "_deltaops_attention"
"""On the model: where a config is → what it said before."""


class Guard:
    """A hook before the forward pass of each model: what would leave a prefix out unseen raises."""

    active = True

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Raises: AttachError where it no longer attends by :data:`NAME`; ConfigError for weights
        of attention, which are never made."""
        if not self.active:
            return
        kind, now = type(module).__name__, module.config._attn_implementation
        if now != NAME:
            raise AttachError(
                f"prefix: {kind} must attend by {NAME!r} while it has a prefix, and its attention "
                f"implementation was set to {now!r}. Set it back, or revert the prefix first."
            )
        asked = kwargs.get("output_attentions")
        if module.config.output_attentions if asked is None else asked:
            raise ConfigError(
                f"prefix: {kind} cannot return output_attentions: the weights of attention with a "
                "prefix are never made. Ask without, or inside handle.disabled()."
            )


def switch(model: nn.Module) -> None:
    """Have ``model`` attend by :data:`NAME`; again changes nothing.

    Args:
        model: one of transformers, or a module around such.
    Raises: AttachError where its attention does not go by that table, is not what "sdpa" computes,
        or weights are asked for in its config; nothing has changed then.
    """
    if _BEFORE in model.__dict__:
        return
    models = list(_models(model))
    for part in models:
        _check(part)
    if not models:
        raise AttachError(
            f"prefix: {type(model).__name__} must be a model of transformers, whose "
            "AttentionInterface says which function attends. Use another delta on it."
        )
    register()
    before = {place: config._attn_implementation for place, config in _configs(model)}
    model.__dict__[_BEFORE] = before
    for part in models:
        part.set_attn_implementation(NAME)
    for module in model.modules():
        config: Any = module.config if hasattr(module, "set_attn_implementation") else None
        if config is not None and config._attn_implementation == NAME:
            module.register_forward_pre_hook(Guard(), with_kwargs=True)


def restore(model: nn.Module) -> None:
    """Undo :func:`switch`; nothing where that never came."""
    before = model.__dict__.pop(_BEFORE, None)
    if before is None:
        return
    for place, config in _configs(model):
        if place in before and config._attn_implementation != before[place]:
            config._attn_implementation = {"": before[place]}  # not what its parts say
    _drop(model, Guard)


def check_attention(path: str, module: Any) -> None:
    """Raises: AttachError where the attention at ``path`` does not read :data:`NAME`'s function."""
    base = getattr(type(module), "base_class", type(module))
    asks_table = TABLE in unwrap(base.forward).__code__.co_names
    if not asks_table or getattr(module.config, "_attn_implementation", None) != NAME:
        raise AttachError(
            f"prefix: {path!r} ({base.__name__}) must ask transformers' AttentionInterface which "
            "function attends, and computes its attention itself. Name it in exclude_modules."
        )


def activate_hooks(model: nn.Module, active: bool) -> None:
    """Have what moves positions and computes prefixes do so, or nothing."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, Shift | Rows):
                hook.active = active


def drop_hooks(model: nn.Module) -> None:
    """Take off what moves positions and computes prefixes."""
    _drop(model, Shift, Rows)


def _drop(model: nn.Module, *kinds: type) -> None:
    # by their keys, as torch's own handles do: a copy of a model has no handles
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, kinds):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), kinds):
                del module._forward_hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def _models(model: nn.Module) -> Iterator[Any]:
    """The outermost models of transformers."""
    if hasattr(model, "set_attn_implementation"):
        yield model
    else:
        for child in model.children():
            yield from _models(child)


def _check(model: Any) -> None:
    kind = type(model).__name__
    if not model._can_set_attn_implementation():
        raise AttachError(
            f"prefix: {kind} must ask transformers' AttentionInterface which function attends, and "
            "it computes its attention itself. Use another delta on it."
        )
    if not model._supports_sdpa:
        raise AttachError(
            f"prefix: {kind} must attend as transformers' 'sdpa' does, and it does not support "
            "that (a cap of the scores, or sinks). Use another delta on it."
        )
    if model.config.output_attentions:
        raise AttachError(
            f"prefix: {kind} has output_attentions=True in its config, and the weights of "
            "attention with a prefix are never made. Set it to False first."
        )


def _configs(model: nn.Module) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every config, each once, and where it is: a module's path, then names in configs."""
    seen: set[int] = set()
    waiting: list[tuple[tuple[str, ...], Any]] = [
        ((path,), module.config)
        for path, module in model.named_modules()
        if hasattr(module, "set_attn_implementation")
    ]
    for place, config in waiting:
        if id(config) not in seen:
            seen.add(id(config))
            yield place, config
            inner = [(name, getattr(config, name, None)) for name in config.sub_configs]
            waiting += [((*place, name), part) for name, part in inner if part is not None]
