"""Real architectures from tiny configurations, without their own dropout, and a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FAMILIES = ("bert", "gpt2", "llama", "t5", "vit")


@dataclass
class Tiny:
    """A model, what to call it with, and the modules of a head that a delta leaves whole."""

    model: nn.Module
    batch: dict[str, Tensor]
    head: tuple[str, ...] = ()

    def loss(self, model: nn.Module | None = None) -> Tensor:
        """The model's own loss on the batch, in the model's dtype."""
        model = self.model if model is None else model
        dtype = next(model.parameters()).dtype
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.batch.items()}
        loss: Tensor = model(**batch).loss
        return loss


def _tokens() -> dict[str, Tensor]:
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def _bert() -> Tiny:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    batch = _tokens() | {"labels": torch.tensor([0, 1])}
    return Tiny(BertForSequenceClassification(config), batch, ("classifier",))


def _gpt2(**settings: Any) -> Tiny:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=60,
        n_embd=24,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **settings,
    )
    return Tiny(GPT2LMHeadModel(config), _tokens())


def _llama() -> Tiny:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=60,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Tiny(LlamaForCausalLM(config), _tokens())


def _t5() -> Tiny:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=60,
        d_model=24,
        d_kv=12,
        d_ff=40,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    return Tiny(T5ForConditionalGeneration(config), _tokens())


def _vit() -> Tiny:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        image_size=16,
        patch_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    batch = {"pixel_values": pixels, "labels": torch.tensor([0, 1])}
    return Tiny(ViTForImageClassification(config), batch, ("classifier",))


_BUILDERS: dict[str, Callable[..., Tiny]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": _llama,
    "t5": _t5,
    "vit": _vit,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny() -> Callable[..., Tiny]:
    """``tiny("gpt2")`` builds that family's model, the same bits every time."""

    def build(family: str, **settings: Any) -> Tiny:
        torch.manual_seed(0)
        return _BUILDERS[family](**settings)

    return build


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tiny: Callable[..., Tiny]) -> Tiny:
    """Every family in turn."""
    return tiny(request.param)


@pytest.fixture
def shake() -> Callable[[nn.Module], None]:
    """Give every adapter matrix random values, so that B = 0 hides nothing.

    Small ones: a large random update makes the softmaxes of these models so steep that one rounding
    early on outweighs everything after it, and errors stop being comparable.
    """

    def randomise(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    noise = torch.randn(parameter.shape, generator=generator) * 0.05
                    parameter.copy_(noise)

    return randomise
