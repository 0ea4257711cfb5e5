"""The experts of a mixture as a place for LoRA.      y_t = Σⱼ p_tj · E_{i_tj}(x_t)

    E_e(x) = D_e(φ(g) · u),    [g u] = G_e(x)
    G_e(x) = x W_eᵀ + Σᵢ sᵢ · dropᵢ(x) A_eᵢᵀ B_eᵢᵀ,    D_e alike

Transformers keeps the weights of all experts in two parameters, ``gate_up_proj`` [E, 2I, H] and
``down_proj`` [E, H, I]. One sort brings the tokens of each expert together, and each of its two
layers is one call of the op; no weight and no delta of a weight is copied. A [E, R, K] and
B [E, N, R] are trained, beside each parameter that has the delta. The op runs for experts that have
tokens; the others' gradients are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from deltaops.backends import GatedCall
from deltaops.errors import ShapeError
from deltaops.ops import Branch, delta_linear, gated
from deltaops.packing import PACKING, Policy

from .block import activation_of, plain, takes
from .draws import draws_on
from .place import UNFROZEN, LoraSettings, plain_linear
from .replicas import refuse_replicas
from .switched import Switched

GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""The two parameters, by transformers' names."""


class StackedBranch(NamedTuple):
    """A branch beside the same layer of every expert."""

    a: Tensor
    """``[E, R, K]``."""
    b: Tensor
    """``[E, N, R]``, dtype of ``a``."""
    scaling: float
    dropout: float


class Way(NamedTuple):
    """How the experts call the op; see :func:`deltaops.ops.delta_linear` and ``attach``."""

    backend: str
    strict: bool
    pack: Policy


def run_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: tuple[Tensor, Sequence[StackedBranch]],
    down: tuple[Tensor, Sequence[StackedBranch]],
    act: nn.Module,
    way: Way,
) -> Tensor:
    """What the experts make of ``x``; under torch.compile outside of its graphs.

    Args:
        x: ``[T, H]``.
        index: the experts of each token, ``[T, J]``, from 0 to E − 1.
        weights: of those, ``[T, J]``.
        gate_up: ``[E, 2I, H]`` and its branches.
        down: ``[E, H, I]`` and its branches.
        act: φ.
        way: how.
    Returns: ``[T, H]`` in the dtype of ``x``.
    Raises: ShapeError.
    """
    # how many tokens an expert has is known only when it runs
    run = _uncompiled if torch.compiler.is_compiling() else _run
    return run(x, index, weights, gate_up, down, act, way)


def _run(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: tuple[Tensor, Sequence[StackedBranch]],
    down: tuple[Tensor, Sequence[StackedBranch]],
    act: nn.Module,
    way: Way,
) -> Tensor:
    _check_sizes(x, index, weights, gate_up[0], down[0])
    chosen = index.shape[1]
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    sizes = torch.bincount(flat, minlength=len(gate_up[0])).tolist()
    if len(sizes) > len(gate_up[0]):
        raise ShapeError(
            f"experts: index must be from 0 to {len(gate_up[0]) - 1}, got {len(sizes) - 1}. Pass "
            "what the router of this mixture chose."
        )
    # without any token one expert runs on none, so that A and B still have a part in y
    used = [e for e, size in enumerate(sizes) if size] or [0]
    rows = Moved.apply(x, order.div(chosen, rounding_mode="floor"), back, chosen)  # type: ignore[no-untyped-call]  # torch's Function.apply has no types
    first, second = _layers(*gate_up, way), _layers(*down, way)
    found = [
        second(e, _activated(first(e, part), act, way))
        for e, part in zip(used, rows.split([sizes[e] for e in used]), strict=True)
    ]
    y = Moved.apply(torch.cat(found), back, order, 1)  # type: ignore[no-untyped-call]  # torch's Function.apply has no types
    y = y.view(*index.shape, y.shape[-1]) * weights.unsqueeze(-1)
    total: Tensor = y.sum(dim=1).to(x.dtype)
    return total


def _check_sizes(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> None:
    if gate_up.dim() != 3 or gate_up.shape[1] % 2:
        raise ShapeError(f"experts: gate_up must be [E, 2·I, H], got {list(gate_up.shape)}.")
    experts, inner, hidden = len(gate_up), gate_up.shape[1] // 2, gate_up.shape[2]
    if down.shape != (experts, hidden, inner):
        raise ShapeError(
            f"experts: down must be {[experts, hidden, inner]}, got {list(down.shape)}. Pass both "
            "parameters of one mixture."
        )
    if x.dim() != 2 or x.shape[1] != hidden:
        raise ShapeError(
            f"experts: x must be [T, {hidden}], got {list(x.shape)}. Flatten batch and positions."
        )
    if index.dim() != 2 or len(index) != len(x):
        raise ShapeError(
            f"experts: index must be [{len(x)}, J], got {list(index.shape)}. Pass J experts for "
            "each token."
        )
    if weights.shape != index.shape:
        raise ShapeError(
            f"experts: weights must be {list(index.shape)}, got {list(weights.shape)}. Pass one "
            "for each expert in index."
        )


_uncompiled = _disable_dynamo(_run)
"""As ``torch.compiler.disable`` has it, which would load the compiler already here."""


class Moved(torch.autograd.Function):
    """Rows of a matrix in another order, each as often as asked; gradients add up in one order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, times: int) -> Tensor:
        """``x[there]``; ``back`` says where the ``times`` copies of each row went, row by row."""
        ctx.save_for_backward(back)
        ctx.times = times
        return x.index_select(0, there)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of ``x``: the sum over its copies."""
        (back,) = ctx.saved_tensors
        found = grad.index_select(0, back)
        if ctx.times > 1:
            found = found.view(-1, ctx.times, grad.shape[-1]).sum(dim=1)
        return found, None, None, None


def _layers(
    weight: Tensor, stacks: Sequence[StackedBranch], way: Way
) -> Callable[[int, Tensor], Tensor]:
    """The same layer of every expert, as a function of the expert and its input."""
    weights = weight.unbind()
    # unbind, not one index each: its gradient is one stack, and zero for what was not used
    branches = [(stack, stack.a.unbind(), stack.b.unbind()) for stack in stacks]

    def run(e: int, x: Tensor) -> Tensor:
        own = [Branch(a[e], b[e], stack.scaling, stack.dropout) for stack, a, b in branches]
        if weight.requires_grad:
            return plain_linear(x, weights[e], None, own)
        PACKING.keep_policy(weights[e], way.pack)  # "auto" too: a delta of before may have set it
        return delta_linear(x, weights[e], None, own, backend=way.backend, strict=way.strict)

    return run


def _activated(gate_up: Tensor, act: nn.Module, way: Way) -> Tensor:
    """``φ(gate) · up`` of ``[gate up]``."""
    gate, up = gate_up.chunk(2, dim=-1)
    activation = activation_of(act) if plain(gate) else None
    if activation is not None:
        rows, columns = gate.shape
        call = GatedCall(gate.device.type, gate.dtype, rows, columns, activation)
        if takes(call, way.backend, way.strict):
            return gated(gate, up, activation, backend=way.backend, strict=way.strict)
    product: Tensor = act(gate) * up
    return product


class DeltaExperts(Switched, nn.Module):
    """Mixin over a class of experts: LoRA branches by adapter name and parameter.

    ``lora_A.<adapter>.<parameter>`` is ``[E, R, K]``, that of ``lora_B`` ``[E, N, R]``.
    """

    _replicate_for_data_parallel = refuse_replicas

    base_class: type[nn.Module]
    """The exact type that surgery swapped, and that revert puts back."""

    backend: str
    """Passed to :func:`deltaops.ops.delta_linear`."""
    strict: bool
    """Passed to :func:`deltaops.ops.delta_linear`."""
    pack: Policy
    """See :class:`deltaops.modules.LinearPlace`."""
    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    act_fn: nn.Module
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora: dict[str, dict[str, LoraSettings]]
    """Adapter → parameter → settings."""
    delta_kind: str
    """For the report."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[T, H]`` → ``[T, H]``, for the experts ``[T, J]`` and their weights ``[T, J]``."""
        if self.off and not self.delta_active:
            plain: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
            return plain
        return run_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            (self.gate_up_proj, self.stacks(GATE_UP)),
            (self.down_proj, self.stacks(DOWN)),
            self.act_fn,
            Way(self.backend, self.strict, self.pack),
        )

    def stacks(self, parameter: str) -> list[StackedBranch]:
        """The branches beside ``parameter``, dropout only in training."""
        found = []
        for name, by_parameter in self.lora.items():
            settings = by_parameter.get(parameter)
            if settings is None or name in self.off:
                continue
            a, b = self.factors(name, parameter)
            dropout = settings.dropout if self.training else 0.0
            found.append(StackedBranch(a, b, settings.scaling, dropout))
        return found

    def factors(self, name: str, parameter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of the adapter ``name``."""
        a, b = (side[name].get_parameter(parameter) for side in (self.lora_A, self.lora_B))
        return a, b

    def add_lora(
        self, name: str, parameter: str, settings: LoraSettings, a: Tensor, b: Tensor
    ) -> None:
        """Add the branch ``name`` beside ``parameter``, with ``a [E, R, K]``, ``b [E, N, R]``."""
        for side, factor in (("lora_A", a), ("lora_B", b)):
            if side not in self._modules:
                self.add_module(side, nn.ModuleDict())
            by_name = getattr(self, side)
            if name not in by_name:
                by_name[name] = nn.ParameterDict()
            by_name[name][parameter] = nn.Parameter(factor)
        self.lora.setdefault(name, {})[parameter] = settings

    # what a report asks of every place; of one expert, as an example of all

    def base(self) -> tuple[Tensor, None]:
        """The weight ``[N, K]`` of the first expert, of the first parameter with a delta."""
        return self._parameters[self._adapted()[0]][0], None  # type: ignore[index]  # a parameter of the two

    def branches(self) -> list[Branch]:
        """Those of that expert."""
        return [
            Branch(s.a[0], s.b[0], s.scaling, s.dropout) for s in self.stacks(self._adapted()[0])
        ]

    def slow_reason(self) -> str | None:
        """Why the next call would leave the op for plain torch; None when it does not."""
        trained = self.gate_up_proj.requires_grad or self.down_proj.requires_grad
        return UNFROZEN if trained else None

    def matrices(self) -> list[Tensor]:
        """Every weight ``[N, K]`` that the op reads."""
        return [*self.gate_up_proj.unbind(), *self.down_proj.unbind()]

    def names(self) -> set[str]:
        """See :class:`Switched`."""
        return set(self.lora)

    def _adapted(self) -> list[str]:
        return list(next(iter(self.lora.values())))

    def extra_repr(self) -> str:
        """The deltas."""
        parts = [
            f"{name}: {parameter} r={s.r}, alpha={s.alpha:g}"
            for name, by_parameter in self.lora.items()
            for parameter, s in by_parameter.items()
        ]
        return f"lora=({'; '.join(parts)}){'' if self.delta_active else ', inactive'}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied and pickled by the class of before; the subclass is made where it is wanted."""
        return _blank, (self.base_class,), self.__dict__


_classes: dict[type[nn.Module], type[DeltaExperts]] = {}


def _over(base: type[nn.Module]) -> type[DeltaExperts]:
    """:class:`DeltaExperts` over exactly ``base``; the same class each time."""
    if base not in _classes:
        made = type(f"Delta{base.__name__}", (DeltaExperts, base), {"base_class": base})
        _classes.setdefault(base, made)
    return _classes[base]


def _blank(base: type[nn.Module]) -> nn.Module:
    kind = _over(base)
    return kind.__new__(kind)


def become_experts(module: nn.Module, backend: str, strict: bool, pack: Policy) -> DeltaExperts:
    """Swap the class of a module of experts; one that is a place already stays it.

    Args:
        module: whose forward is :func:`run_experts` without branches; matching saw to it.
        backend: of the op's calls.
        strict: of the op's calls.
        pack: see ``attach``.
    """
    if not isinstance(module, DeltaExperts):
        attributes = {"backend": backend, "strict": strict, "pack": pack}
        module.__dict__.update(attributes, off=frozenset(), lora={}, delta_kind="lora")
        module.__class__ = _over(type(module))
    assert isinstance(module, DeltaExperts)
    return module


def unbecome_experts(module: nn.Module) -> None:
    """Undo :func:`become_experts`; nothing where that never came."""
    if not isinstance(module, DeltaExperts):
        return
    module.__class__ = module.base_class  # type: ignore[assignment]  # its class of before
    for name in ("lora_A", "lora_B"):
        module._modules.pop(name, None)
    for name in ("backend", "strict", "pack", "off", "lora", "delta_kind"):
        module.__dict__.pop(name, None)


def holds_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds experts as matrices in a tensor, one for each."""
    own = [p for p in module._parameters.values() if p is not None]
    return any(p.dim() == 3 for p in own) and "expert" in type(module).__name__.lower()


def start_experts(
    experts: int,
    rank: int,
    in_features: int,
    out_features: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator | None,
    gaussian: bool = False,
) -> tuple[Tensor, Tensor]:
    """``A [experts, rank, in]`` and ``B [experts, out, rank]``, each expert's as ``start_values``.

    Drawn in one go; see there.
    """
    if device.type == "meta":
        a = torch.empty(experts, rank, in_features, device=device, dtype=dtype)
        return a, torch.empty(experts, out_features, rank, device=device, dtype=dtype)
    drawn = torch.empty(
        experts * rank, in_features, device=draws_on(generator), dtype=torch.float32
    )
    if gaussian:
        nn.init.normal_(drawn, std=1 / rank, generator=generator)
    else:
        nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
    b = torch.zeros(experts, out_features, rank, device=device, dtype=dtype)
    return drawn.view(experts, rank, in_features).to(device=device, dtype=dtype), b
