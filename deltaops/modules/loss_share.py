"""What part of a step's loss the loss of one micro-batch is, where gradients are accumulated.

A Trainer that accumulates tells the model, as ``num_items_in_batch``, how many labels all
micro-batches of the step have, so that it divides a sum by them instead of taking a mean. Only the
losses of language models take notice of it; others take their mean all the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

CAUSAL = ("ForCausalLMLoss", "causal_lm_loss")
"""Names of transformers' loss and of ours in its place, which predict each label but the first."""
MASKED = ("ForMaskedLMLoss", "masked_lm_loss")
"""Those that predict all of them."""


def loss_share(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | float:
    """By what the mean of a micro-batch is multiplied in the loss that ``model`` returns for it.

    Args:
        model: whole.
        inputs: what it was called with, by name.
    Returns: 1 where it takes the mean; a model that is none of transformers is taken to divide by
        ``num_items_in_batch`` where it is given that.
    """
    labels, items = inputs.get("labels"), inputs.get("num_items_in_batch")
    if items is None or not isinstance(labels, Tensor):
        return 1.0
    loss: Any = getattr(model, "loss_function", None)
    if loss is not None:
        name = getattr(getattr(loss, "func", loss), "__name__", "")
        if name not in (*CAUSAL, *MASKED) or not uses_loss_function(type(model)):
            return 1.0
        moved = inputs.get("shift_labels")
        if moved is not None:
            labels = moved
        elif name in CAUSAL:
            labels = labels[..., 1:]
    share: Tensor = labels.ne(-100).sum() / items
    return share


def uses_loss_function(kind: type) -> bool:
    """Whether ``forward`` goes through ``self.loss_function``, itself or by ``super().forward``."""
    for base in kind.__mro__:
        if "forward" in vars(base):
            code = getattr(inspect.unwrap(vars(base)["forward"]), "__code__", None)
            names = () if code is None else code.co_names
            if "loss_function" in names:
                return True
            if "super" not in names:
                return False
    return False
