"""Models from configs (random weights) and the batches that they are stepped on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .compare.reader import Reader

Batch = dict[str, Tensor]
LABELS = 100
"""Classes of images and texts: more than the rank, so that an image's head takes a delta, too."""


@dataclass(frozen=True)
class Workload:
    """A model and its batch."""

    name: str
    build: Callable[[], nn.Module]
    vocabulary: int
    """0 for a model of images."""
    batch: int = 8
    length: int = 128
    image: int = 0
    """Side of the square images, where ``vocabulary`` is 0."""
    classes: int = 0
    """Of a model that classifies texts, which have lengths of their own; 0 for other models."""

    @property
    def tokens(self) -> int:
        """Rows of the linear layers' input in one step."""
        return self.batch * self.length

    @property
    def title(self) -> str:
        """Name and batch."""
        return f"{self.name}, {self.batch}×{self.length}"

    def inputs(self, dtype: torch.dtype = torch.float32) -> Batch:
        """What the model is called with, labels included; the same on each call."""
        generator = torch.Generator().manual_seed(0)
        if not self.vocabulary:
            size = (self.batch, 3, self.image, self.image)
            pixels = torch.randn(size, generator=generator).to(dtype)
            labels = torch.randint(0, LABELS, (self.batch,), generator=generator)
            return {"pixel_values": pixels, "labels": labels}
        ids = torch.randint(0, self.vocabulary, (self.batch, self.length), generator=generator)
        if not self.classes:
            return {"input_ids": ids, "labels": ids}
        lengths = torch.linspace(self.length / 2, self.length, self.batch).round().long()
        mask = (torch.arange(self.length) < lengths[:, None]).long()
        labels = torch.randint(0, self.classes, (self.batch,), generator=generator)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def smaller(self, batch: int, length: int) -> Workload:
        """The same model on fewer tokens a step; the length of an image model is its own."""
        return replace(self, batch=batch, length=length)


def llama() -> Workload:
    """Hidden 512, 8 layers, vocabulary 32000."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=32000, max_position_embeddings=512, use_cache=False,
    )  # fmt: skip
    return Workload("Llama 512×8", lambda: LlamaForCausalLM(config), 32000)


def bert() -> Workload:
    """Hidden 384, 6 layers, masked language model."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return Workload("BERT 384×6", lambda: BertForMaskedLM(config), config.vocab_size)


def gpt2() -> Workload:
    """Hidden 384, 6 layers: its weights lie transposed (Conv1D)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=384, n_layer=6, n_head=6, n_positions=512, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return Workload("GPT-2 384×6", lambda: GPT2LMHeadModel(config), config.vocab_size)


def vit() -> Workload:
    """Hidden 384, 6 layers, images of 176 in patches of 16: 121 patches and the class token."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6,
        image_size=176,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = LABELS
    return Workload("ViT 384×6", lambda: ViTForImageClassification(config), 0, 8, 122, 176)


WORKLOADS = {"bert": bert, "llama": llama, "gpt2": gpt2, "vit": vit}


def _bert_reader(width: int, layers: int, batch: int, length: int) -> Workload:
    """A head has 64 elements, as in all of BERT's sizes; on top is a head of the mean state."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip

    def build() -> nn.Module:
        return Reader(BertModel(config, add_pooling_layer=False), width, LABELS)

    name = f"BERT {width}×{layers}"
    return Workload(name, build, config.vocab_size, batch, length, classes=LABELS)


def bert_reader() -> Workload:
    """Hidden 384, 6 layers, as MiniLM has them."""
    return _bert_reader(384, 6, 8, 64)


def bert_base_reader() -> Workload:
    """Hidden 768, 12 layers, as BERT-base has them."""
    return _bert_reader(768, 12, 4, 128)


def llama_reader() -> Workload:
    """Hidden 512, 4 layers, four queries to a key, under the same head."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=32000, max_position_embeddings=512, use_cache=False,
    )  # fmt: skip
    return Workload(
        "Llama 512×4", lambda: Reader(LlamaModel(config), 512, LABELS), config.vocab_size, 8, 64,
        classes=LABELS,
    )  # fmt: skip


READERS = {"bert": bert_reader, "llama": llama_reader, "bert-base": bert_base_reader}
"""What methods are timed on: models whose head is small, so that the step is the encoder's."""
