"""What a model of transformers is for, by PEFT's names: its prompts are at work only under one."""

from __future__ import annotations

from torch import nn

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
