"""LoRA: low-rank adaptation.      y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ

W [N, K] stays frozen; A [r, K] and B [N, r] are trained; s = alpha / r, with ``use_rslora``
s = alpha / √r. Merged, the weight is W + s · B A. With ``use_dora`` each row of that sum is scaled
to a length m [N] that is trained too.

On an embedding, y = W[ids] + s · A[:, ids]ᵀ Bᵀ with W [V, D], A [r, V] and B [D, r], without
dropout. Where the output layer is tied to it, that keeps the frozen weight. On the experts of a
mixture each has an A and a B of its own: :mod:`deltaops.modules.experts`. Its router, no layer in
transformers, computes with the sum: :mod:`deltaops.modules.router`.
Source: Hu et al. 2021 (arXiv 2106.09685); rank-stabilised scaling: Kalajdzievski 2023 (2312.03732);
DoRA: Liu et al. 2024 (2402.09353); LoRA+: Hayou et al. 2024 (2402.12354); starts that are taken out
of the weight: :mod:`deltaops.methods.lora_start`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaops.errors import CheckpointError, ConfigError
from deltaops.modules import (
    DeltaEmbedding,
    DeltaExperts,
    DeltaPlace,
    DeltaRouter,
    LoraSettings,
    become_embedding,
    become_router,
    holds_experts,
    is_router,
    nonzero,
    originals,
    start_embedding,
    start_values,
    unbecome,
    unbecome_embedding,
    unbecome_experts,
    unbecome_router,
)
from deltaops.ops.paths import no_autocast

from . import lora_experts
from .base import (
    BY_PARAMETER,
    EMBEDDING,
    EXACT,
    EXPERTS,
    LINEAR,
    ROUTER,
    Binding,
    Delta,
    Promise,
    Site,
    Stored,
    adapter_dtype,
    wide,
)
from .linear import become_place, laid_out
from .lora_peft import arguments, peft_fields, refuse_unknown_features
from .lora_start import is_rest, is_taken_out, rest, taken_out
from .patterns import first, pairs
from .targets import ALL_LINEAR, check_flags, is_count, is_number, names, normalise


@dataclass(frozen=True, repr=False)
class LoRA(Delta):
    """Settings of a LoRA delta. Names and meanings are PEFT's.

    Args:
        r: rank, ≥ 1.
        alpha: scale; the branch is multiplied by ``alpha / r`` (``alpha / √r`` with rsLoRA).
        dropout: probability of dropping an element of the branch's input while training, in [0, 1).
        target_modules: "all-linear" (every linear layer but the output embedding) or another role,
            names matched from the end of the path (``["q_proj", "v_proj"]``), or a regular
            expression for the whole path. Names may be those of embeddings.
        exclude_modules: names or a regular expression, taken out of the targets.
        modules_to_save: modules that are trained whole and saved along, such as a new head.
        use_rslora: scale by ``alpha / √r``.
        use_dora: train the lengths of the adapted weight's rows as well. In training, ``dropout``
            acts on the branch alone; PEFT lets it act on a part of the frozen product too, for
            which it computes that product twice.
        rank_pattern: ranks of some modules that differ from ``r``: a mapping from a name (from the
            end of the path) or regular expression, as PEFT has it. The first that matches counts.
        alpha_pattern: the same for ``alpha``.
        lr_ratio: how many times A's learning rate B has (LoRA+; 16 is usual), in the groups of
            ``handle.parameter_groups(lr)`` and in ``deltaops tune``. Files do not keep it.
        init_lora_weights: how A and B start: True (A by Kaiming's rule, B zero), "gaussian" (A
            N(0, 1/r²), B zero), or taken out of the weight: "pissa" (by a full singular value
            decomposition), "pissa_niter_N" (by N rounds of a sketched one, much faster), "olora".
            Then the layer's weight is the rest while the delta is active, and W waits beside it for
            ``disabled`` and ``revert``; a file holds the change of W, a LoRA of rank 2·r that every
            reader takes for what it is. A state dict of the model does not hold the start: to go
            on from one, attach to the same base model under the same seed, which saving checks
            (but not after ``merge(keep_base=False)``, which drops W).
        layers_to_transform: indices of the layers that get the delta (without a regular expression
            in ``target_modules``, which can say so itself).
        layers_pattern: names of the module list that the indices count, such as "layers".
        autocast_adapter_dtype: keep A and B in float32 where the weight is float16 or bfloat16.
        task_type: PEFT's label, such as "CAUSAL_LM"; kept in files, and "SEQ_CLS" keeps the
            classification head out of "all-linear".
        target_parameters: parameters of experts, as ``["experts.gate_up_proj",
            "experts.down_proj"]``, matched from the end of the path, beside what ``target_modules``
            names; each expert gets an A and a B of its own. "gate.weight" is the router's, which is
            no layer in transformers. ``LoRA(target_parameters=…)`` ALONE KEEPS THE DEFAULT
            ``target_modules="all-linear"``, where PEFT's None is no module at all: pass
            ``target_modules=[]`` for experts alone. "all-linear" has neither experts nor routers
            (PEFT's has Mixtral's); the role "experts" in ``target_modules`` is all of the former.
            ``exclude_modules`` and ``layers_to_transform`` say nothing of parameters, and patterns
            of ranks and alphas go by their paths. PEFT has no dropout on either, and routers have
            none here: with ``dropout`` above 0, files of experts are in our format; so too where
            layers beside the experts have names that PEFT takes for those of experts
            (``gate_proj`` of a dense feed-forward).
    Raises: ConfigError.
    """

    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
    alpha_pattern: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
    lr_ratio: float = 1.0
    init_lora_weights: bool | str = True
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    autocast_adapter_dtype: bool = True
    task_type: str | None = None
    target_parameters: tuple[str, ...] = ()

    kind: ClassVar[str] = "lora"
    places: ClassVar[frozenset[str]] = frozenset({LINEAR, EMBEDDING, EXPERTS, ROUTER})
    peft_type: ClassVar[str | None] = "LORA"
    promises: ClassVar[frozenset[Promise]] = EXACT

    def __post_init__(self) -> None:
        """Check every value; lists become tuples."""
        if not is_count(self.r):
            raise ConfigError(f"LoRA: r must be an integer ≥ 1, got {self.r!r}. 8 is usual.")
        if not is_number(self.alpha):
            raise ConfigError(f"LoRA: alpha must be finite, got {self.alpha!r}. Try 2·r.")
        if not is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(
                f"LoRA: dropout must be in [0, 1), got {self.dropout!r}. Pass 0.05 for 5 %."
            )
        if not is_number(self.lr_ratio) or self.lr_ratio <= 0:
            raise ConfigError(f"LoRA: lr_ratio must be above 0, got {self.lr_ratio!r}. Try 16.")
        for field, valid in (("rank_pattern", is_count), ("alpha_pattern", is_number)):
            object.__setattr__(self, field, pairs(field, getattr(self, field), valid))
        check_flags(self, "use_rslora", "use_dora", "autocast_adapter_dtype")
        self._check_start()
        chosen = names("LoRA: target_parameters", self.target_parameters)
        object.__setattr__(self, "target_parameters", chosen)
        normalise(self)

    def _check_start(self) -> None:
        start = self.init_lora_weights
        if start is not True and start != "gaussian" and not is_taken_out(start):
            raise ConfigError(
                "LoRA: init_lora_weights must be True, 'gaussian', 'pissa', 'pissa_niter_N' or "
                f"'olora', got {start!r}."
            )
        if not is_taken_out(start):
            return
        if self.use_dora:
            raise ConfigError(
                f"LoRA: init_lora_weights={start!r} and use_dora=True do not go together: with "
                "lengths of its own the change of the weight is no LoRA, which is what files hold."
            )
        if min([self.alpha, *dict(self.alpha_pattern).values()]) <= 0:
            raise ConfigError(
                f"LoRA: init_lora_weights={start!r} divides by the scale, so every alpha must be "
                f"above 0, got alpha={self.alpha!r}, alpha_pattern={self.alpha_pattern!r}."
            )

    def __repr__(self) -> str:
        """Rank, alpha and whatever differs from its default."""
        return self._shown("r", "alpha")

    @property
    def scaling(self) -> float:
        """The factor of the branch, where no pattern says otherwise."""
        return self._scaling(self.r, self.alpha)

    def rank(self, path: str) -> int:
        """The rank at ``path``."""
        return int(first(self.rank_pattern, path, self.r))

    def alpha_at(self, path: str) -> float:
        """The alpha at ``path``."""
        return float(first(self.alpha_pattern, path, self.alpha))

    @staticmethod
    def _named(site: Site) -> str:
        """What patterns of ranks and alphas go by: a router's weight is named as a parameter."""
        return ".".join([site.path, *site.parameters]) if site.place == ROUTER else site.path

    def scaling_at(self, path: str) -> float:
        """The factor of the branch at ``path``."""
        return self._settings(path).scaling

    def _scaling(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _settings(self, path: str) -> LoraSettings:
        rank, alpha = self.rank(path), self.alpha_at(path)
        return LoraSettings(rank, alpha, self._scaling(rank, alpha), float(self.dropout))

    # ------------------------------------------------------------------------------- binding

    def unbindable(self, module: nn.Module) -> str | None:
        """See :meth:`Delta.unbindable`."""
        if holds_experts(module):
            if self.use_dora:
                return "it holds experts, and use_dora needs linear layers"
            if is_taken_out(self.init_lora_weights):
                start = self.init_lora_weights
                return f"it holds experts, and init_lora_weights={start!r} needs linear layers"
            return None
        if is_router(module):
            if self.dropout:
                return "it is a router, whose sum of weights has no dropout, here as in PEFT"
            plain = not self.use_dora and not is_taken_out(self.init_lora_weights)
            return (
                None if plain else "it is a router, and use_dora and init_lora_weights need layers"
            )
        if not isinstance(module, nn.Embedding):
            return None
        if self.use_dora:
            return "it is an embedding, and use_dora needs linear layers"
        if module.max_norm is not None or module.scale_grad_by_freq:
            return "it is an embedding with max_norm or scale_grad_by_freq"
        return None

    def named_parameters(self, path: str, module: nn.Module) -> tuple[str, ...]:
        """PEFT's rule: a name is the whole path of a parameter, or its end."""
        endings = tuple(f".{name}" for name in self.target_parameters)
        own = (name for name, p in module._parameters.items() if p is not None)
        return tuple(name for name in own if f".{path}.{name}".endswith(endings))

    def unfit(self, site: Site) -> str | None:
        """A rank above either dimension adds parameters and no rank."""
        if site.place in BY_PARAMETER:  # as in PEFT: nothing is computed from the matrix itself
            return None
        rank = self.rank(site.path)
        if rank > min(site.in_features, site.out_features):
            return (
                f"r={rank} is above its smaller dimension ({site.in_features}→{site.out_features})"
            )
        return None

    def claims(self, site: Site, module: nn.Module) -> dict[str, bool]:
        """See :meth:`Delta.claims`: DoRA and starts that change the weight have it alone."""
        alone = self.use_dora or is_taken_out(self.init_lora_weights)
        return dict.fromkeys(site.parameters or ("weight",), alone and site.place == LINEAR)

    def gate_width(self, site: Site) -> int | None:
        """See :meth:`Delta.gate_width`."""
        alone = self.use_dora or is_taken_out(self.init_lora_weights)
        return site.in_features if site.place == LINEAR and not alone else None

    def bind(self, site: Site, modules: Mapping[str, nn.Module], binding: Binding) -> None:
        """See :meth:`Delta.bind`."""
        module = modules[site.path]
        if site.place == EXPERTS:
            lora_experts.bind(
                module,
                site,
                binding,
                self._settings,
                gaussian=self.init_lora_weights == "gaussian",
                autocast=self.autocast_adapter_dtype,
            )
            return
        weight = module.weight
        assert isinstance(weight, Tensor)
        settings = self._settings(self._named(site))
        rank = settings.r
        if site.place == ROUTER:
            a, b = self._drawn(site, settings, weight, binding.generator)
            become_router(module).add_lora(binding.name, settings, a, b)
            return
        if site.place == EMBEDDING:
            _warn_of_ties(site.path, modules)
            factors = start_embedding(
                rank,
                site.in_features,
                site.out_features,
                device=weight.device,
                dtype=adapter_dtype(weight, self.autocast_adapter_dtype),
                generator=binding.generator,
            )
            become_embedding(module).add_lora(binding.name, settings, *factors)
            return
        place = become_place(module, self.kind, binding)
        a, b = self._start(site, place, settings, binding.generator)
        place.add_lora(binding.name, settings, a, b)
        if self.use_dora:
            place.add_magnitude(binding.name)
        if is_taken_out(self.init_lora_weights):
            left = rest(place.base()[0], a, b, settings.scaling)
            place.take_out(binding.name, laid_out(module, left))

    def _start(
        self,
        site: Site,
        place: DeltaPlace,
        settings: LoraSettings,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """A and B, in the dtype that they have."""
        weight, start = place.base()[0], self.init_lora_weights
        if isinstance(start, str) and is_taken_out(start):
            dtype = adapter_dtype(weight, self.autocast_adapter_dtype)
            reason = self.unfit(site)
            if reason is not None:  # a file says what it says; a weight has no more directions
                raise ConfigError(f"attach: {site.path!r}: {reason}.")
            a, b = taken_out(start, weight, settings.r, settings.scaling, generator)
            return a.to(dtype), b.to(dtype)
        return self._drawn(site, settings, weight, generator)

    def _drawn(
        self,
        site: Site,
        settings: LoraSettings,
        weight: Tensor,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        return start_values(
            settings.r,
            site.in_features,
            site.out_features,
            device=weight.device,
            dtype=adapter_dtype(weight, self.autocast_adapter_dtype),
            generator=generator,
            gaussian=self.init_lora_weights == "gaussian",
        )

    def unbind(self, site: Site, modules: Mapping[str, nn.Module]) -> None:
        """See :meth:`Delta.unbind`."""
        if site.place == EMBEDDING:
            unbecome_embedding(modules[site.path])
        elif site.place == EXPERTS:
            unbecome_experts(modules[site.path])
        elif site.place == ROUTER:
            unbecome_router(modules[site.path])
        else:
            unbecome(modules[site.path])

    def activate(self, module: nn.Module, active: bool, name: str) -> None:
        """See :meth:`Delta.activate`."""
        assert isinstance(module, DeltaPlace | DeltaEmbedding | DeltaExperts | DeltaRouter)
        module.turn(name, active)

    def weighed(self, factor: float) -> LoRA:
        """See :meth:`Delta.weighed`: every alpha times ``factor``."""
        if not is_number(factor):
            raise ConfigError(f"LoRA: a weight must be a finite number, got {factor!r}.")
        if self.use_dora or is_taken_out(self.init_lora_weights):
            raise ConfigError(
                "LoRA: with use_dora or a start that is taken out of the weight it cannot be "
                "weighed, since it does not just add; it can be on or off."
            )
        alphas = {key: alpha * factor for key, alpha in dict(self.alpha_pattern).items()}
        return replace(self, alpha=self.alpha * factor, alpha_pattern=alphas)

    def reread(self, site: Site, module: nn.Module, name: str) -> None:
        """See :meth:`Delta.reread`."""
        if isinstance(module, DeltaExperts):
            paths = {parameter: f"{site.path}.{parameter}" for parameter in site.parameters}
            module.lora[name] = {one: self._settings(path) for one, path in paths.items()}
            return
        assert isinstance(module, DeltaPlace | DeltaEmbedding | DeltaRouter)
        module.lora[name] = self._settings(self._named(site))

    def pace(self, suffix: str) -> float:
        """See :meth:`Delta.pace`."""
        return float(self.lr_ratio) if suffix.startswith("lora_B") else 1.0

    # ------------------------------------------------------------------------------- merging

    def unmergeable(self, module: nn.Module) -> str | None:
        """See :meth:`Delta.unmergeable`."""
        return None

    @torch.no_grad()
    def delta_weight(self, module: nn.Module, name: str) -> Tensor:
        """``s · B A`` [N, K], of an embedding ``s · Aᵀ Bᵀ`` [V, D], in float32 at least."""
        assert isinstance(module, DeltaPlace | DeltaEmbedding | DeltaRouter)
        a, b, *_ = self.tensors(module, name).values()
        # autocast would take the product in half precision
        with no_autocast(a.device):
            change = (b.to(wide(b)) @ a.to(wide(a))) * module.lora[name].scaling
        return change.T if isinstance(module, DeltaEmbedding) else change

    def merged(self, module: nn.Module, name: str) -> dict[str, Tensor]:
        """``W + s · B A``, with DoRA each row scaled to its length."""
        if isinstance(module, DeltaExperts):
            return lora_experts.merged(module, name)
        change = self.delta_weight(module, name)
        if isinstance(module, DeltaEmbedding | DeltaRouter):
            return {"weight": module.weight.to(change.dtype) + change}
        assert isinstance(module, DeltaPlace)
        total = module.base()[0].to(change.dtype) + change
        if self.use_dora:
            *_, magnitude = self.tensors(module, name).values()
            norms = torch.linalg.vector_norm(total, dim=1, keepdim=True)
            total = total * (magnitude.to(total.dtype).unsqueeze(1) / nonzero(norms))
        return {"weight": laid_out(module, total)}

    # ----------------------------------------------------------------------------------- files

    def tensors(self, module: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """PEFT's suffixes, but for experts."""
        if isinstance(module, DeltaExperts):
            return lora_experts.tensors(module, name)
        if isinstance(module, DeltaEmbedding):
            sides = ("lora_embedding_A", "lora_embedding_B")
            return {side: getattr(module, side)[name] for side in sides}
        if isinstance(module, DeltaRouter):
            return dict(zip(("lora_A.weight", "lora_B.weight"), module.factors(name), strict=True))
        assert isinstance(module, DeltaPlace)
        found = {}
        for side in ("lora_A", "lora_B"):
            weight = getattr(module, side)[name].weight
            assert isinstance(weight, nn.Parameter)
            found[f"{side}.weight"] = weight
        if self.use_dora:
            magnitude = module.lora_magnitude_vector[name].weight
            assert isinstance(magnitude, nn.Parameter)
            found["lora_magnitude_vector"] = magnitude
        return found

    def shapes(self, site: Site, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """See :meth:`Delta.shapes`."""
        if site.place == EXPERTS:
            return lora_experts.shapes(site, module, self.rank)
        rank = self.rank(self._named(site))
        if site.place == EMBEDDING:
            return {
                "lora_embedding_A": (rank, site.in_features),
                "lora_embedding_B": (site.out_features, rank),
            }
        found: dict[str, tuple[int, ...]] = {
            "lora_A.weight": (rank, site.in_features),
            "lora_B.weight": (site.out_features, rank),
        }
        return found | ({"lora_magnitude_vector": (site.out_features,)} if self.use_dora else {})

    def portable(
        self,
        modules: Mapping[str, nn.Module],
        name: str,
        state: Mapping[str, Tensor],
        sites: tuple[Site, ...],
        *,
        flat: bool,
    ) -> Stored:
        """See :meth:`Delta.portable`: ``s·(B A − B₀ A₀)`` is a LoRA of rank 2·r on W itself."""
        if not is_taken_out(self.init_lora_weights):
            return Stored(self, state, sites)
        found = dict(state)
        for path, module in modules.items():
            a, b = (f"{path}.{suffix}" for suffix in self.tensors(module, name))
            if isinstance(module, DeltaEmbedding):  # it started at zero, beside its own weight
                start_a, start_b = torch.zeros_like(found[a]), torch.zeros_like(found[b])
            else:
                assert isinstance(module, DeltaPlace)
                start = module.starts[name]
                start_a, start_b = start.a.to(found[a]), start.b.to(found[a])
                self._check_rest(path, module, name)
            found[a] = torch.cat([found[a], start_a])
            found[b] = torch.cat([found[b], -start_b], dim=1)
        factor = math.sqrt(2) if self.use_rslora else 2  # of alpha, so that s stays
        delta = replace(
            self,
            r=2 * self.r,
            alpha=factor * self.alpha,
            rank_pattern={key: 2 * rank for key, rank in dict(self.rank_pattern).items()},
            alpha_pattern={key: factor * x for key, x in dict(self.alpha_pattern).items()},
            init_lora_weights=True,
        )
        return Stored(delta, found, sites)

    def _check_rest(self, path: str, module: DeltaPlace, name: str) -> None:
        """Raises: CheckpointError where the weight is not what this start left of W."""
        if not module.delta_active:  # merged for good: W is gone, and nothing can be said of it
            return
        waiting = originals(module, name)["weight"]
        assert waiting is not None
        weight = laid_out(module, waiting)
        if not is_rest(module.base()[0], weight, module.starts[name], module.lora[name].scaling):
            raise CheckpointError(
                f"save: the weight at {path!r} must be the base model's without what "
                f"init_lora_weights={self.init_lora_weights!r} took out of it here, and is "
                "another: a state dict was loaded that began from another start or another base "
                "model, and a file would hold the wrong change. Attach to that base model, under "
                "the seed that training began with (torch.manual_seed before attach), load the "
                "state dict and save again; or use handle.merge_and_unload(), which is right."
            )

    def unlike_peft(
        self, model: nn.Module, sites: tuple[Site, ...], *, writing: bool
    ) -> str | None:
        """See :meth:`Delta.unlike_peft`."""
        if self.dropout and any(site.place == EXPERTS for site in sites):
            return "its LoRA on experts has no dropout"
        if writing:
            target = self.target_modules
            named = () if isinstance(target, str) else target
            layers = [site.path for site in sites if site.place not in BY_PARAMETER]
            return lora_experts.converted(model, [*layers, *named])
        return None

    def to_peft_tensors(
        self, tensors: Mapping[str, Tensor], sites: tuple[Site, ...]
    ) -> dict[str, Tensor]:
        """See :meth:`Delta.to_peft_tensors`."""
        return lora_experts.to_peft(tensors, sites)

    def from_peft_tensors(
        self, tensors: Mapping[str, Tensor], sites: tuple[Site, ...]
    ) -> dict[str, Tensor]:
        """See :meth:`Delta.from_peft_tensors`."""
        return lora_experts.from_peft(tensors, sites, self.rank)

    def to_peft(self, sites: tuple[Site, ...] = ()) -> dict[str, Any]:
        """The fields of peft's LoraConfig that this delta sets; the others keep their defaults."""
        return peft_fields(self, sites)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> LoRA:
        """See :meth:`Delta.from_peft`. Values of the wrong type are a CheckpointError too."""
        refuse_unknown_features(config)
        try:
            return cls(**arguments(config))
        except ConfigError as error:
            raise CheckpointError(f"adapter_config.json: {error}") from error


def _warn_of_ties(path: str, modules: Mapping[str, nn.Module]) -> None:
    """Say which other modules read the weight of the embedding at ``path``, without the delta."""
    weight = modules[path].weight
    tied = [
        other
        for other, module in modules.items()
        if other != path and any(p is weight for p in module._parameters.values())
    ]
    holder = path.rpartition(".")[0]
    parts = [
        other
        for other in tied
        if isinstance(modules[other], nn.Embedding)
        and len(other.rpartition(".")[0]) > len(holder)
        and (not holder or other.startswith(f"{holder}."))
    ]
    if parts:  # T5's encoder and decoder, in each of which the tokens are looked up
        warnings.warn(
            f"LoRA on {path!r}: {path!r} itself is not called where {', '.join(map(repr, parts))}, "
            "which have the same weight, look the tokens up; the delta changes nothing then. Name "
            "those in target_modules.",
            stacklevel=2,
        )
    elif tied:
        warnings.warn(
            f"LoRA on {path!r}: its weight is also that of {', '.join(map(repr, tied))}, which "
            "keeps it as it is, as in PEFT. After merge_and_unload() the two differ: set "
            "tie_word_embeddings=False in the model's config before you save it.",
            stacklevel=2,
        )
