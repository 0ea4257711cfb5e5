"""Cases, tolerances and comparison, shipped so that other backends can hold themselves to them."""

from .adapter_cases import (
    BOTTLENECK_CASES,
    NORM_BIAS_CASES,
    BottleneckCase,
    BottleneckTensors,
    NormBiasCase,
)
from .attention_cases import ATTENTION_CASES, AttentionCase, AttentionTensors
from .cases import DELTA_LINEAR_CASES, ROUTED_CASES, DeltaLinearCase, DeltaLinearTensors
from .compare import assert_accurate, relative_error
from .cross_entropy_cases import CROSS_ENTROPY_CASES, CrossEntropyCase
from .gated_cases import GATED_CASES, GatedCase
from .group_cases import GROUP_CASES, GroupCase
from .grouped import GroupedPlan, Grouping
from .prefix_attention_cases import (
    BIASED_PREFIX_CASES,
    PREFIX_ATTENTION_CASES,
    PrefixAttentionCase,
    PrefixAttentionTensors,
)
from .rotary_cases import ROTARY_CASES, RotaryCase
from .tolerances import bound, rounding

__all__ = [
    "ATTENTION_CASES",
    "BIASED_PREFIX_CASES",
    "BOTTLENECK_CASES",
    "CROSS_ENTROPY_CASES",
    "DELTA_LINEAR_CASES",
    "GATED_CASES",
    "GROUP_CASES",
    "NORM_BIAS_CASES",
    "PREFIX_ATTENTION_CASES",
    "ROTARY_CASES",
    "ROUTED_CASES",
    "AttentionCase",
    "AttentionTensors",
    "BottleneckCase",
    "BottleneckTensors",
    "CrossEntropyCase",
    "DeltaLinearCase",
    "DeltaLinearTensors",
    "GatedCase",
    "GroupCase",
    "GroupedPlan",
    "Grouping",
    "NormBiasCase",
    "PrefixAttentionCase",
    "PrefixAttentionTensors",
    "RotaryCase",
    "assert_accurate",
    "bound",
    "relative_error",
    "rounding",
]
