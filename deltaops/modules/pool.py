"""What a pool chooses by: each sample gets those of N items whose keys are nearest to it.

    cᵢ = cos(q, kᵢ)        q [e] of the sample, keys k [N, e]; the items of the top-k are its own
    loss += λ · mean over the chosen of (1 − cᵢ)  +  β · (N · Σᵢ fᵢ Pᵢ − 1)

q is what the frozen model makes of the sample and gets no gradient. Choosing gives keys none
either: they learn by the last line, which pulls the chosen ones to the samples that chose them,
and, lest one item win everything, weighs how often each is chosen in the batch, f, by what a
softmax of c gives it, P (0 where all are chosen alike). Items learn by the task's own loss: they
are prompts (:mod:`.prompt_pool`) or prefixes (:mod:`.prefix_pool`).
Source: Wang et al. 2022 (arXiv 2112.08654), eq. 3 and 5; the balance is that of experts, Fedus et
al. 2021 (arXiv 2101.03961), eq. 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaops.ops.paths import no_autocast

from .loss_share import loss_share

TEMPERATURE = 0.1
"""Of the softmax over cosines in the balance term."""
EMBEDDINGS, STATES = "embeddings", "states"
"""What q is the mean of: the tokens' embeddings, or what the stack returns without a prompt."""


class Choice(NamedTuple):
    """What the last batch chose."""

    indices: Tensor
    """``[B, k]``, rising."""
    similarities: Tensor
    """Cosines to all keys, ``[B, N]``."""


class Pool(nn.Module):
    """N keys, and the record of what was chosen by them; what holds the items is a subclass."""

    def __init__(
        self,
        keys: Tensor,
        *,
        top_k: int,
        source: str,
        tokens: int | None,
        key_loss: float,
        balance: float,
    ) -> None:
        """Hold ``keys [N, e]``.

        Args:
            keys: of the items.
            top_k: items of a sample.
            source: :data:`EMBEDDINGS` or :data:`STATES`.
            tokens: q is of the first so many of a sample; None for all.
            key_loss: λ.
            balance: β.
        """
        super().__init__()
        self.keys = nn.Parameter(keys)
        self.top_k, self.source, self.tokens = top_k, source, tokens
        self.key_loss, self.balance = key_loss, balance
        self.forget()

    def forget(self) -> None:
        """Start the record anew."""
        self.last: Choice | None = None
        self.usage: Tensor | None = None
        """How often each item was chosen, int64 ``[N]``."""
        self.auxiliary: Tensor | None = None
        """What the last pass in training adds to the loss."""
        self.due = False
        """Whether nobody has added it yet."""

    @property
    def told(self) -> str:
        """For the report."""
        size = len(self.keys)
        return f"{self.top_k} of {size} in a pool, chosen for each sample by its {self.source}"

    def choose(self, query: Tensor) -> Tensor:
        """``q [B, e]`` → the items of each sample, rising ``[B, k]``.

        The choice is kept in :attr:`last`, but for a compiled model's.
        """
        similarities = self.similarities(query)
        nearest = similarities.detach().topk(self.top_k).indices
        indices = nearest.sort().values  # an item keeps its place among those beside it
        counts = indices.new_zeros(len(self.keys))
        counts = counts.index_add(0, indices.flatten(), torch.ones_like(indices.flatten()))
        self.due = self.training
        if self.training:
            self.auxiliary = self.to_add(similarities, indices, counts)
        if not torch.compiler.is_compiling():
            self.last = Choice(indices, similarities.detach())
            used = self.usage
            self.usage = counts if used is None or used.device != counts.device else used + counts
        return indices

    def similarities(self, query: Tensor) -> Tensor:
        """Cosines ``[B, N]`` of ``q [B, e]`` and the keys, in float32 at least."""
        wide = torch.promote_types(query.dtype, torch.float32)
        with no_autocast(query.device):
            q = functional.normalize(query.detach().to(wide), dim=-1)
            return q @ functional.normalize(self.keys.to(wide), dim=-1).T

    def to_add(self, similarities: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
        """What the choice adds to the loss, a scalar."""
        pulled = (1 - similarities.gather(1, indices)).mean()
        chances = (similarities / TEMPERATURE).softmax(-1).mean(0)
        shares = counts / counts.sum()
        return self.key_loss * pulled + self.balance * (len(shares) * (shares * chances).sum() - 1)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle, which has chosen nothing; a node of a graph can be neither."""
        return self.__dict__ | {"last": None, "usage": None, "auxiliary": None, "due": False}


_READ = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
"""What a stack is given to know its tokens by."""


def query_of(
    pool: Pool,
    stack: nn.Module,
    embeds: Tensor,
    given: Mapping[str, Any],
    names: Sequence[str],
    forward: Callable[[dict[str, Any]], Any],
) -> Tensor:
    """What the samples of a call are known by, ``q [B, e]``.

    Args:
        pool: that is to choose.
        stack: the stack of blocks that is called.
        embeds: of its tokens ``[B, T, d]``.
        given: what it is called with.
        names: of what its forward takes.
        forward: the stack without what the pool adds, for such arguments.
    """
    states, mask = embeds, given.get("attention_mask")
    if pool.source == STATES:
        asked = {name: given[name] for name in _READ if name in given}
        asked |= {"use_cache": False} if "use_cache" in names else {}
        asked |= {} if returns_dict(stack, asked) else {"return_dict": True}
        with evaluated(stack):
            states = forward(asked).last_hidden_state
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        mask = None  # who calls refuses one that is not of tokens
    return mean_of(states.detach(), mask, pool.tokens)


def returns_dict(stack: Any, given: Mapping[str, Any]) -> bool:
    """Whether the forward of ``stack`` is to return its results by name."""
    asked = given.get("return_dict")
    if asked is None:
        asked = getattr(getattr(stack, "config", None), "return_dict", True)
    return bool(asked)


def mean_of(states: Tensor, mask: Tensor | None, tokens: int | None) -> Tensor:
    """The mean ``[B, e]`` of a sample's first ``tokens``, of all without a number.

    Args:
        states: ``[B, T, e]``.
        mask: ``[B, T]``, 0 on padding; None without any.
        tokens: a count.
    """
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    if mask is None:
        return wide[:, :tokens].mean(1)
    counted = mask.ne(0)
    if tokens is not None:
        counted = counted & (counted.cumsum(1) <= tokens)
    weights = counted.to(wide.dtype)
    # a row of padding alone has a mean of nothing, which is zero
    with no_autocast(wide.device):
        total = torch.einsum("bt,bte->be", weights, wide)
    return total / weights.sum(1, keepdim=True).clamp(min=1)


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """Inside, without gradients, and what is drawn in training is not."""
    trained = [part for part in module.modules() if part.training]
    for part in trained:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part in trained:
            part.training = True


class AddsToLoss:
    """The hook after the forward pass of a whole model: a pool's term joins the loss that it
    returns, as transformers' mixtures have it, so that whatever scales that scales both."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        """Add the term to the loss in ``out``, where there is one; None leaves ``out`` itself."""
        extra = self.pool.auxiliary
        if not self.pool.due or extra is None:
            return None
        self.pool.due = False
        extra = extra * loss_share(module, kwargs)
        if isinstance(out, dict) and isinstance(out.get("loss"), Tensor):
            out["loss"] = out["loss"] + extra
        elif isinstance(out, tuple) and isinstance(getattr(out, "loss", None), Tensor):
            return out._replace(loss=out.loss + extra)  # type: ignore[attr-defined]  # a NamedTuple
        elif type(out) is tuple and kwargs.get("labels") is not None and out[0].dim() == 0:
            return (out[0] + extra, *out[1:])  # return_dict=False
        return None


def add_to_loss(model: nn.Module, pool: Pool) -> None:
    """Have the loss that ``model`` returns in training hold the term of ``pool``."""
    model.register_forward_hook(AddsToLoss(pool), with_kwargs=True)


def add_no_more(model: nn.Module, pool: Pool) -> None:
    """Undo :func:`add_to_loss`."""
    for key, hook in list(model._forward_hooks.items()):
        if isinstance(hook, AddsToLoss) and hook.pool is pool:
            del model._forward_hooks[key]
            model._forward_hooks_with_kwargs.pop(key, None)
