"""``deltaops.attach``: plan and apply in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from deltaops.methods import Combined, Delta, as_delta
from deltaops.packing import Policy

from .blocks import swap_blocks
from .handle import Handle
from .losses import swap_losses
from .plan import Generators, plan


def attach(
    model: nn.Module,
    delta: Delta | Combined | Sequence[Delta | Combined] | Mapping[str, Delta] | str,
    *,
    name: str = "default",
    backend: str = "auto",
    strict: bool = False,
    frozen: bool = True,
    pack: Policy = "auto",
    loss: bool | None = None,
    blocks: bool = True,
    generator: Generators | None = None,
) -> Handle:
    """Freeze ``model`` and bind ``delta`` to it; only that and its ``modules_to_save`` train.

    Args:
        model: any torch model with ``nn.Linear`` or GPT-2's ``Conv1D`` layers; changed in place.
        delta: such as ``deltaops.LoRA(r=16, alpha=32)``; several joined by ``+`` or in a list, a
            mapping from places to deltas, or a preset such as "MAM": see
            :func:`deltaops.methods.as_delta`.
        name: of the adapter; its parameters are ``<module>.lora_A.<name>.weight``. Parts of a
            combination have their own, and this names its folder.
        backend: for every place: "auto", or a name of ``deltaops.backends()``.
        strict: raise where "auto" would end in eager torch.
        frozen: run the other linear layers (such as ``lm_head``) by the same op as well.
        pack: on a CPU, keep copies of frozen weights in the order in which the core reads them, one
            for the forward pass and one for the backward pass: "auto" while memory allows (see
            ``report``), "always", or "never".
        loss: where a model of transformers has transformers' own loss of a language model, compute
            the same number by :func:`deltaops.ops.cross_entropy`. None does so where it can, True
            also says in the report why not elsewhere, False leaves the loss as it is.
        blocks: run transformers' RMSNorm, gated MLPs and rotary embeddings by
            :func:`deltaops.ops.norm_bias`, :func:`deltaops.ops.gated` and
            :func:`deltaops.ops.rotary`, in models that have Llama's under any name, and what its
            implementation "sdpa" computes by :func:`deltaops.ops.attention`.
        generator: draws the start values, or one for each part of a combination by its name, which
            then starts as it would alone; torch's global CPU generator without one.
    Returns: a :class:`Handle`; ``print`` it, ``revert()``, ``merge()``, ``save(path)``.
    Raises: TargetError, AttachError, ConfigError, NoBackendError; the model is as it was then.
    """
    wish = as_delta(delta)
    made = plan(model, wish, name=name, backend=backend, strict=strict, frozen=frozen, pack=pack)
    handle = made.apply(generator=generator)
    try:
        if loss is not False:
            swap_losses(model, backend, strict, tell=bool(loss))
        if blocks:
            swap_blocks(model, backend, strict)
    except BaseException:  # also KeyboardInterrupt and out of memory: undo, then raise it
        handle.revert()
        raise
    return handle
