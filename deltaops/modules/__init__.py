"""Modules that hold a place's parameters; surgery swaps them in by ``__class__``.

``conv1d`` and ``peft_linear`` import transformers and peft, so they are not imported here.
"""

from .adapter import AdapterSettings, Bottleneck, near_zero
from .around import Relay
from .attention_block import AttentionBlock, projections
from .attention_functions import stand_ins
from .block import (
    ActivationBlock,
    Block,
    GatedMlpBlock,
    RmsNormBlock,
    activation_of,
    named_activation,
)
from .decoded_adapter import (
    DecodedAdapters,
    DecodedBottleneck,
    FittedRows,
    RandomRows,
    adapter_rows,
)
from .dora import nonzero, row_norms
from .draws import draws_on
from .embedding import (
    DeltaEmbedding,
    become_embedding,
    start_embedding,
    unbecome_embedding,
)
from .experts import (
    DOWN,
    GATE_UP,
    DeltaExperts,
    become_experts,
    holds_experts,
    start_experts,
    unbecome_experts,
)
from .factor import Factor, start_values
from .gate import Gate, gate_of
from .holders import holds_delta
from .intrinsic import FITTED, DecodedPrompt, FittedDecoder, RandomDecoder
from .kept import (
    activate_copies,
    copies,
    follow,
    give_back,
    has_copies,
    originals,
    owners,
    train_copies,
    zeros_for,
)
from .kinds import delta_class, frozen_class, is_conv1d
from .kronecker import KroneckerSum, start_rule, start_sum
from .linear import DeltaLinear, FrozenLinear
from .loss_share import uses_loss_function
from .norm import BiasedNorm, allow_bias, disallow_bias, is_norm, lacks_bias
from .own_loss import OwnLossModel, computes_own_loss
from .place import (
    UNFROZEN,
    DeltaPlace,
    LinearPlace,
    LoraSettings,
    Start,
    become,
    features,
    plain_linear,
    unbecome,
)
from .pool import EMBEDDINGS, STATES, TEMPERATURE, Choice, Pool, add_no_more, add_to_loss
from .prefix import KEYS as PREFIX_KEYS
from .prefix import VALUES as PREFIX_VALUES
from .prefix import (
    activate_prefix,
    add_prefix,
    gate_prefix,
    has_prefix,
    head_width,
    join_encoder,
    know_tables,
    reads_prefix,
    remove_prefix,
    told_of_prefix,
)
from .prefix_encoder import PrefixEncoder, encode
from .prefix_pool import PREFIX_POOL, PooledPrefixes, add_pool, remove_pool
from .prefix_positions import shift_positions
from .prefix_switch import activate_hooks, check_attention, drop_hooks, restore, switch
from .program import Program, program_of
from .prompt import (
    PROMPTS,
    PromptedStack,
    SoftPrompt,
    add_prompt,
    exchange_prompt,
    read_prompt,
    remove_prompt,
    room_of,
    token_table,
)
from .prompt_pool import PooledPrompts
from .reading import READERS
from .router import WEIGHT as ROUTER_WEIGHT
from .router import DeltaRouter, become_router, is_router, unbecome_router
from .samples import SAMPLES, Samples, told_apart
from .sharing import APART, sharing
from .switched import Switched

__all__ = [
    "APART",
    "DOWN",
    "EMBEDDINGS",
    "FITTED",
    "GATE_UP",
    "PREFIX_KEYS",
    "PREFIX_POOL",
    "PREFIX_VALUES",
    "PROMPTS",
    "READERS",
    "ROUTER_WEIGHT",
    "SAMPLES",
    "STATES",
    "TEMPERATURE",
    "UNFROZEN",
    "ActivationBlock",
    "AdapterSettings",
    "AttentionBlock",
    "BiasedNorm",
    "Block",
    "Bottleneck",
    "Choice",
    "DecodedAdapters",
    "DecodedBottleneck",
    "DecodedPrompt",
    "DeltaEmbedding",
    "DeltaExperts",
    "DeltaLinear",
    "DeltaPlace",
    "DeltaRouter",
    "Factor",
    "FittedDecoder",
    "FittedRows",
    "FrozenLinear",
    "Gate",
    "GatedMlpBlock",
    "KroneckerSum",
    "LinearPlace",
    "LoraSettings",
    "OwnLossModel",
    "Pool",
    "PooledPrefixes",
    "PooledPrompts",
    "PrefixEncoder",
    "Program",
    "PromptedStack",
    "RandomDecoder",
    "RandomRows",
    "Relay",
    "RmsNormBlock",
    "Samples",
    "SoftPrompt",
    "Start",
    "Switched",
    "activate_copies",
    "activate_hooks",
    "activate_prefix",
    "activation_of",
    "adapter_rows",
    "add_no_more",
    "add_pool",
    "add_prefix",
    "add_prompt",
    "add_to_loss",
    "allow_bias",
    "become",
    "become_embedding",
    "become_experts",
    "become_router",
    "check_attention",
    "computes_own_loss",
    "copies",
    "delta_class",
    "disallow_bias",
    "draws_on",
    "drop_hooks",
    "encode",
    "exchange_prompt",
    "features",
    "follow",
    "frozen_class",
    "gate_of",
    "gate_prefix",
    "give_back",
    "has_copies",
    "has_prefix",
    "head_width",
    "holds_delta",
    "holds_experts",
    "is_conv1d",
    "is_norm",
    "is_router",
    "join_encoder",
    "know_tables",
    "lacks_bias",
    "named_activation",
    "near_zero",
    "nonzero",
    "originals",
    "owners",
    "plain_linear",
    "program_of",
    "projections",
    "read_prompt",
    "reads_prefix",
    "remove_pool",
    "remove_prefix",
    "remove_prompt",
    "restore",
    "room_of",
    "row_norms",
    "sharing",
    "shift_positions",
    "stand_ins",
    "start_embedding",
    "start_experts",
    "start_rule",
    "start_sum",
    "start_values",
    "switch",
    "token_table",
    "told_apart",
    "told_of_prefix",
    "train_copies",
    "unbecome",
    "unbecome_embedding",
    "unbecome_experts",
    "unbecome_router",
    "uses_loss_function",
    "zeros_for",
]
