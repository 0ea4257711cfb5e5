"""A language model that computes its loss inside ``forward``, as BERT and T5 do, on the fused op.

Nothing can be set on such a model: its ``forward`` calls ``torch.nn.CrossEntropyLoss`` on what its
head returned. So that call is answered instead, and only there: from the moment when the head
returns until ``forward`` does, a ``TorchFunctionMode`` sees the few functions of torch that are
called. Before, where hundreds are, none is active.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deltaops.backends import CrossEntropyCall
from deltaops.dispatch import LAST_RESORT, select
from deltaops.ops import cross_entropy

from .block import Block, plain, subclass

_LABELS = "labels"


class OwnLossModel(Block):
    """Mixin of a model of transformers with a head over a vocabulary and a loss of its own."""

    kind = "loss"
    met: bool
    """Whether the last forward with labels had a loss for the op."""

    @classmethod
    def over(cls, base: type[nn.Module], backend: str, strict: bool) -> type[Block]:
        """See :class:`Block`.

        The class keeps name, module and signature of ``base``: ``save_pretrained`` writes the first
        two, and a Trainer hands over only what the third names.
        """
        made = subclass(cls, base, forward=_forward_of(base), __module__=base.__module__)
        made.__name__, made.__qualname__ = base.__name__, base.__qualname__
        return made

    def call(self, tokens: int) -> CrossEntropyCall:
        """See :class:`Block`."""
        weight: Any = self._head().weight
        return CrossEntropyCall(weight.device.type, weight.dtype, tokens, weight.shape[0])

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of before, its loss from :func:`deltaops.ops.cross_entropy`."""
        head: Any = self._head()
        answered = AnsweredLoss(head.weight.shape[0], self.backend, self.strict)
        with _after(head, answered):
            out = self.base_class.forward(self, *args, **kwargs)
        self.__dict__["met"] = answered.met
        return out

    def told(self, tokens: int) -> tuple[str, str]:
        """See :class:`Block`."""
        if not self.__dict__.get("met", True):
            return "torch", "its forward computes no loss for the op from what its head returns"
        return super().told(tokens)

    def _head(self) -> nn.Module:
        head: nn.Module = self.get_output_embeddings()  # type: ignore[operator]  # transformers' method
        return head


class AnsweredLoss(TorchFunctionMode):
    """While it is active, ``F.cross_entropy`` of a vocabulary's logits comes from the fused op.

    Args:
        vocabulary: V of the logits that are meant; others stay torch's.
        backend: see :func:`deltaops.ops.cross_entropy`.
        strict: see :func:`deltaops.ops.cross_entropy`.
    """

    met: bool
    """Whether there was a call for the op."""

    def __init__(self, vocabulary: int, backend: str, strict: bool) -> None:
        super().__init__()
        self.vocabulary, self.backend, self.strict = vocabulary, backend, strict
        self.met = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Torch's protocol; ``func`` itself for everything else."""
        kwargs = kwargs or {}
        if func is nn.functional.cross_entropy:
            fused = self._fused(*args, **kwargs)
            if fused is not None:
                return fused
        return func(*args, **kwargs)

    def _fused(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor | None:
        """The loss in the dtype that torch gives it; None where the call is none of the op's."""
        if (
            not plain(logits, target)
            or logits.dim() != 2
            or logits.shape[1] != self.vocabulary
            or target.shape != logits.shape[:1]
            or target.dtype != torch.int64
            or target.device != logits.device
            or (weight, size_average, reduce) != (None, None, None)
            or reduction not in ("mean", "sum")
            or label_smoothing
        ):
            return None
        self.met = True
        chosen = select(CrossEntropyCall.of(logits), self.backend, self.strict).name
        if chosen == LAST_RESORT != self.backend:
            return None  # torch's own loss is faster than the reference
        loss = cross_entropy(
            logits,
            target,
            ignore_index=ignore_index,
            reduction=reduction,
            backend=self.backend,
            strict=self.strict,
        )
        wide = torch.is_autocast_enabled(logits.device.type)  # torch's own is float32 then
        return loss if wide else loss.to(logits.dtype)


def computes_own_loss(model: Any) -> bool:
    """Whether ``forward`` takes labels and calls ``CrossEntropyLoss`` on what a head returned."""
    forward = inspect.unwrap(type(model).forward)
    names: tuple[str, ...] = getattr(getattr(forward, "__code__", None), "co_names", ())
    return (
        _LABELS in inspect.signature(forward).parameters
        and "forward" not in vars(model)
        and (
            "CrossEntropyLoss" in names
            or any(isinstance(m, nn.CrossEntropyLoss) for m in model.children())
        )
        and getattr(model.get_output_embeddings(), "weight", None) is not None
    )


def _forward_of(base: type[nn.Module]) -> Callable[..., Any]:
    """``base.forward`` to look at; it runs as before where there are no labels."""
    theirs: Callable[..., Any] = base.forward
    place = list(inspect.signature(theirs).parameters).index(_LABELS) - 1  # less ``self``

    @functools.wraps(theirs)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = args[place] if len(args) > place else kwargs.get(_LABELS)
        # accelerate may have put this function on an instance, where it outlives the class
        ours = labels is not None and isinstance(self, OwnLossModel)
        if not ours or torch.compiler.is_compiling():  # a compiler fuses the loss as well
            return theirs(self, *args, **kwargs)
        return self.run(*args, **kwargs)

    return forward


@contextmanager
def _after(head: nn.Module, mode: TorchFunctionMode) -> Iterator[None]:
    """Have ``mode`` active from when ``head`` first returns to this thread, to the block's end."""
    thread, entered = threading.get_ident(), False

    def enter(*_: Any) -> None:
        nonlocal entered
        if not entered and threading.get_ident() == thread:
            mode.__enter__()  # type: ignore[no-untyped-call]  # torch's has no types
            entered = True

    hook = head.register_forward_hook(enter)
    try:
        yield
    finally:
        hook.remove()
        if entered:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch's has no types
