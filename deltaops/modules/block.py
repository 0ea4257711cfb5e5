"""Modules of transformers between the linear layers that run as one op.

RMSNorm, the gated MLP, and the GELU of a plain one.

Surgery swaps ``__class__`` for a subclass of the module's own, so parameters, names, hooks and
``isinstance`` stay what they were. What no fused backend takes, and what is compiled (the compiler
fuses it as well), runs as it did.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltaops.backends import Call, GatedCall, NormBiasCall
from deltaops.dispatch import LAST_RESORT, explain_call, select
from deltaops.ops import gated, norm_bias
from deltaops.ops.paths import PLAIN

from .reading import READERS, reading
from .replicas import refuse_replicas
from .sharing import sharing

SMALL = 1 << 16
"""Elements below which an activation alone stays torch's: an autograd.Function costs more."""

_ACTIVATIONS = {
    (nn.ReLU.__module__, "ReLU"): "relu",
    (nn.SiLU.__module__, "SiLU"): "silu",
    ("transformers.activations", "SiLUActivation"): "silu",
    ("transformers.activations", "GELUActivation"): "gelu",
    ("transformers.activations", "GELUTanh"): "gelu_tanh",
    ("transformers.activations", "NewGELUActivation"): "gelu_tanh",
}


class Block(nn.Module):
    """Mixin of all of them."""

    _replicate_for_data_parallel = refuse_replicas

    base_class: type[nn.Module]
    """The exact type that surgery swapped, and that revert puts back."""
    mixin: type[Block]
    """Which of them this is."""
    kind: str
    """For the report."""

    backend: str
    """Passed to the op."""
    strict: bool
    """Passed to the op."""

    @classmethod
    def over(cls, base: type[nn.Module], backend: str, strict: bool) -> type[Block]:
        """This mixin over exactly ``base``; the same class each time.

        Args:
            base: the module's class of before.
            backend: of the instances; it makes a difference only to some of the mixins.
            strict: as ``backend``.
        """
        return subclass(cls, base)

    def call(self, tokens: int) -> Call:
        """What the op is asked for ``tokens`` rows in the dtype of the weights; for the report."""
        raise NotImplementedError  # a mixin of mixins: each block asks for its own op

    def told(self, tokens: int) -> tuple[str, str]:
        """What runs it for ``tokens`` rows, "torch" or a backend, and why; for the report."""
        return told(self.call(tokens), self.backend)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied and pickled by the class of before; the subclass is made where it is wanted."""
        return _blank, (self.mixin, self.base_class, self.backend, self.strict), self.__dict__


class RmsNormBlock(Block):
    """``weight · x / √(mean x² + variance_epsilon)``, as Llama has it, and BitFit's bias."""

    kind = "norm"
    weight: nn.Parameter
    variance_epsilon: float

    def call(self, tokens: int) -> NormBiasCall:
        """See :class:`Block`."""
        weight = self.weight
        return NormBiasCall(
            weight.device.type, weight.dtype, (weight.dtype,), tokens, weight.shape[0], "rms"
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., K]`` → ``[..., K]``; see :func:`deltaops.ops.norm_bias`."""
        weight, bias = self.weight, self._parameters.get("bias")
        # of two dtypes transformers' result has the wider one, the op's that of x
        fits = plain(hidden_states, weight) and weight.dtype is hidden_states.dtype
        if not fits or not takes(
            self.call(hidden_states.numel() // weight.shape[0]), self.backend, self.strict
        ):
            out: Tensor = super().forward(hidden_states)
            return out if bias is None else out + bias
        readers = self.__dict__.get(READERS)
        return norm_bias(
            hidden_states,
            weight,
            bias,
            norm="rms",
            eps=self.variance_epsilon,
            readers=None if readers is None else partial(reading, readers, hidden_states),
            backend=self.backend,
            strict=self.strict,
        )


class GatedMlpBlock(Block):
    """``down(φ(gate(x)) · up(x))``, as Llama has it; the three are modules, adapted or not."""

    kind = "gated mlp"
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def call(self, tokens: int) -> GatedCall:
        """See :class:`Block`."""
        weight: Any = self.up_proj.weight
        return self._call(weight.device.type, weight.dtype, tokens, weight.shape[0])

    def _call(self, device: str, dtype: torch.dtype, rows: int, columns: int) -> GatedCall:
        return GatedCall(device, dtype, rows, columns, activation_of(self.act_fn) or "")

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` → ``[..., K]``; see :func:`deltaops.ops.gated`."""
        if torch.compiler.is_compiling():  # which fuses it as well, and sees no state of threads
            traced: Tensor = super().forward(x)
            return traced
        with sharing(self, (self.gate_proj, self.up_proj)):
            gate, up = self.gate_proj(x), self.up_proj(x)
        activation = activation_of(self.act_fn) if plain(gate, up) else None
        rows, columns = gate.numel() // max(gate.shape[-1], 1), gate.shape[-1]
        call = self._call(gate.device.type, gate.dtype, rows, columns)
        if activation is None or not takes(call, self.backend, self.strict):
            product = self.act_fn(gate) * up
        else:
            product = gated(
                gate,
                up,
                activation,
                readers=partial(reading, (self.down_proj,), gate),
                backend=self.backend,
                strict=self.strict,
            )
        out: Tensor = self.down_proj(product)
        return out


class ActivationBlock(Block):
    """GELU, by erf or by tanh; some of transformers' are eight steps of eager torch."""

    kind = "activation"

    def told_beside(self, parent: nn.Module, tokens: int) -> tuple[str, str]:
        """As ``told``, in the dtype of the weights of the module around it: it has none itself."""
        weight = next(parent.parameters(), torch.empty(1, 1))
        columns = max(weight.shape, default=1)
        if self._stays(tokens * columns):
            return "torch", f"fewer than {SMALL} elements: an autograd.Function would cost more"
        return told(self._call(weight, tokens, columns), self.backend)

    def _stays(self, elements: int) -> bool:
        """Whether so few stay with torch; not where a backend was named, or anything fused."""
        return not elements or (elements < SMALL and self.backend == "auto" and not self.strict)

    def _call(self, like: Tensor, rows: int, columns: int) -> GatedCall:
        name = named_activation(self) or ""
        return GatedCall(like.device.type, like.dtype, rows, columns, name, alone=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` → ``[..., K]``; see :func:`deltaops.ops.gated`."""
        # of a compiler's sizes nothing is asked: each question would be a graph of its own
        if not torch.compiler.is_compiling() and plain(x) and not self._stays(x.numel()):
            call = self._call(x, x.numel() // max(x.shape[-1], 1), x.shape[-1])
            if takes(call, self.backend, self.strict):
                return gated(x, None, call.activation, backend=self.backend, strict=self.strict)
        out: Tensor = super().forward(x)
        return out


def named_activation(module: nn.Module) -> str | None:
    """The op's name for an activation module; None for another."""
    kind = module.base_class if isinstance(module, Block) else type(module)
    if kind is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get((kind.__module__, kind.__name__))


def activation_of(module: nn.Module) -> str | None:
    """As :func:`named_activation`, but None for one that has hooks: then it has to be called."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return None
    return named_activation(module)


def plain(*tensors: Tensor) -> bool:
    """Whether all are torch's own tensors."""
    return all([type(t) in PLAIN for t in tensors])


def told(call: Call, backend: str) -> tuple[str, str]:
    """What runs ``call`` in a block, "torch" or a backend, and why."""
    explanation = explain_call(call, backend)
    eager = explanation.chosen == LAST_RESORT and backend != LAST_RESORT
    return "torch" if eager else explanation.chosen or "none", explanation.reason


def takes(call: Call, backend: str, strict: bool) -> bool:
    """Whether the op is to run ``call``, and not what the module ran before.

    Raises: NoBackendError where ``strict`` or a named backend was asked for and none takes it.
    """
    if torch.compiler.is_compiling():
        return False
    return backend == LAST_RESORT or select(call, backend, strict).name != LAST_RESORT


_classes: dict[tuple[Any, ...], type[Block]] = {}


def subclass(
    mixin: type[Block], base: type[nn.Module], settings: tuple[Any, ...] = (), **attributes: Any
) -> type[Block]:
    """The class of ``mixin`` over ``base``, one for each ``settings``.

    Args:
        mixin: one of the blocks.
        base: the class that it replaces.
        settings: what ``attributes`` depend on.
        **attributes: of the class.
    """
    key = (mixin, base, *settings)
    if key not in _classes:
        attributes.update(base_class=base, mixin=mixin)
        _classes.setdefault(key, type(f"Fused{base.__name__}", (mixin, base), attributes))
    return _classes[key]


def _blank(mixin: type[Block], base: type[nn.Module], backend: str, strict: bool) -> nn.Module:
    kind = mixin.over(base, backend, strict)
    return kind.__new__(kind)
