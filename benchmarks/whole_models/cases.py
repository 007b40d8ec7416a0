"""The models: MiniLM with its own weights, two Llamas and a GPT-2 of random ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import minilm
from . import quantized

# 4 layers of 1024, and the shape of a Llama of 135M parameters: 30 layers of 576.
_LLAMA, _LLAMA_135M = "Llama", "Llama 135M"
# 2048 tokens each.
BATCH = {"MiniLM": 16, _LLAMA: 4, _LLAMA_135M: 4, "GPT-2": 4}
LENGTH = {"MiniLM": 128, _LLAMA: 512, _LLAMA_135M: 512, "GPT-2": 512}
_SHALLOW = [model for model in BATCH if model != _LLAMA_135M]
# How the paths of the layers end.
_LLAMA_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_ATTENTION = {
    "MiniLM": ["query", "key", "value", "attention.output.dense"],
    _LLAMA: _LLAMA_ATTENTION,
    _LLAMA_135M: _LLAMA_ATTENTION,
    "GPT-2": ["attn.c_attn", "attn.c_proj"],
}
_LLAMA_MLP = ["gate_proj", "up_proj", "down_proj"]
_MLP = {
    "MiniLM": ["intermediate.dense", "output.dense"],
    _LLAMA: _LLAMA_MLP,
    _LLAMA_135M: _LLAMA_MLP,
    "GPT-2": ["mlp.c_fc", "mlp.c_proj"],
}
# GPT-2 has transformers' Conv1D in the place of nn.Linear; quantised all are of bitsandbytes.
_LINEAR_KINDS = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")


@dataclass(frozen=True)
class Case:
    """One model and the layers of it that get adapters."""

    model: str  # a key of BATCH
    layers: str  # "attention" or "all linear"
    dtype: str = "bfloat16"  # of the base
    form: str = ""  # of its linear layers, one of quantized.FORMS, or dense

    @property
    def id(self) -> str:
        return f"{self.model} {self.layers} {self.form or self.dtype}"

    def is_target(self, path: str, module: nn.Module) -> bool:
        """Whether the module at this path gets an adapter."""
        kinds = [*_ATTENTION[self.model], *(_MLP[self.model] if self.layers != "attention" else ())]
        return type(module).__name__ in _LINEAR_KINDS and path.endswith(
            tuple(f".{kind}" for kind in kinds)
        )


def all_cases() -> list[Case]:
    """All models, attention only and all linear layers; of the deep one all linear layers only."""
    cases = [Case(model, layers) for model in _SHALLOW for layers in ("attention", "all linear")]
    return [*cases, Case(_LLAMA_135M, "all linear")]


def quantized_cases() -> list[Case]:
    """All models over quantised bases, where bitsandbytes is installed."""
    forms = quantized.FORMS if quantized.is_available() else ()
    return [Case(model, "all linear", form=form) for form in forms for model in _SHALLOW]


def mixed_cases() -> list[Case]:
    """Those that are measured with an adapter for each sample, too."""
    return [Case("MiniLM", "all linear"), Case("Llama", "all linear")]


def base_model(case: Case) -> nn.Module:
    """The frozen model in training mode; dropout of its own is off, so that the floor is low."""
    model = _dense_model(case)
    return quantized.quantize(model, case.form, case.is_target) if case.form else model


def _dense_model(case: Case) -> nn.Module:
    dtype = getattr(torch, case.dtype)
    if case.model == "MiniLM":
        return minilm.encoder(dtype).train()
    import transformers

    torch.manual_seed(0)
    if case.model == "GPT-2":
        config = transformers.GPT2Config(
            n_embd=768,
            n_layer=4,
            n_head=12,
            n_positions=512,
            vocab_size=4096,
            use_cache=False,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        model = transformers.GPT2Model(config).to(dtype)
    else:
        config = llama_config(case.model == _LLAMA_135M, vocab_size=4096)
        model = transformers.LlamaModel(config).to(dtype)
    return model.train().requires_grad_(False)


def llama_config(is_deep: bool, vocab_size: int) -> Any:
    """Of transformers: 4 layers of 1024, or 30 of 576."""
    import transformers

    return transformers.LlamaConfig(
        hidden_size=576 if is_deep else 1024,
        intermediate_size=1536 if is_deep else 2816,
        num_hidden_layers=30 if is_deep else 4,
        num_attention_heads=9 if is_deep else 16,
        num_key_value_heads=3 if is_deep else 16,
        vocab_size=vocab_size,
        use_cache=False,
    )


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
