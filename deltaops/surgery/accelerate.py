"""``deltaops.accelerate``: a model that PEFT built or loaded, its LoRA layers in one op each.

Only ``__class__`` changes. Parameters, names, hooks and PEFT's own methods (``save_pretrained``,
``merge_and_unload``, ``set_adapter``, ``disable_adapter``, …) stay what they were.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from deltaops.errors import AttachError, TargetError
from deltaops.modules import DeltaPlace, LinearPlace, become, frozen_class, unbecome
from deltaops.packing import Policy, check_policy

from .blocks import restore_blocks, swap_blocks
from .losses import restore_losses, swap_losses
from .places import frozen_linears
from .plan import check_backend
from .report import Report, is_accelerated, is_quantized, report, why_not_parameter


def accelerate(
    model: nn.Module,
    *,
    frozen: bool = True,
    revert: bool = False,
    backend: str = "auto",
    strict: bool = False,
    pack: Policy = "auto",
    loss: bool | None = None,
    blocks: bool = True,
) -> Report:
    """Swap the LoRA layers of a PEFT model for fused ones; calling it again changes nothing more.

    A layer that the op can never run (DoRA and other variants, bases quantised to fp4, …) is left
    alone; what bitsandbytes quantised to NF4 or int8 is read by its codes. A state that may pass is
    looked at on every call, and PEFT's own forward runs meanwhile: adapters disabled or merged,
    hooks or offloading on an inner layer, a base weight that was unfrozen. The report says so for
    each layer. A batch that mixes adapters (``adapter_names``) stays in the op, but for quantised
    bases; see :func:`deltaops.adapters_by_sample` for one in training.

    Args:
        model: a ``PeftModel``, or a model with injected LoRA layers; changed in place.
        frozen: run linear layers with a frozen weight and no adapter (such as ``lm_head``) by the
            same op as well.
        revert: undo an earlier call instead.
        backend: for every layer: "auto", or a name of ``deltaops.backends()``.
        strict: raise where "auto" would end in eager torch.
        pack: see :func:`deltaops.attach`.
        loss: see :func:`deltaops.attach`.
        blocks: see :func:`deltaops.attach`.
    Returns: a :class:`Report`; its ``revert()`` undoes the call.
    Raises: TargetError when the model has no LoRA layer of PEFT; AttachError when it has a delta of
        ``deltaops.attach``; NoBackendError for an unknown backend; ConfigError for an unknown
        ``pack``.
    """
    if revert:
        unaccelerate(model)
        return report(model)
    check_backend(backend)
    check_policy(pack)
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, DeltaPlace):
            raise AttachError(
                f"accelerate: {path!r} has a delta of deltaops.attach, which is fused already. "
                "Call handle.revert() first if PEFT is to own the adapters."
            )
    tuned = {p: m for p, m in modules.items() if _is_peft_lora(m)}
    if not tuned:
        raise TargetError(
            "accelerate: the model has no LoRA layer of PEFT. Call peft.get_peft_model(model, "
            "LoraConfig(...)) first, or deltaops.attach(model, deltaops.LoRA(...)) without PEFT."
        )
    # peft is loaded: the model holds its layers
    from deltaops.modules.peft_linear import PeftLoraLinear, is_base

    for module in tuned.values():
        swapped = type(module) is PeftLoraLinear
        if swapped or (
            type(module) is PeftLoraLinear.base_class
            and not module.lora_variant
            and is_base(type(module.base_layer))
        ):
            module.__dict__["backend"] = backend
            module.__dict__["strict"] = strict
            module.__dict__["pack"] = pack
            module.__class__ = PeftLoraLinear
    _swap_quantized(tuned.values(), backend, strict)
    _swap_experts(tuned.values(), backend, strict, pack)
    if frozen:
        inside = {id(m) for wrapper in tuned.values() for m in wrapper.modules()}
        for path in frozen_linears(modules):
            module = modules[path]
            place = frozen_class(type(module))
            if id(module) not in inside and place is not None and not module.weight.requires_grad:
                become(module, place, backend, strict, pack)
        for module in modules.values():  # those of an earlier call
            if isinstance(module, LinearPlace):
                module.backend, module.strict, module.pack = backend, strict, pack
    if loss is not False:
        swap_losses(model, backend, strict, tell=bool(loss))
    if blocks:
        swap_blocks(model, backend, strict)
    return report(model)


def _swap_quantized(tuned: Iterable[nn.Module], backend: str, strict: bool) -> None:
    """Let the op read what bitsandbytes quantised."""
    found = [m for m in tuned if is_quantized(m)]
    if not found:
        return
    # bitsandbytes is loaded: the model holds its layers
    from deltaops.modules.peft_quantized import CLASSES, never

    for module in found:
        kind = CLASSES.get(type(module), type(module))
        # a variant or codes of another kind never fit
        if is_accelerated(module) or not (module.lora_variant or never(module.base_layer)):
            module.__dict__["backend"] = backend
            module.__dict__["strict"] = strict
            module.__class__ = kind


def _swap_experts(tuned: Iterable[nn.Module], backend: str, strict: bool, pack: Policy) -> None:
    """Let the outermost wrapper of each mixture's parameters compute for all of them."""
    # peft is loaded: the model holds its layers
    from deltaops.modules.peft_experts import PeftExperts

    wrappers = [m for m in tuned if type(m) in (PeftExperts.base_class, PeftExperts)]
    nested = {id(m.base_layer) for m in wrappers}
    for module in wrappers:
        if id(module) not in nested and why_not_parameter(module) is None:
            module.__dict__["backend"] = backend
            module.__dict__["strict"] = strict
            module.__dict__["pack"] = pack
            module.__class__ = PeftExperts


def unaccelerate(model: nn.Module) -> None:
    """Undo :func:`accelerate`; what it did not touch stays."""
    restore_losses(model)
    restore_blocks(model)
    for module in model.modules():
        if is_accelerated(module):
            module.__class__ = module.base_class  # type: ignore[assignment]  # a class attribute
            for name in ("backend", "strict", "pack"):
                module.__dict__.pop(name, None)
        elif isinstance(module, LinearPlace) and not isinstance(module, DeltaPlace):
            unbecome(module)


def _is_peft_lora(module: nn.Module) -> bool:
    """Any LoRA layer of PEFT; told by name, so that peft is not imported."""
    return is_accelerated(module) or any(
        kind.__name__ == "LoraLayer" and kind.__module__ == "peft.tuners.lora.layer"
        for kind in type(module).__mro__
    )
