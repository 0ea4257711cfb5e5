"""Whether a backward pass runs, and a torch that does not say it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import deltaops
from deltaops import Prefix
from deltaops.errors import AttachError
from deltaops.modules.backward import backward_runs
from deltaops.testing.architectures import build


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_it_runs_while_a_checkpoint_runs_its_function_again(reentrant: bool) -> None:
    seen: list[bool] = []

    def twice(x: Tensor) -> Tensor:
        seen.append(backward_runs())
        return x.sin()

    x = torch.randn(3, requires_grad=True)
    y = checkpoint(twice, x, use_reentrant=reentrant)
    assert not backward_runs()
    y.sum().backward()
    assert seen == [False, True]
    assert not backward_runs()


@pytest.mark.parametrize(
    ("ask", "found"), [(None, "has none"), (lambda: "no", "has one that returns 'no'")]
)
def test_a_torch_that_does_not_say_it_is_refused_before_anything_changes(
    ask: object, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    kinds = [type(module) for module in model.modules()]
    monkeypatch.setattr("torch._C._current_graph_task_id", ask)
    with pytest.raises(AttachError, match=f"{found}. Install a torch"):
        deltaops.attach(model, Prefix(reparameterised=True))
    assert [type(module) for module in model.modules()] == kinds
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
