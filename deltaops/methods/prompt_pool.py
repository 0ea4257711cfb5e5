"""A pool of prompts: each sample gets the few whose keys are nearest to it.  [p_i … p_j  e₁ … e_T]

Prompts [N, L, d] and keys [N, e] are trained; a sample has k·L positions more, whatever N is. What
a sample is known by is frozen: the mean of its tokens' embeddings, or of the states that the model
returns for it without a prompt. :mod:`deltaops.modules.pool` has the choice and the term of
the loss by which keys learn, which joins the loss that the model returns in training: a Trainer
needs no more. A loss of your own needs ``+ deltaops.auxiliary_loss(model)``, without which keys
stay as they start. ``deltaops.choices(model)`` tells what was chosen.

A choice must not know what a language model is to predict: there, the first tokens alone choose.
Source: Wang et al. 2022 (arXiv 2112.08654); N = 10, L = 5, k = 5 and λ = ½ are theirs for images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from deltaops.errors import ConfigError
from deltaops.modules import EMBEDDINGS, PooledPrompts, add_no_more, add_to_loss, token_table
from deltaops.modules import PROMPTS as PROMPT_MODULES

from . import stack
from .base import Binding, Site
from .pool import check_pool, known_by, settings_of, start_keys
from .targets import STACKS, check_flags, normalise

PROMPTS, KEYS = "prompt_pool.prompts", "prompt_pool.keys"
STARTS = ("sample_vocab", "random")


@dataclass(frozen=True, repr=False)
class PromptPool(stack.PromptDelta):
    """Settings of a pool of prompts.

    Args:
        size: N, prompts in the pool.
        length: L, vectors of each.
        top_k: k, prompts that a sample gets; they stand in the pool's order.
        query: what a sample is known by: "embeddings", the mean of its tokens', for nothing but a
            sum; or "states", the mean of the last states of the stack without a prompt, for one
            more forward pass (without gradients, dropout and cache; with other deltas as they are).
        query_tokens: only the first so many tokens choose. None: all, and 16 where each position
            sees those before it only, so that what is to be predicted after them stays unseen.
        key_loss: λ, how strongly the chosen keys are pulled to the samples.
        balance: β, how strongly prompts that are chosen more often than others are pushed away, by
            the batch that a process sees; 0 leaves it to the samples, and then a few prompts may
            win all of them.
        prompt_tuning_init: "sample_vocab", prompts start as the embeddings of tokens drawn at
            random, or "random", as numbers as scattered as those are. None for the first, and for
            the second where no tokens are read (an image's encoder).
        target_modules: as for :class:`deltaops.Prompt`.
        exclude_modules: names or a regular expression, taken out of the targets.
        modules_to_save: modules that are trained whole and saved along, such as a new head.
        layers_to_transform: None; a prompt concerns all layers.
        layers_pattern: empty, as ``layers_to_transform``.
        autocast_adapter_dtype: train in float32 where the embeddings are float16 or bfloat16.
        task_type: as for :class:`deltaops.Prompt`.
    Raises: ConfigError.
    """

    size: int = 10
    length: int = 5
    top_k: int = 5
    query: str = EMBEDDINGS
    query_tokens: int | None = None
    key_loss: float = 0.5
    balance: float = 0.1
    prompt_tuning_init: str | None = None
    target_modules: str | tuple[str, ...] = STACKS
    exclude_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    autocast_adapter_dtype: bool = True
    task_type: str | None = None

    kind: ClassVar[str] = "prompt-pool"

    def __post_init__(self) -> None:
        """Check every value; lists become tuples."""
        check_pool(self)
        if self.prompt_tuning_init not in (*STARTS, None):
            raise ConfigError(
                f"PromptPool: prompt_tuning_init must be {' or '.join(STARTS)} or None, got "
                f"{self.prompt_tuning_init!r}."
            )
        check_flags(self, "autocast_adapter_dtype")
        stack.refuse_layers(self)
        normalise(self)

    def __repr__(self) -> str:
        """Whatever differs from its default."""
        return self._shown("size", "length", "top_k")

    def unbindable(self, module: nn.Module) -> str | None:
        """See :meth:`Delta.unbindable`."""
        reason = stack.misfit(module, self.top_k * self.length)
        if reason is None and self.prompt_tuning_init == STARTS[0] and token_table(module) is None:
            return 'it reads no tokens that prompts could start from; prompt_tuning_init="random"'
        return reason

    def bind(self, site: Site, modules: Mapping[str, nn.Module], binding: Binding) -> None:
        """See :meth:`Delta.bind`."""
        module, random = modules[site.path], binding.generator
        shapes = self.shapes(site, module)
        table, width = token_table(module), stack.width_of(site, module)
        ids: Tensor | None = None
        if table is not None and self.prompt_tuning_init != "random":
            ids = stack.drawn(table, self.size * self.length, random)
        rows = stack.start_rows(table, ids, self.size * self.length, width, random)
        device, dtype = stack.beside(module, self.autocast_adapter_dtype)
        pool = PooledPrompts(
            rows.view(shapes[PROMPTS]).to(device=device, dtype=dtype),
            start_keys(self, shapes[KEYS], table, random).to(device=device, dtype=dtype),
            **settings_of(self, module),
        ).train(module.training)
        stack.put(site, modules, binding, pool, pool.positions, self.task_type)
        add_to_loss(modules[""], pool)

    def unbind(self, site: Site, modules: Mapping[str, nn.Module]) -> None:
        """See :meth:`Delta.unbind`."""
        prompts: Any = modules[site.path]._modules.get(PROMPT_MODULES, {})
        for pool in prompts.values():
            add_no_more(modules[""], pool)
        super().unbind(site, modules)

    def tensors(self, module: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """See :meth:`Delta.tensors`."""
        pool = stack.prompt_of(module, name)
        assert isinstance(pool, PooledPrompts)
        return {PROMPTS: pool.prompts, KEYS: pool.keys}

    def shapes(self, site: Site, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """See :meth:`Delta.shapes`."""
        width = stack.width_of(site, module)
        keys = (self.size, known_by(self, site, module))
        return {PROMPTS: (self.size, self.length, width), KEYS: keys}
