"""The loss of a transformers model on the op ``cross_entropy``.

transformers' models compute their loss by ``self.loss_function``, a property that can be set. Where
it is transformers' own loss of a causal or masked language model, one that gives the same number
from :func:`deltaops.ops.cross_entropy` is set instead: the logits are not converted to float32, and
their log-softmax is not kept. Language models that compute their loss inside ``forward``, as BERT
and T5 do, become an :class:`~deltaops.modules.OwnLossModel`. A loss of the user's is left alone, as
the report says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from deltaops.backends import CrossEntropyCall
from deltaops.dispatch import LAST_RESORT, explain_call, select
from deltaops.modules import Block, OwnLossModel, computes_own_loss, uses_loss_function
from deltaops.ops import cross_entropy

_LEFT_ALONE = "_deltaops_loss_left_alone"
"""Attribute of a model whose loss was asked for and not taken: why not."""


# ------------------------------------------------------------ the losses, as transformers has them


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    *,
    backend: str = "auto",
    strict: bool = False,
    **unused: Any,
) -> Tensor:
    """The number that transformers' ``ForCausalLMLoss`` gives: token n is predicted from n − 1.

    Args:
        logits: ``[..., vocab_size]``.
        labels: one for each row of ``logits``, ``ignore_index`` where none counts.
        vocab_size: V.
        num_items_in_batch: what the sum is divided by; without it, the number of labels that count.
        ignore_index: marks labels that do not count.
        shift_labels: labels that are moved by one already; ``labels`` is not looked at then.
        backend: see :func:`deltaops.ops.cross_entropy`.
        strict: see :func:`deltaops.ops.cross_entropy`.
        **unused: what a model passes on and no loss needs.
    Returns: a scalar, float32 at least.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return _loss(
        logits, shift_labels, vocab_size, num_items_in_batch, ignore_index, backend, strict
    )


def masked_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    *,
    backend: str = "auto",
    strict: bool = False,
    **unused: Any,
) -> Tensor:
    """The number that transformers' ``ForMaskedLMLoss`` gives: each row against its own label.

    The arguments are those of :func:`causal_lm_loss`.
    """
    return _loss(logits, labels, vocab_size, num_items_in_batch, ignore_index, backend, strict)


def _loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None,
    ignore_index: int,
    backend: str,
    strict: bool,
) -> Tensor:
    rows, target = logits.reshape(-1, vocab_size), labels.reshape(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    if not torch.compiler.is_compiling() and (
        select(CrossEntropyCall.of(rows), backend, strict).name == LAST_RESORT
        and backend != LAST_RESORT
    ):  # no fused backend: torch's own eager loss is faster than the reference
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        loss = nn.functional.cross_entropy(
            wide, target, ignore_index=ignore_index, reduction=reduction
        )
    else:
        loss = cross_entropy(
            rows,
            target,
            ignore_index=ignore_index,
            reduction=reduction,
            backend=backend,
            strict=strict,
        )
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


# --------------------------------------------------------------------------------- to and fro


def swap_losses(model: nn.Module, backend: str, strict: bool, *, tell: bool = True) -> None:
    """Set the fused loss on every transformers model in ``model`` that has transformers' own.

    Args:
        tell: let the report say why a loss was left alone.

    Calling it again changes the settings and nothing more.
    """
    found = False
    for module in _language_models(model):
        found = True
        if _counts_itself(module):
            module.__dict__.update(backend=backend, strict=strict)
            base = module.base_class if isinstance(module, Block) else type(module)
            module.__class__ = OwnLossModel.over(base, backend, strict)
            continue
        current = vars(module).get("_loss_function")
        ours: Callable[..., Tensor] | None = current.func if _is_ours(current) else None
        reason = None if ours else _why_not(module)
        module.__dict__.pop(_LEFT_ALONE, None)
        if reason is not None:
            if tell:
                module.__dict__[_LEFT_ALONE] = reason
            continue
        # a partial of a module's function, not a closure: models are copied and pickled
        loss = ours or _fused(module.loss_function)
        assert loss is not None
        module.__dict__["_loss_function"] = partial(loss, backend=backend, strict=strict)
    if tell and not found:
        model.__dict__[_LEFT_ALONE] = "it holds no model of transformers"


def restore_losses(model: nn.Module) -> None:
    """Undo :func:`swap_losses`; what it did not touch stays."""
    for module in model.modules():
        module.__dict__.pop(_LEFT_ALONE, None)
        if isinstance(module, OwnLossModel):
            module.__class__ = module.base_class  # type: ignore[assignment]  # its class of before
            for name in ("backend", "strict", "met"):
                module.__dict__.pop(name, None)
            continue
        current = vars(module).get("_loss_function")
        if _is_ours(current):
            del module._loss_function
            (theirs,) = (theirs for theirs, ours in _pairs() if ours is current.func)
            if module.loss_function is not theirs:  # it had been set, not derived from the class
                module._loss_function = theirs


def loss_rows(model: nn.Module, tokens: int) -> Iterator[tuple[str, str, str, str]]:
    """A report's rows of losses: path, kind, what runs it, why."""
    for path, module in model.named_modules():
        name = f"{path}.loss_function" if path else "loss_function"
        current = vars(module).get("_loss_function")
        if _is_ours(current):
            call, settings = _typical_call(module, tokens), current.keywords
            told = explain_call(call, settings["backend"])
            eager = told.chosen == LAST_RESORT and settings["backend"] != LAST_RESORT
            yield name, "loss", "torch" if eager else told.chosen or "none", told.reason
        elif isinstance(module, OwnLossModel):
            yield name, module.kind, *module.told(tokens)
        elif _LEFT_ALONE in vars(module):
            yield name, "left alone", "torch", vars(module)[_LEFT_ALONE]


def _language_models(model: nn.Module) -> Iterator[Any]:
    """The transformers models inside: the outermost ones, and whatever uses a loss function."""
    loaded = sys.modules.get("transformers.modeling_utils")
    if loaded is None:  # then nothing can be a model of it
        return
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, loaded.PreTrainedModel):
            if id(module) not in inside or uses_loss_function(type(module)):
                yield module
            inside.update(id(m) for m in module.modules())


def _counts_itself(module: Any) -> bool:
    """Whether it is, or can become, an :class:`~deltaops.modules.OwnLossModel`."""
    if isinstance(module, OwnLossModel):
        return True
    return not uses_loss_function(type(module)) and computes_own_loss(module)


def _why_not(module: Any) -> str | None:
    """Why this model's loss is left alone; None where it is one that we have."""
    if not uses_loss_function(type(module)):
        if "forward" in vars(module):
            return "its forward was replaced on the instance"
        return f"{type(module).__name__}.forward computes its loss itself, if any, behind no head"
    loss = module.loss_function
    if _fused(loss) is None:
        name = getattr(loss, "__qualname__", type(loss).__name__)
        return f"its loss is {name}, not transformers' own of a language model"
    return None


def _pairs() -> list[tuple[Any, Callable[..., Tensor]]]:
    """(transformers' loss, ours)."""
    from transformers.loss import loss_utils  # loaded with the model

    return [
        (loss_utils.ForCausalLMLoss, causal_lm_loss),
        (loss_utils.ForMaskedLMLoss, masked_lm_loss),
    ]


def _fused(loss: Any) -> Callable[..., Tensor] | None:
    """Ours for theirs, None where there is none."""
    return next((ours for theirs, ours in _pairs() if theirs is loss), None)


def _is_ours(loss: Any) -> TypeGuard[partial[Tensor]]:
    return isinstance(loss, partial) and loss.func in (causal_lm_loss, masked_lm_loss)


def _typical_call(module: Any, tokens: int) -> CrossEntropyCall:
    """The call that the report asks about: logits as the head gives them."""
    head = module.get_output_embeddings()
    weight = next(module.parameters()) if head is None else head.weight
    vocabulary = module.config.get_text_config().vocab_size
    return CrossEntropyCall(weight.device.type, weight.dtype, tokens, vocabulary)
