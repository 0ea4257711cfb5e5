"""Prefix tuning: trained keys and values before those of the tokens.

    Y = softmax(scale · Q [Pk; K]ᵀ) [Pv; V]        Pk, Pv [Hkv, P, D] in each attention

Every query sees the prefix, the batch shares it, and it is no token: masks and caches stay what
they are. Pk and Pv are parameters, or rows of what a small MLP, shared by all attentions, computes:

    rows = Up · tanh(Down · e + d) + u        e [P, E], Down [C, E], Up [R, C]

Keys start at N(0, 1) (for a scale of D^-½; else at N(0, 1 / (scale² D))), so that queries tell them
apart from the first step on, and values at N(0, 0.02²), which adds little noise. That is not where
the model was: the prefix takes its part of the softmax, and what attention returns gets smaller.
Source: Li and Liang 2021 (arXiv 2101.00190); in every layer of any model as by Liu et al. 2022
(arXiv 2110.07602).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaops.errors import AttachError, CheckpointError, ConfigError
from deltaops.modules import (
    PREFIX_KEYS,
    PREFIX_VALUES,
    PrefixEncoder,
    activate_hooks,
    activate_prefix,
    add_prefix,
    check_attention,
    drop_hooks,
    encode,
    has_prefix,
    join_encoder,
    know_tables,
    remove_prefix,
    shift_positions,
)

from .attentions import SPREAD_OF_VALUES, PrefixDelta, drawn, spread_of_keys
from .base import MODEL, Binding, Delta, Site, Stored
from .peft_config import PROMPT_TENSOR, UNWRAPPED_PREFIX, listed, refuse_unknown
from .targets import ATTENTIONS, DECODER_ATTENTIONS, check_flags, is_count, normalise
from .tasks import task_of

_ENCODER = "prefix_encoder"
"""The encoder's name on the model, and its part of keys."""
_PARTS = ("embedding", "down", "down_bias", "up", "up_bias")
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclass(frozen=True, repr=False)
class Prefix(PrefixDelta):
    """Settings of prefix tuning.

    Args:
        num_virtual_tokens: P, keys and values before those of the tokens; PEFT's name for it, and
            that of its files.
        reparameterised: train an MLP that computes keys and values (PEFT: ``prefix_projection``).
            Files keep it, so that training can go on; ``handle.save(path, flat=True)`` writes the
            keys and values themselves, for inference and for PEFT.
        encoder_hidden_size: C, the MLP's hidden features; None takes the features of the first
            attention's keys, as PEFT does.
        shift_positions: let the prefix have the first P positions, as in PEFT, where it lies in the
            cache of keys. Off, tokens keep theirs, and none is lost for them.
        target_modules: the attentions that get one: the role "attention" (self and cross),
            "decoder-attention" (what PEFT takes), names or a regular expression as for
            :class:`deltaops.LoRA`.
        exclude_modules: names or a regular expression, taken out of the targets.
        modules_to_save: modules that are trained whole and saved along, such as a new head.
        layers_to_transform: indices of the layers that get the delta.
        layers_pattern: names of the module list that the indices count, such as "layers".
        autocast_adapter_dtype: keep the prefix in float32 where the model is float16 or bfloat16.
        task_type: PEFT's label, such as "CAUSAL_LM"; by the class of the model where it is None.
    Raises: ConfigError.

    Files are PEFT's where PEFT's prefix is this one: ``shift_positions``, on all attentions of the
    role "decoder-attention", for a known task and without an MLP. Otherwise they are ours.
    """

    num_virtual_tokens: int = 20
    reparameterised: bool = False
    encoder_hidden_size: int | None = None
    shift_positions: bool = False
    target_modules: str | tuple[str, ...] = ATTENTIONS
    exclude_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    autocast_adapter_dtype: bool = True
    task_type: str | None = None

    kind: ClassVar[str] = "prefix"
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    peft_role: ClassVar[str | None] = DECODER_ATTENTIONS
    peft_sizes: ClassVar[tuple[str, ...]] = (
        "token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Check every value; lists become tuples."""
        if not is_count(self.num_virtual_tokens):
            raise ConfigError(
                "Prefix: num_virtual_tokens must be an integer ≥ 1, got "
                f"{self.num_virtual_tokens!r}. 20 is usual."
            )
        check_flags(self, "reparameterised", "shift_positions", "autocast_adapter_dtype")
        if self.encoder_hidden_size is not None:
            if not is_count(self.encoder_hidden_size):
                raise ConfigError(
                    "Prefix: encoder_hidden_size must be an integer ≥ 1 or None, got "
                    f"{self.encoder_hidden_size!r}. 512 is usual."
                )
            if not self.reparameterised:
                raise ConfigError(
                    f"Prefix: encoder_hidden_size={self.encoder_hidden_size} is of an MLP, and "
                    "there is none. Pass reparameterised=True, or leave it out."
                )
        normalise(self)

    def __repr__(self) -> str:
        """P and whatever differs from its default."""
        return self._shown("num_virtual_tokens")

    # ------------------------------------------------------------------------------- binding

    def leave(self, model: nn.Module) -> None:
        """See :meth:`Delta.leave`."""
        super().leave(model)
        drop_hooks(model)

    def switch(self, model: nn.Module, active: bool) -> None:
        """See :meth:`Delta.switch`."""
        super().switch(model, active)
        activate_hooks(model, active, PrefixEncoder)

    def on_model(self, sites: tuple[Site, ...]) -> tuple[int, int] | None:
        """E and R of the encoder."""
        if not self.reparameterised:
            return None
        return sites[0].out_features, 2 * sum(site.out_features for site in sites)

    def gate_width(self, site: Site) -> int | None:
        """See :meth:`Delta.gate_width`."""
        return site.in_features

    def bind(self, site: Site, modules: Mapping[str, nn.Module], binding: Binding) -> None:
        """See :meth:`Delta.bind`. The model, with its encoder, comes before the attentions."""
        module = modules[site.path]
        if site.place == MODEL:
            self._bind_encoder(site, module, binding)
            return
        check_attention(site.path, module)
        if self.shift_positions:
            shift_positions(modules, site.path, self.num_virtual_tokens)
        backend, strict = binding.backend, binding.strict
        heads, _, width = self._shape(site)
        spread = spread_of_keys(module, width), SPREAD_OF_VALUES
        if self.reparameterised:
            encoder = modules[""].get_submodule(_ENCODER)
            assert isinstance(encoder, PrefixEncoder)
            rows = join_encoder(
                encoder, modules, site.path, heads, width, backend=backend, strict=strict
            )
            with torch.no_grad():
                for found, factor in zip(rows, spread, strict=True):
                    encoder.up[found] *= factor
        else:
            k, v = (self._drawn(self._shape(site), one, module, binding) for one in spread)
            add_prefix(module, k, v, backend=backend, strict=strict)
        know_tables(modules, site.path)

    def _bind_encoder(self, site: Site, model: nn.Module, binding: Binding) -> None:
        if hasattr(model, _ENCODER):
            raise AttachError(
                f"Prefix: {type(model).__name__} must have no {_ENCODER!r} yet, and has one. "
                "Rename it, or use reparameterised=False."
            )
        shapes = self.shapes(site, model)
        hidden, inner = shapes[f"{_ENCODER}.down"]
        # each sum of Down · e is N(0, 1), whose tanh has a deviation of 0.63: that of rows is 1
        spread = {"embedding": 1.0, "down": inner**-0.5, "up": hidden**-0.5 / 0.63}
        found = {
            key.rpartition(".")[2]: self._drawn(
                shape, spread.get(key.rpartition(".")[2], 0.0), model, binding
            )
            for key, shape in shapes.items()
        }
        model.add_module(_ENCODER, PrefixEncoder(**found))

    def _drawn(
        self, shape: tuple[int, ...], spread: float, beside: nn.Module, binding: Binding
    ) -> Tensor:
        return drawn(shape, spread, beside, binding, self.autocast_adapter_dtype)

    def unbind(self, site: Site, modules: Mapping[str, nn.Module]) -> None:
        """See :meth:`Delta.unbind`."""
        module = modules[site.path]
        if site.place != MODEL:
            remove_prefix(module)
        elif isinstance(module._modules.get(_ENCODER), PrefixEncoder):
            del module._modules[_ENCODER]

    def activate(self, module: nn.Module, active: bool, name: str) -> None:
        """See :meth:`Delta.activate`."""
        if has_prefix(module):  # not the model, of which :meth:`switch` sees to the encoder
            activate_prefix(module, active)

    # ----------------------------------------------------------------------------------- files

    def tensors(self, module: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """``prefix_k`` and ``prefix_v`` of an attention, or the encoder's of the model."""
        encoder = module._modules.get(_ENCODER)
        if isinstance(encoder, PrefixEncoder):
            return {f"{_ENCODER}.{part}": p for part, p in encoder.named_parameters()}
        parameters = {key: module._parameters.get(key) for key in (PREFIX_KEYS, PREFIX_VALUES)}
        return {key: p for key, p in parameters.items() if p is not None}

    def shapes(self, site: Site, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """See :meth:`Delta.shapes`."""
        if site.place == MODEL:
            inner, rows = site.in_features, site.out_features
            hidden = self.encoder_hidden_size or inner
            shapes = (self.num_virtual_tokens, inner), (hidden, inner), (hidden,), (rows, hidden)
            return {
                f"{_ENCODER}.{part}": shape
                for part, shape in zip(_PARTS, (*shapes, (rows,)), strict=True)
            }
        return (
            {}
            if self.reparameterised
            else dict.fromkeys((PREFIX_KEYS, PREFIX_VALUES), self._shape(site))
        )

    def _shape(self, site: Site) -> tuple[int, int, int]:
        return site.heads, self.num_virtual_tokens, site.out_features // site.heads

    def portable(
        self,
        modules: Mapping[str, nn.Module],
        name: str,
        state: Mapping[str, Tensor],
        sites: tuple[Site, ...],
        *,
        flat: bool,
    ) -> Stored:
        """See :meth:`Delta.portable`: flat, what the encoder computes, as keys and values."""
        if not (flat and self.reparameterised):
            return Stored(self, state, sites)
        attentions = tuple(site for site in sites if site.place != MODEL)
        rows = encode(*(state[f"{_ENCODER}.{part}"] for part in _PARTS))
        found = {k: t for k, t in state.items() if not k.startswith(f"{_ENCODER}.")}
        found |= self._split(rows, attentions)
        delta = replace(self, reparameterised=False, encoder_hidden_size=None)
        return Stored(delta, found, attentions)

    def _split(self, rows: Tensor, sites: tuple[Site, ...]) -> dict[str, Tensor]:
        """``[P, R]``, keys and values of one attention after the other → each ``[Hkv, P, D]``."""
        names = [(site, name) for site in sites for name in (PREFIX_KEYS, PREFIX_VALUES)]
        parts = torch.split(rows, [site.out_features for site, _ in names], dim=1)
        return {
            site.key(name): part.reshape(len(part), site.heads, -1).transpose(0, 1).contiguous()
            for (site, name), part in zip(names, parts, strict=True)
        }

    def labelled(self, model: nn.Module) -> Delta:
        """See :meth:`Delta.labelled`: the task, by which PEFT lays a prefix out."""
        return replace(self, task_type=self.task_type or task_of(model))

    def unlike_peft(
        self, model: nn.Module, sites: tuple[Site, ...], *, writing: bool
    ) -> str | None:
        """See :meth:`Delta.unlike_peft`."""
        config = getattr(model, "config", None)
        if self.reparameterised:
            return "its MLP is kept for training; handle.save(path, flat=True) leaves it out"
        if not self.shift_positions:
            return "PEFT's prefix has the first positions (shift_positions=True)"
        if self.task_type not in _TASKS:
            return (
                f"it needs a task_type, one of {', '.join(_TASKS)}, and {type(model).__name__} "
                "says none"
            )
        if getattr(config, "is_encoder_decoder", False) != (self.task_type == "SEQ_2_SEQ_LM"):
            return f"task_type={self.task_type!r} is not for {type(model).__name__}"
        if len({(site.heads, site.out_features) for site in sites}) > 1:
            return "its attentions have keys of several sizes"
        if any(_window(model.get_submodule(site.path)) is not None for site in sites):
            return "a sliding window leaves PEFT's prefix behind, which lies in the cache"
        above = [m for path, m in model.named_modules() if _holds(path, sites[0].path)]
        if not any("past_key_values" in signature(type(m).forward).parameters for m in above):
            return f"{type(model).__name__} takes no cache of keys, in which PEFT has its prefix"
        if writing and len(set(self._peft_layers(sites))) < len(sites):
            return "PEFT gives several layers of this decoder the same keys and values"
        return None

    def to_peft_tensors(
        self, tensors: Mapping[str, Tensor], sites: tuple[Site, ...]
    ) -> dict[str, Tensor]:
        """``prompt_embeddings [P, R]``, keys and values of one layer after the other."""
        by_layer = dict(zip(self._peft_layers(sites), sites, strict=True))
        # a layer that PEFT never reads: only asked for its shape, since nothing is written then
        held = [by_layer.get(layer, site) for layer, site in enumerate(sites)]
        ours, every = (
            [site.key(name) for site in some for name in (PREFIX_KEYS, PREFIX_VALUES)]
            for some in (held, sites)
        )
        found = {f"{UNWRAPPED_PREFIX}{k}": t for k, t in tensors.items() if k not in every}
        if all(key in tensors for key in every):
            parts = [tensors[key].transpose(0, 1).flatten(1) for key in ours]
            found[PROMPT_TENSOR] = torch.cat(parts, dim=1)
        return found

    def from_peft_tensors(
        self, tensors: Mapping[str, Tensor], sites: tuple[Site, ...]
    ) -> dict[str, Tensor]:
        """See :meth:`Delta.from_peft_tensors`."""
        found = {
            k.removeprefix(UNWRAPPED_PREFIX): t for k, t in tensors.items() if k != PROMPT_TENSOR
        }
        layers = tensors[PROMPT_TENSOR].unflatten(1, (len(sites), -1))  # type: ignore[no-untyped-call]  # torch's has no types
        return found | self._split(layers[:, self._peft_layers(sites)].flatten(1), sites)

    def _peft_layers(self, sites: tuple[Site, ...]) -> list[int]:
        """For each attention, which layer's keys and values of the file PEFT gives it.

        For a decoder behind an encoder it has them twice, one row of layers after the other, and
        takes four at a time, for self and for cross attention, of which it drops the latter.
        """
        step = 2 if self.task_type == "SEQ_2_SEQ_LM" else 1
        return [step * i % len(sites) for i in range(len(sites))]

    def to_peft(self, sites: tuple[Site, ...] = ()) -> dict[str, Any]:
        """The fields of peft's PrefixTuningConfig; a prefix in a cache is that of a decoder."""
        size = sites[0].out_features
        return {
            "peft_type": self.peft_type,
            "task_type": self.task_type,
            "num_virtual_tokens": self.num_virtual_tokens,
            "token_dim": size,
            "num_attention_heads": sites[0].heads,
            "num_layers": len(sites),
            "num_transformer_submodules": 2 if self.task_type == "SEQ_2_SEQ_LM" else 1,
            "encoder_hidden_size": size,
            "prefix_projection": False,
            "init_weights": None,
            "modules_to_save": list(self.modules_to_save) or None,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Prefix:
        """See :meth:`Delta.from_peft`; an MLP is not in PEFT's files, only what it computed."""
        expressed = ("num_virtual_tokens", "encoder_hidden_size", "prefix_projection")
        refuse_unknown(cls.__name__, config, (*expressed, "init_weights", *cls.peft_sizes))
        try:
            return cls(
                num_virtual_tokens=config.get("num_virtual_tokens"),  # type: ignore[arg-type]  # checked by the class
                shift_positions=True,
                target_modules=DECODER_ATTENTIONS,
                modules_to_save=listed(config, "modules_to_save") or (),
                task_type=config.get("task_type"),
            )
        except ConfigError as error:
            raise CheckpointError(f"adapter_config.json: {error}") from error


def _window(attention: Any) -> Any:
    """How far back a query sees; None where it sees all."""
    holder = attention if hasattr(attention, "sliding_window") else attention.config
    return getattr(holder, "sliding_window", None)


def _holds(path: str, site: str) -> bool:
    return not path or site.startswith(f"{path}.")
