"""Tiny mixtures of transformers, with PEFT's adapters on their experts."""

import copy
import json
import shutil
import warnings

import peft
import torch
from safetensors.torch import load_file, save_file
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
    sizes = {**_SIZES, **_OF_TYPE.get(kind, {}), **fields}
    config = AutoConfig.for_model(kind, **sizes, experts_implementation="eager")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def some_ids(seed=1, shape=(2, 7)):
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(seed))


KINDS = tuple(_OF_TYPE)
_OF_TYPE["deepseek_v3"] = {  # a dense layer, and one with shared experts
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}


@torch.no_grad()
def randomized(model, seed=5):
    """The model with random factors in all its adapters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def peft_mixture(kind="qwen3_moe", target_modules=("q_proj",), target_parameters=None, **words):
    """PEFT's model of a tiny mixture, with a random adapter of rank 3 and alpha 6 on the experts
    too; words are of the model, and use_rslora."""
    if target_modules != "all-linear":
        target_modules = list(target_modules)
        target_parameters = target_parameters or ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=target_modules,
        target_parameters=target_parameters,
        use_rslora=words.pop("use_rslora", False),
    )
    return randomized(peft.get_peft_model(mixture(kind, **words), config))


def logits(model):
    return model(some_ids()).logits


def loaded_by_peft(base, folder):
    with warnings.catch_warnings():  # PEFT looks for its patterns' keys among modules alone
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)


def edit(folder, tensors=None, **fields):
    """Rewrites a folder's tensors by a function, and fields of its config."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    if tensors is not None:
        path = folder / "adapter_model.safetensors"
        found = load_file(path)
        tensors(found)
        save_file({key: value.contiguous() for key, value in found.items()}, path)


def edited(source, folder, tensors=None, **fields):
    """`edit` of a copy; returns the folder."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    edit(folder, tensors, **fields)
    return folder


def put(key, *shape):
    """For `edit`: ones under a key."""
    return lambda tensors: tensors.__setitem__(key, torch.ones(shape))
