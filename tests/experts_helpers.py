"""Tiny mixtures of transformers, with PEFT's adapters on their experts."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
_OF_TYPE = {
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    "qwen2_moe": {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 12,
    },
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 12},
    "granitemoe": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 12},
}


def mixture(kind="qwen3_moe", dtype=torch.float64, seed=0, **fields):
    """A tiny causal language model of a type of transformers."""
    sizes = {**_SIZES, **_OF_TYPE[kind], **fields}
    config = AutoConfig.for_model(kind, **sizes, experts_implementation="eager")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def some_ids(seed=1, shape=(2, 7)):
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(seed))
