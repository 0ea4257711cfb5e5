"""Whether a whole model attends by the function that knows prefixes, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import unwrap
from typing import Any
from weakref import WeakSet, WeakValueDictionary

from torch import nn

from deltaops.errors import AttachError, ConfigError

from .attention_functions import SDPA, TABLE
from .prefix import NAME, register
from .prefix_encoder import PrefixEncoder
from .prefix_positions import Shift
from .rows import Rows

_SHARES = "_deltaops_attention"
"""On a model that attends by :data:`NAME`: its shares of what its configs said before."""


class _Before:
    """What a config said before. Models may have one config object; the last puts it back."""

    def __init__(self, config: Any) -> None:
        now = config._attn_implementation
        # a config that was copied off a model with a prefix: NAME computes what "sdpa" does
        self.__setstate__({"config": config, "said": SDPA if now == NAME else now})

    def __getstate__(self) -> dict[str, Any]:
        """Without the shares: a model that is copied or pickled has a config of its own."""
        return {"config": self.config, "said": self.said}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.config: Any = state["config"]
        self.said: str = state["said"]
        self.shares: WeakSet[_Share] = WeakSet()
        _known[id(self.config)] = self


class _Share:
    """A model's; one that is gone has none, and a copy has its own."""

    def __init__(self, before: _Before) -> None:
        self.__setstate__({"before": before})

    def __getstate__(self) -> dict[str, Any]:
        return {"before": self.before}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.before: _Before = state["before"]
        self.before.shares.add(self)

    def give_up(self) -> None:
        self.before.shares.discard(self)
        config, said = self.before.config, self.before.said
        if not self.before.shares and config._attn_implementation != said:
            config._attn_implementation = {"": said}  # not what its parts say


_known: WeakValueDictionary[int, _Before] = WeakValueDictionary()
"""By the address of their config, which they keep alive."""


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
    if _SHARES in model.__dict__:
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
    model.__dict__[_SHARES] = [
        _Share(_known.get(id(config)) or _Before(config)) for config in _configs(model)
    ]
    for part in models:
        part.set_attn_implementation(NAME)
    for module in model.modules():
        config: Any = module.config if hasattr(module, "set_attn_implementation") else None
        if config is not None and config._attn_implementation == NAME:
            module.register_forward_pre_hook(Guard(), with_kwargs=True)


def restore(model: nn.Module) -> None:
    """Undo :func:`switch`; nothing where that never came.

    A config that another model with a prefix has as well stays as it is until that is restored.
    """
    shares = model.__dict__.pop(_SHARES, None)
    if shares is None:
        return
    for share in shares:
        share.give_up()
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


def activate_hooks(model: nn.Module, active: bool, source: type[nn.Module]) -> None:
    """Have what computes rows by a ``source`` do so, or nothing; a prefix moves positions, too."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, Shift):
                if source is PrefixEncoder:
                    hook.active = active
            elif isinstance(hook, Rows) and isinstance(hook.source, source):
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


def _configs(model: nn.Module) -> Iterator[Any]:
    """Every config of ``model`` and every part of one, each once."""
    seen: set[int] = set()
    waiting: list[Any] = [
        module.config for module in model.modules() if hasattr(module, "set_attn_implementation")
    ]
    for config in waiting:
        if id(config) not in seen:
            seen.add(id(config))
            yield config
            inner = [getattr(config, name, None) for name in config.sub_configs]
            waiting += [part for part in inner if part is not None]
