"""The demo's base model: a small GPT-2 and its tokenizer, trained on Python's English help."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .corpus import english
from .loop import Point, Schedule, make_optimizer, train
from .read import Example
from .tokens import Order, pack_text

VOCABULARY, WIDTH, LAYERS, HEADS, POSITIONS = 1024, 128, 4, 4, 256
BATCH, LENGTH, RATE, SEED = 16, 128, 3e-3, 0
END = "<|endoftext|>"


def build(folder: Path, steps: int, on_step: Callable[[Point], None]) -> None:
    """Train the model and leave it in ``folder`` in transformers' format, whole or not at all."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = _tokenizer(english())
    torch.manual_seed(SEED)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=POSITIONS, n_embd=WIDTH, n_layer=LAYERS,
        n_head=HEADS, bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    data = pack_text([Example(english(), None, 1)], tokenizer, LENGTH)
    optimizer = make_optimizer([{"params": list(model.parameters())}], RATE)
    order = Order(len(data), BATCH, SEED)
    train(model, data, order, optimizer, Schedule(steps, RATE), on_step=on_step)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".demo-", dir=folder.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.replace(folder)
    finally:
        if scratch.exists():
            shutil.rmtree(scratch)


def _tokenizer(text: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator(text.split("\n\n"), trainer)
    kind: Any = PreTrainedTokenizerFast
    return kind(tokenizer_object=raw, eos_token=END, pad_token=END)
