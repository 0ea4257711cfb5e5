"""The registered twin of an op: what compilers, transforms, modes and tensor subclasses see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deltaops.errors import GradientError

_library = torch.library.Library("deltaops", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch's own has no types


def register(
    forward_schema: str,
    backward_schema: str,
    *,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    fake_forward: Callable[..., Any],
    fake_backward: Callable[..., Any],
    setup_context: Callable[..., None],
    autograd: Callable[..., Any],
    instead: str,
) -> None:
    """Register ``deltaops::<name>`` and ``deltaops::<name>_backward``, differentiable once.

    Args:
        forward_schema: ``name(…) -> …``. No defaults: the dispatcher drops trailing ones, and
            needs_input_grad gets shorter.
        backward_schema: ``name_backward(…) -> …``.
        forward: on real tensors.
        backward: on real tensors.
        fake_forward: shapes, strides and dtypes of what ``forward`` gives.
        fake_backward: those of what ``backward`` gives.
        setup_context: saves what ``autograd`` wants.
        autograd: the gradients of all inputs, by the backward op.
        instead: a sentence for who differentiates twice: what to do.
    """
    name = forward_schema.partition("(")[0]

    def no_second_order(ctx: Any, *_grads: Any) -> tuple[Any, ...]:
        raise GradientError(
            f"{name}: gradients are of first order only; a second backward pass went through "
            f"them. {instead}"
        )

    for schema, kernel, fake in (
        (forward_schema, forward, fake_forward),
        (backward_schema, backward, fake_backward),
    ):
        op = schema.partition("(")[0]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]  # torch's own has no types
        _library.impl(op, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]  # torch's own has no types
        torch.library.register_fake(f"deltaops::{op}", fake, lib=_library)
    torch.library.register_autograd(
        f"deltaops::{name}", autograd, setup_context=setup_context, lib=_library
    )
    torch.library.register_autograd(f"deltaops::{name}_backward", no_second_order, lib=_library)


def register_constant(schema: str, *, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register ``deltaops::<name>``, whose results have no gradient.

    Args:
        schema: ``name(…) -> …``; no defaults.
        run: on real tensors.
        fake: shapes, strides and dtypes of what ``run`` gives.
    """
    op = schema.partition("(")[0]

    def constant(*arguments: Any) -> Any:
        with torch.no_grad():
            return run(*arguments)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]  # torch's own has no types
    _library.impl(op, constant, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]  # torch's own has no types
    torch.library.register_fake(f"deltaops::{op}", fake, lib=_library)
    # nothing is recorded, whatever requires a gradient
    _library.impl(op, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]  # torch's own has no types
