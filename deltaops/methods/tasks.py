"""What PEFT's files of prompts and prefixes say of their model: its task and its sizes."""

from __future__ import annotations

from typing import Any

from torch import nn

from deltaops.modules import token_table

SEQ_CLS = "SEQ_CLS"
"""One answer for a whole sequence."""

_BY_CLASS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": SEQ_CLS,
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}
"""The end of the class's name, the longest that fits; a bare model returns features."""


def task_of(model: nn.Module) -> str | None:
    """PEFT's task type for the class of ``model``; None where its name does not say."""
    name = type(model).__name__
    ends = [end for end in _BY_CLASS if name.endswith(end)]
    return _BY_CLASS[max(ends, key=len)] if ends else None


def about(model: Any) -> dict[str, Any]:
    """Fields of PEFT's file that are the model's: without a task PEFT uses no prompt at all, and
    sizes it finds under the names of some configurations only.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    table = token_table(model)
    return {
        "task_type": task_of(model),
        "token_dim": None if table is None else table.embedding_dim,
        "num_layers": getattr(text, "num_hidden_layers", None),
        "num_attention_heads": getattr(text, "num_attention_heads", None),
    }
