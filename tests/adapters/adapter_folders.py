"""Adapter folders on tiny models, as trainers write them; trainer_folders.py has the list.

A folder is saved by PEFT from a model with random factors; then its config gets the fields, values
and expressions of the trainer or the version of PEFT.
"""

import copy
import shutil
from collections import ChainMap
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapter_helpers import (
    WEIGHTS,
    Tree,
    make_ids,
    make_zoo,
    peft_model,
    read_config,
    read_tensors,
    save_peft,
    write_config,
)
from mixture_helpers import mixture
from safetensors.torch import save_file
from torch import Tensor, nn

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
SEVEN = ATTENTION + MLP


def _layers(prefix):
    for index in range(2):
        yield from (f"{prefix}.layers.{index}.self_attn.{name}" for name in ATTENTION)
        yield from (f"{prefix}.layers.{index}.mlp.{name}" for name in MLP)


DECODER = [*_layers("model"), "lm_head"]
VISION = [
    "model.visual.patch_embed.proj",
    "model.visual.blocks.0.attn.qkv",
    "model.visual.blocks.0.attn.proj",
    "model.visual.merger.mlp.0",
    *_layers("model.language_model"),
    "lm_head",
]
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
EXPERTS = [
    "model.layers.0.mlp.gate",
    *(f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(3)),
]


def _transformers(kind, **changes) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2)
        return transformers.GPT2LMHeadModel(config)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, **changes}
    if kind == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    config = transformers.LlamaConfig(num_key_value_heads=1, pad_token_id=0, **sizes)
    if kind == "reward":
        return transformers.LlamaForSequenceClassification(config)
    return transformers.LlamaForCausalLM(config)


BASES: dict[str, Callable[[], nn.Module]] = {
    "decoder": lambda: Tree(DECODER),
    "vision": lambda: Tree(VISION),
    "experts": lambda: Tree(EXPERTS),
    "mixture": mixture,
    "zoo": make_zoo,
    "llama": lambda: _transformers("llama", tie_word_embeddings=False),
    "tied llama": lambda: _transformers("llama", tie_word_embeddings=True),
    "reward": lambda: _transformers("reward"),
    "gpt2": lambda: _transformers("gpt2"),
    "bert": lambda: _transformers("bert", num_labels=3),
}


@dataclass
class Folder:
    """One folder.

    Attributes:
        name: "trainer: what is special".
        base: which of BASES.
        config: arguments of PEFT's LoraConfig.
        fields: changes of adapter_config.json, after it was saved; a value of None stays null.
        drop: fields that it loses.
        edit: of the saved folder.
    """

    name: str
    base: str
    config: dict[str, Any]
    fields: dict[str, Any]
    drop: Collection[str]
    edit: Callable[[Path], None] | None

    def make_base(self) -> nn.Module:
        torch.manual_seed(0)
        return BASES[self.base]().float().eval()

    def inputs(self) -> tuple[Tensor, ...]:
        if self.base in ("decoder", "vision", "experts"):
            generator = torch.Generator().manual_seed(3)
            return (torch.randn(3, 4, generator=generator),)
        return (make_ids().clamp(min=1),)

    def save(self, base: nn.Module, path: Path) -> None:
        torch.manual_seed(5)
        config = {"r": 4, "lora_alpha": 8, **self.config}
        save_peft(peft_model(copy.deepcopy(base), **config), path)
        table = {**read_config(path), **self.fields}
        write_config(path, {key: value for key, value in table.items() if key not in self.drop})
        if self.edit is not None:
            self.edit(path)


def result(output: Any) -> Tensor:
    return getattr(output, "logits", output)


# ---- what happens to folders ----


def as_pickle(path: Path) -> None:
    torch.save(read_tensors(path), path / "adapter_model.bin")
    (path / WEIGHTS).unlink()


def each(change: Callable[[str, Tensor], dict[str, Tensor]]) -> Callable[[Path], None]:
    """What becomes of each tensor: none, one or several of new names and values."""

    def edit(path: Path) -> None:
        changed = [change(key, value) for key, value in read_tensors(path).items()]
        save_file(dict(ChainMap(*changed)), path / WEIGHTS, metadata={"format": "pt"})

    return edit


def in_dtype(dtype: torch.dtype) -> Callable[[Path], None]:
    return each(lambda key, value: {key: value.to(dtype)})


def without(part: str) -> Callable[[Path], None]:
    return each(lambda key, value: {} if part in key else {key: value})


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return each(lambda key, value: {key.replace(old, new): value})


def swapped(path: Path) -> None:
    """Factors of 5 experts as PEFT wrote them before 0.19.1: A_e for B_e^T, and B_e for A_e^T."""
    tensors = read_tensors(path)
    for key in [key for key in tensors if "experts" in key and "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        lora_a, lora_b = tensors[key], tensors[other]
        tensors[key] = lora_b.view(len(lora_b), -1, 5).permute(2, 1, 0).reshape(-1, len(lora_b))
        of_a = lora_a.view(5, -1, lora_a.shape[1]).permute(2, 1, 0)
        tensors[other] = of_a.reshape(lora_a.shape[1], -1).contiguous()
    save_file(tensors, path / WEIGHTS)


def beside_checkpoints(path: Path) -> None:
    """What a Trainer's output folder holds, too."""
    (path / "checkpoint-10").mkdir()
    shutil.copy(path / WEIGHTS, path / "checkpoint-10" / WEIGHTS)
    for name in ("training_args.bin", "tokenizer.json", "trainer_state.json"):
        (path / name).write_bytes(b"{}")
