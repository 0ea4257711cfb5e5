"""Layers that a module calls with the same x: computed together, called one by one."""

from __future__ import annotations

import copy
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops.modules import APART, sharing
from deltaops.ops import delta_linear_group

# transformers renames gradient checkpointing between the versions that we support
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


class Projections(nn.Module):
    """Three layers on one x, or the third on another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(16, n) for n in (16, 8, 8))
        self.other: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        with sharing(self, (self.q, self.k, self.v)):
            q, k = self.q(x), self.k(x)
            v = self.v(x if self.other is None else self.other)
        return torch.cat([q, k, v], -1)


def adapted() -> Projections:
    model = Projections()
    deltaops.attach(model, deltaops.LoRA(r=4, target_modules="all-linear"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return model


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each group had that was run."""
    run: list[int] = []

    def counted(x: Tensor, layers: Any, **settings: Any) -> list[Tensor]:
        run.append(len(layers))
        return delta_linear_group(x, layers, **settings)

    monkeypatch.setattr(sys.modules["deltaops.modules.sharing"], "delta_linear_group", counted)
    return run


def alone(model: Projections, x: Tensor) -> Tensor:
    """What the layers give without their module, hooks and all."""
    other = x if model.other is None else model.other
    return torch.cat([model.q(x), model.k(x), model.v(other)], -1)


def test_one_group_with_the_bits_of_the_layers_alone(groups: list[int]) -> None:
    model, x = adapted(), torch.randn(5, 16, requires_grad=True)
    y = model(x)
    assert groups == [3]
    assert torch.equal(y, alone(model, x))
    (together,) = torch.autograd.grad(y.square().sum(), x)
    (apart,) = torch.autograd.grad(alone(model, x).square().sum(), x)
    torch.testing.assert_close(together, apart)


def test_layers_that_do_not_share_are_computed_alone_from_then_on(groups: list[int]) -> None:
    model, x = adapted(), torch.randn(5, 16)
    model.other = torch.randn(5, 16)
    assert torch.equal(model(x), alone(model, x))
    assert groups == [3]
    assert APART in model.__dict__
    assert torch.equal(model(x), alone(model, x))
    assert groups == [3]


def test_an_x_that_was_changed_in_between_is_another_one(groups: list[int]) -> None:
    model, x = adapted(), torch.randn(5, 16)

    def scale(module: nn.Module, given: tuple[Tensor], y: Tensor) -> None:
        x.mul_(2.0)

    handle = model.q.register_forward_hook(scale)
    start = x.clone()
    y = model(x)
    handle.remove()
    want = torch.cat([model.q(start), model.k(2 * start), model.v(2 * start)], -1)
    assert torch.equal(y, want)
    assert groups == [3]


def test_hooks_run_where_they_sit(groups: list[int]) -> None:
    model, x, seen = adapted(), torch.randn(5, 16), []
    model.k.register_forward_hook(lambda module, given, y: seen.append(y.clone()))
    y = model(x)
    assert groups == [3]
    assert torch.equal(torch.cat(seen, -1), y[:, 16:24])
    model.v.register_forward_pre_hook(lambda module, given: (given[0] + 1.0,))
    assert torch.equal(model(x), alone(model, x))
    assert groups == [3]  # what a layer reads was changed: no group


def test_a_failing_forward_leaves_nothing_behind(groups: list[int]) -> None:
    model, x = adapted(), torch.randn(5, 16)
    handle = model.k.register_forward_hook(lambda *_: (_ for _ in ()).throw(ValueError("stop")))
    with pytest.raises(ValueError, match="stop"):
        model(x)
    handle.remove()
    assert torch.equal(alone(model, x), model(x))
    assert groups == [3, 3]
    assert APART not in model.__dict__


def test_layers_that_differ_in_their_settings_are_no_group(groups: list[int]) -> None:
    model, x = adapted(), torch.randn(5, 16)
    model.k.backend = "reference"
    model(x)
    assert groups == []
    model.k.backend = "auto"
    model.v.weight.requires_grad_(True)  # plain torch runs it
    assert torch.equal(model(x), alone(model, x))
    assert groups == []


def test_grad_mode_inference_and_autocast(groups: list[int]) -> None:
    model, x = adapted(), torch.randn(5, 16)
    with torch.no_grad():
        assert torch.equal(model(x), alone(model, x))
    with torch.inference_mode():
        fresh = torch.randn(5, 16)
        assert torch.equal(model(fresh), alone(model, fresh))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert y.dtype is torch.bfloat16
        assert torch.equal(y, alone(model, x))
    assert groups == [3, 3, 3]


def test_threads_do_not_meet() -> None:
    model, results = adapted(), {}
    inputs = [torch.randn(5, 16) for _ in range(4)]

    def work(i: int) -> None:
        with torch.no_grad():
            results[i] = [model(inputs[i]) for _ in range(50)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(inputs):
        want = alone(model, x)
        assert all(torch.equal(y, want) for y in results[i])


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=100,
        )
    )  # fmt: skip


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, vocab_size=100,
                 decoder_start_token_id=0)
    )  # fmt: skip


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                   num_attention_heads=4, vocab_size=100)
    )  # fmt: skip


@pytest.mark.parametrize("through", ["attach", "accelerate"])
@pytest.mark.parametrize(
    ("build", "expected"), [(llama, {3, 2}), (bert, {3}), (t5, {3})], ids=["Llama", "BERT", "T5"]
)
def test_real_models_share_and_train_the_same(
    build: Any, expected: set[int], through: str, groups: list[int]
) -> None:
    model = build()
    if through == "attach":
        deltaops.attach(model, deltaops.LoRA(r=4, target_modules="all-linear"))
    else:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
        deltaops.accelerate(model)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    model.eval()
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.__dict__[APART] = True
    ids = torch.randint(0, 100, (2, 7))
    for _ in range(2):
        outputs = [m(input_ids=ids, labels=ids) for m in (model, twin)]
        assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert set(groups) == expected
    for out in outputs:
        out.loss.backward()
    for (name, p), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (other.grad is None), name
        if p.grad is not None and other.grad is not None:
            torch.testing.assert_close(p.grad, other.grad, rtol=1e-4, atol=1e-6)
