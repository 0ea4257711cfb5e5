"""Every architecture that a method must know, tiny, from a configuration without dropout.

They need transformers, which is loaded when the first one is built.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HIDDEN, WIDE, BLOCKS = 24, 40, 2
_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
}
_DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_TOKENS = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_IMAGE = {"image_size": 16, "patch_size": 8}
_DISTIL = {
    "dim": HIDDEN,
    "hidden_dim": WIDE,
    "n_layers": BLOCKS,
    "n_heads": 2,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
}
_GPT2 = {"n_embd": HIDDEN, "n_inner": WIDE, "n_layer": BLOCKS, "n_head": 2, "n_positions": 32}
_GATED = {"dropout_rate": 0.0, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
_T5 = {"d_model": HIDDEN, "d_kv": 12, "d_ff": WIDE, "num_layers": BLOCKS, "num_heads": 2}

_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _SIZES | _DRY | _TOKENS),
    "roberta": ("Roberta", _SIZES | _DRY | _TOKENS),
    "distilbert": ("DistilBert", _DISTIL | _TOKENS),
    "gpt2": ("GPT2", _GPT2 | _TOKENS | {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}),
    "llama": ("Llama", _SIZES | _TOKENS | {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3", _SIZES | _TOKENS | {"num_key_value_heads": 1, "head_dim": 12}),
    "t5": ("T5", _T5 | _TOKENS | _GATED),
    "vit": ("ViT", _SIZES | _DRY | _IMAGE),
    "clip vision": ("CLIPVision", _SIZES | _IMAGE),
}  # fmt: skip
ARCHITECTURES = tuple(_SETTINGS)
_CLASSIFIER, _IMAGES = "ForSequenceClassification", "ForImageClassification"
HEADS = {
    "bert": _CLASSIFIER, "roberta": _CLASSIFIER, "distilbert": _CLASSIFIER,
    "gpt2": "LMHeadModel", "llama": "ForCausalLM", "qwen3": "ForCausalLM",
    "t5": "ForConditionalGeneration", "vit": _IMAGES, "clip vision": _IMAGES,
}  # fmt: skip
"""What the class of a model with a loss is called after its family; see :func:`labelled`."""


def new_head(name: str) -> tuple[str, ...]:
    """The head of ``HEADS`` that no pre-training knows, for ``modules_to_save``; of a language
    model none."""
    return ("classifier",) if HEADS[name] in (_CLASSIFIER, _IMAGES) else ()


def build(name: str, *, head: str = "Model", **settings: Any) -> nn.Module:
    """The model, the same bits every time, its norms not the plain ones.

    Args:
        name: one of ``ARCHITECTURES``.
        head: what its class is called after the family, such as "ForCausalLM"; by default bare.
        **settings: of its configuration.
    """
    import transformers

    family, defaults = _SETTINGS[name]
    config = getattr(transformers, f"{family}Config")(**defaults | settings)
    if (family, head) == ("CLIPVision", _IMAGES):  # its class is named after the whole of CLIP
        family, config = "CLIP", transformers.CLIPConfig(vision_config=config.to_dict())
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{family}{head}")(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path.lower() or parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def batch(name: str, rows: int = 2) -> dict[str, Tensor]:
    """What to call the model with."""
    random = torch.Generator().manual_seed(1)
    if name in ("vit", "clip vision"):
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=random)}
    ids = torch.randint(3, 60, (rows, 7), generator=random)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})


def labelled(name: str, rows: int = 2) -> dict[str, Tensor]:
    """The same for the model with a head of ``HEADS``, with what its loss needs."""
    inputs = batch(name, rows)
    if HEADS[name] in (_CLASSIFIER, _IMAGES):
        return inputs | {"labels": torch.arange(rows) % 2}
    inputs.pop("decoder_input_ids", None)  # made of the labels
    return inputs | {"labels": inputs["input_ids"]}


def answer(name: str, model: nn.Module) -> Tensor:
    """The last hidden states ``[2, tokens, HIDDEN]``."""
    dtype = next(p for p in model.parameters() if p.is_floating_point()).dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch(name).items()}
    found: Tensor = model(**inputs).last_hidden_state
    return found
