"""What every linear place shares: where its weight lies, its branches, and one call of the op.

    y = x Wᵀ + b + Σᵢ sᵢ · φᵢ(dropᵢ(x) Aᵢᵀ + aᵢ) Bᵢᵀ

Surgery makes a place by swapping ``__class__`` of an exact ``nn.Linear`` or ``Conv1D``; parameters,
their names and hooks stay as they were. ``forward`` runs once a layer and step, where a microsecond
is felt: it reads ``_parameters`` and ``_modules`` directly and builds nothing but the branches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaops.errors import AttachError
from deltaops.ops import Branch, Layer, delta_linear
from deltaops.packing import PACKING, Policy
from deltaops.reference.activation import activate

from .adapter import Bottleneck
from .around import (
    GainAfter,
    GainBefore,
    GatedBranch,
    Part,
    Relay,
    Rescale,
    Sequential,
    SpanEnd,
    SpanStart,
)
from .dora import Magnitude, row_norms
from .factor import Factor
from .gate import GATES, Gate, add_gate
from .kept import activate_copies, copies, give_back, has_copies, owners, train_copies
from .replicas import refuse_replicas
from .samples import SAMPLES, Samples
from .sharing import ALTERS_INPUT, shared
from .switched import Switched

UNFROZEN = "the base weight requires a gradient, which the fused op does not compute: plain torch"
"""The reason that ``deltaops.report`` shows while a place runs :func:`plain_linear`."""


class LoraSettings(NamedTuple):
    """What a place knows of one LoRA branch beside its two matrices."""

    r: int
    alpha: float
    scaling: float
    dropout: float


class Start(NamedTuple):
    """What was taken out of a weight."""

    a: Tensor
    b: Tensor
    rounded: torch.dtype
    """Of the weight then, in which what was left of it was stored."""


class LinearPlace(nn.Module):
    """Mixin of all places on a linear layer. Without branches it is the frozen layer itself."""

    _replicate_for_data_parallel = refuse_replicas

    base_class: type[nn.Module]
    """The exact type that surgery swapped, and that revert puts back."""

    backend: str
    """Passed to :func:`deltaops.ops.delta_linear`."""
    strict: bool
    """Passed to :func:`deltaops.ops.delta_linear`."""
    pack: Policy
    """Whether the CPU core may keep a packed copy of the weight; see :mod:`deltaops.packing`."""

    def base(self) -> tuple[Tensor, Tensor | None]:
        """Weight ``[N, K]`` and bias ``[N]`` as the op takes them."""
        parameters = self._parameters
        weight: Any = parameters.get("weight")
        if weight is None:  # FSDP1 and parametrizations keep it elsewhere
            weight = self.weight
        bias: Any = parameters["bias"] if "bias" in parameters else self.bias
        return weight, bias

    def branches(self) -> list[Branch]:
        """The branches of the next call, dropout only in training."""
        return []

    def slow_reason(self) -> str | None:
        """Why the next call would leave the op for plain torch; None when it does not."""
        return UNFROZEN if self.base()[0].requires_grad else None

    def layer(self, x: Tensor) -> Layer | None:
        """What the op takes for the next call, of ``x``; None where that leaves the op for plain
        torch."""
        weight, bias = self.base()
        if weight.requires_grad:
            return None
        if self.pack != "auto":
            PACKING.keep_policy(weight, self.pack)
        return Layer(weight, bias, self.branches())

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` → ``[..., N]``; see :func:`deltaops.ops.delta_linear`."""
        y = shared(self, x)
        if y is not None:
            return y
        layer = self.layer(x)
        if layer is None:
            return plain_linear(x, *self.base(), self.branches())
        return delta_linear(x, *layer, backend=self.backend, strict=self.strict)


class DeltaPlace(Switched, LinearPlace):
    """Mixin of a place with deltas: LoRA branches by adapter name, and parts around the op.

    Of the containers, a place has those that its deltas need.
    """

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_magnitude_vector: nn.ModuleDict
    ia3_l: nn.ParameterDict
    adapter: nn.ModuleDict
    lora: dict[str, LoraSettings]
    around: tuple[Part, ...]
    """Gains and adapters; see :mod:`deltaops.modules.around`."""
    gated: frozenset[str]
    """Names of the LoRA that are added after the op, each times its gate."""
    starts: dict[str, Start]
    """By adapter, what was taken out of the weight; see :meth:`take_out`."""
    beside: tuple[str, ...]
    """Names of the adapters that are branches of the op."""
    delta_kind: str
    """For the report."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` → ``[..., N]``: the parts around the op, if there are any, and the op."""
        around, off = self.around, self.off
        if off:
            around = tuple([part for part in around if part.name not in off])
        if not around:
            return super().forward(x)
        for part in around:
            x = part.before(self, x)
        y = super().forward(x)
        for part in around:
            y = part.after(self, y, x)
        return y

    def layer(self, x: Tensor) -> Layer | None:
        """See :class:`LinearPlace`; where samples are told apart, each has its own branch."""
        layer = super().layer(x)
        samples: Samples | None = self.__dict__.get(SAMPLES)
        if samples is None:
            return layer
        if layer is None:
            raise AttachError(f"adapters_by_sample: {UNFROZEN}. Freeze it.")
        off = self.off | self.gated
        names = tuple([name for name in (*self.lora, *self.beside) if name not in off])
        kept, adapter = samples.route(x, names)
        return layer._replace(branches=[layer.branches[i] for i in kept], adapter=adapter)

    def branches(self) -> list[Branch]:
        """One branch for each LoRA or parallel adapter that is neither off nor merged."""
        found: list[Branch] = []
        off = self.off | self.gated if self.gated else self.off
        if self.lora:
            modules, training = self._modules, self.training
            # nn.ModuleDict's own lookup costs more than the rest of this function
            a, b = modules["lora_A"]._modules, modules["lora_B"]._modules  # type: ignore[union-attr]  # add_lora made them
            found = [
                Branch(
                    a[name]._parameters["weight"],  # type: ignore[union-attr, arg-type]  # a Factor's, not None
                    b[name]._parameters["weight"],  # type: ignore[union-attr, arg-type]  # a Factor's, not None
                    settings.scaling,
                    settings.dropout if training else 0.0,
                )
                for name, settings in self.lora.items()
                if name not in off
            ]
        for name in self.beside:
            if name in off:
                continue
            adapter = self.adapter[name]
            assert isinstance(adapter, Bottleneck)
            found.append(adapter.branch())
        return found

    def add_lora(self, name: str, settings: LoraSettings, a: Tensor, b: Tensor) -> None:
        """Add the branch ``name`` with ``a [R, K]`` and ``b [N, R]``."""
        for side, factor in (("lora_A", a), ("lora_B", b)):
            if side not in self._modules:
                self.add_module(side, nn.ModuleDict())
            getattr(self, side)[name] = Factor(factor)
        self.lora[name] = settings

    def remove_lora(self, name: str) -> None:
        """Undo :meth:`add_lora`, with its magnitudes and its gate."""
        for side in ("lora_A", "lora_B", "lora_magnitude_vector", GATES):
            held: Any = self._modules.get(side)
            if held is not None and name in held:
                del held[name]
                if not len(held):
                    del self._modules[side]
        del self.lora[name]
        self.__dict__["off"], self.__dict__["gated"] = self.off - {name}, self.gated - {name}
        self.__dict__["around"] = tuple(part for part in self.around if part.name != name)

    def take_out(self, name: str, rest: Tensor) -> None:
        """Let the weight be ``rest``, W − s·B A, laid out as W is, while the delta is active.

        W itself waits, and A and B as they are now are kept, to say what the delta has changed.
        """
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        start = Start(a.detach().clone(), b.detach().clone(), rest.dtype)
        self.__dict__["starts"] = {name: start}
        train_copies(self, {"weight": rest.contiguous()}, name, trained=False)

    def add_magnitude(self, name: str) -> None:
        """Make the branch ``name`` DoRA's; its magnitudes start as the rows' norms ``[N]``."""
        if "lora_magnitude_vector" not in self._modules:
            self.add_module("lora_magnitude_vector", nn.ModuleDict())
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        start = row_norms(self.base()[0], a, b, self.lora[name].scaling).to(a.dtype)
        self.lora_magnitude_vector[name] = Magnitude(start)
        self._add(Rescale(name))

    def add_gate(self, name: str, gate: Gate) -> None:
        """Let what the adapter ``name`` adds here pass through a gate."""
        add_gate(self, name, gate)
        if name in self.lora:
            self.__dict__["gated"] = self.gated | {name}
            self._add(GatedBranch(name))

    def add_gain(self, name: str, gain: Tensor, *, before: bool) -> None:
        """Add (IA)³'s vector: ``[1, K]`` for the input (``before``), ``[N, 1]`` for the output."""
        if "ia3_l" not in self._modules:
            self.add_module("ia3_l", nn.ParameterDict())
        self.ia3_l[name] = nn.Parameter(gain)
        self._add(GainBefore(name) if before else GainAfter(name))
        if before:
            # a group computes q, k and v from one x; this place's is another
            self.__dict__[ALTERS_INPUT] = True

    def gains_input(self, name: str) -> bool:
        """Whether (IA)³'s vector ``name`` is for the input."""
        return GainBefore(name) in self.around

    def add_adapter(self, name: str, adapter: nn.Module, relay: Relay | None) -> None:
        """Add an adapter after the layer; with a relay, beside the sub-layer that ends here."""
        self._hold(name, adapter)
        self._add(Sequential(name) if relay is None else SpanEnd(name, relay))

    def add_branch(self, name: str, adapter: Bottleneck) -> None:
        """Add an adapter beside this one layer, as a branch of its op."""
        self._hold(name, adapter)
        self.__dict__["beside"] = (*self.beside, name)

    def begin_span(self, name: str, relay: Relay) -> None:
        """Note that a sub-layer with an adapter beside it begins here."""
        self._add(SpanStart(name, relay))

    def names(self) -> set[str]:
        """See :class:`Switched`."""
        return {*self.lora, *self.beside, *(part.name for part in self.around), *owners(self)}

    def turn(self, name: str, active: bool) -> None:
        """See :class:`Switched`: what it trains of the layer, and the span that ends here, too."""
        super().turn(name, active)
        if has_copies(self, name):
            activate_copies(self, active, name)
        for part in self.around:
            if isinstance(part, SpanEnd) and part.name == name:
                part.relay.active = active

    def relays(self) -> list[Relay]:
        """Those of the sub-layers that end here."""
        return [part.relay for part in self.around if isinstance(part, SpanEnd)]

    def describe_deltas(self) -> str:
        """For ``extra_repr``: what is bound here."""
        parts = [
            f"{name}: r={s.r}, alpha={s.alpha:g}"
            + (f", dropout={s.dropout:g}" if s.dropout else "")
            for name, s in self.lora.items()
        ]
        found = [f"lora=({'; '.join(parts)})"] if parts else []
        found += [f"branch {name}" for name in self.beside]
        found += [type(part).__name__ for part in self.around]
        if has_copies(self):
            found.append(f"own {', '.join(n for o in owners(self) for n in copies(self, o))}")
        if self.delta_active:
            return ", ".join([*found, *(f"{name} off" for name in sorted(self.off))])
        return ", ".join(found) + ", inactive"

    def _hold(self, name: str, adapter: nn.Module) -> None:
        if "adapter" not in self._modules:
            self.add_module("adapter", nn.ModuleDict())
        self.adapter[name] = adapter

    def _add(self, part: Part) -> None:
        # by what they are, those alike in the order in which they were added
        self.__dict__["around"] = tuple(sorted((*self.around, part), key=lambda p: p.order))


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, branches: list[Branch]) -> Tensor:
    """The same layer in torch's own functions, for a weight that is trained as well.

    x ``[..., K]``, weight ``[N, K]`` → ``[..., N]``. Dropout draws torch's mask, not the op's.
    """
    base = functional.linear(x, weight, bias)
    y = base
    for a, b, scaling, dropout, activation, branch_bias in branches:
        wide = functional.dropout(x.to(a.dtype), dropout, training=dropout > 0.0)
        inner = activate(activation, functional.linear(wide, a, branch_bias))
        y = y + functional.linear(inner, b) * scaling
    return y.to(base.dtype)


_ATTRIBUTES = (
    "backend", "strict", "pack", "off", "gated", "delta_kind", "lora", "around", "beside",
    "starts", ALTERS_INPUT, SAMPLES,
)  # fmt: skip
"""What a place has in its ``__dict__`` beside what the layer had."""


def become(
    module: nn.Module, place: type[LinearPlace], backend: str, strict: bool, pack: Policy = "auto"
) -> None:
    """Swap ``module``'s class for ``place`` and give it the place's attributes.

    The class comes last: until then the module runs as it was, with unused attributes at most.
    """
    module.__dict__["backend"] = backend
    module.__dict__["strict"] = strict
    module.__dict__["pack"] = pack
    if issubclass(place, DeltaPlace):
        module.__dict__["off"] = module.__dict__["gated"] = frozenset()
        module.__dict__["lora"] = {}
        module.__dict__["around"] = module.__dict__["beside"] = ()
        module.__dict__[SAMPLES] = None
    module.__class__ = place


def unbecome(module: nn.Module) -> None:
    """Undo :func:`become`: the exact class of before and none of the place's attributes."""
    if isinstance(module, LinearPlace):
        module.__class__ = module.base_class  # type: ignore[assignment]  # its exact class of before
    give_back(module)
    for name in ("lora_A", "lora_B", "lora_magnitude_vector", "ia3_l", "adapter", GATES):
        module._modules.pop(name, None)
    for name in _ATTRIBUTES:
        module.__dict__.pop(name, None)


def features(module: nn.Module) -> tuple[int, int]:
    """``(in_features, out_features)`` of a linear layer, of a Conv1D too (which stores ``[K, N]``).

    The weight itself is asked: resized embeddings leave stale attributes behind.
    """
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (rows, columns) if hasattr(module, "nf") else (columns, rows)
