"""Adapter folders as the trainers that people use write them, on tiny models.

A folder is saved by PEFT from a model with random factors; then its config gets the fields, values
and expressions of the trainer or the version of PEFT.
"""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
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
from torch import nn

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
PARAMETERS = {
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
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
        dtype: of the base.
    """

    name: str
    base: str = "decoder"
    config: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    edit: Callable[[Path], None] | None = None
    dtype: torch.dtype = torch.float32

    def make_base(self) -> nn.Module:
        torch.manual_seed(0)
        return BASES[self.base]().to(self.dtype).eval()

    def inputs(self) -> tuple[torch.Tensor, ...]:
        if self.base in ("decoder", "vision", "experts"):
            generator = torch.Generator().manual_seed(3)
            return (torch.randn(3, 4, generator=generator).to(self.dtype),)
        return (make_ids().clamp(min=1),)

    def save(self, base: nn.Module, path: Path) -> None:
        config = {"target_modules": SEVEN, "r": 4, "lora_alpha": 8, **self.config}
        torch.manual_seed(5)
        save_peft(peft_model(copy.deepcopy(base), **config), path)
        table = {**read_config(path), **self.fields}
        write_config(path, {key: value for key, value in table.items() if key not in self.drop})
        if self.edit is not None:
            self.edit(path)


def result(output: Any) -> torch.Tensor:
    return getattr(output, "logits", output)


# ---- what happens to folders ----


def as_pickle(path: Path) -> None:
    torch.save(read_tensors(path), path / "adapter_model.bin")
    (path / WEIGHTS).unlink()


def in_dtype(dtype: torch.dtype) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = {key: value.to(dtype) for key, value in read_tensors(path).items()}
        save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})

    return edit


def without(part: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = {key: value for key, value in read_tensors(path).items() if part not in key}
        save_file(tensors, path / WEIGHTS)

    return edit


def renamed(old: str, new: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = {key.replace(old, new): value for key, value in read_tensors(path).items()}
        save_file(tensors, path / WEIGHTS)

    return edit


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


# ---- by versions of PEFT: the fields that each introduced, at what it wrote ----

SINCE: list[tuple[str, dict[str, Any]]] = [
    ("0.2", {"enable_lora": None, "merge_weights": False}),
    ("0.3", {"init_lora_weights": True}),
    ("0.4", {"revision": None, "layers_to_transform": None, "layers_pattern": None}),
    ("0.5", {"auto_mapping": None}),
    ("0.6", {"rank_pattern": {}, "alpha_pattern": {}}),
    ("0.7", {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"}),
    ("0.8", {"use_rslora": False}),
    ("0.9", {"use_dora": False}),
    ("0.10", {"layer_replication": None}),
    ("0.12", {"runtime_config": {"ephemeral_gpu_offload": False}}),
    ("0.14", {"eva_config": None, "lora_bias": False, "exclude_modules": None}),
    ("0.15", {"corda_config": None, "trainable_token_indices": None}),
    ("0.17", {"target_parameters": None, "qalora_group_size": 16, "use_qalora": False}),
    ("0.18", {"arrow_config": None, "ensure_weight_tying": False, "peft_version": "0.18.0"}),
    ("0.19", {"alora_invocation_tokens": None, "peft_version": "0.19.1"}),
    ("0.20", {"lora_ga_config": None, "use_bdlora": None, "peft_version": "0.20.0"}),
    ("0.21", {"velora_config": None, "kasa_config": None, "peft_version": "0.21.2"}),
]
FIRST = ("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha")
FIRST += ("lora_dropout", "modules_to_save", "peft_type", "r", "target_modules", "task_type")


def versions() -> list[Folder]:
    found = []
    fields: dict[str, Any] = {}
    for version, new in SINCE:
        fields = {**fields, **new}
        later = {name for _, table in SINCE for name in table} - set(fields)
        drop = tuple(sorted(later | {"monteclora_config"}))
        if version not in ("0.2", "0.3"):
            fields.pop("enable_lora", None)
            fields.pop("merge_weights", None)
        found.append(Folder(f"PEFT {version}", fields=dict(fields), drop=drop))
    return [
        *found,
        Folder("PEFT 0.2: a pickle", fields=found[0].fields, drop=found[0].drop, edit=as_pickle),
        Folder("PEFT 0.5: a pickle", fields=found[3].fields, drop=found[3].drop, edit=as_pickle),
        Folder("PEFT 0.6: null for booleans", fields={"use_rslora": None, "lora_bias": None}),
        Folder("PEFT 1.0: fields to come", fields={"peft_version": "1.0.0", "use_next": True}),
    ]


# ---- by trainers ----

UNSLOTH = {
    "auto_mapping": {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
        "unsloth_fixed": True,
    },
    "base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit",
    "inference_mode": True,
}
UNSLOTH_VISION = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|"
    r"feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))"
)
UNSLOTH_LANGUAGE = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
    r"(?:self_attn|mlp)\.(?:(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj)))"
)


def unsloth() -> list[Folder]:
    def one(what, base="decoder", config=None, **fields):
        return Folder(f"Unsloth: {what}", base, config or {}, {**UNSLOTH, **fields})

    return [
        one("seven projections"),
        one("attention alone", config={"target_modules": ATTENTION}),
        one("rsLoRA", config={"use_rslora": True}),
        one("LoftQ's empty config", loftq_config={}),
        one("LoftQ's settings", loftq_config={"loftq_bits": 4, "loftq_iter": 1}),
        one("continued pretraining", "llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
        one("continued pretraining, tied", "tied llama", {"modules_to_save": ["lm_head"]}),
        one(
            "embed_tokens and lm_head, tied",
            "tied llama",
            {"modules_to_save": ["lm_head", "embed_tokens"]},
        ),
        one("targets lm_head", "llama", {"target_modules": [*SEVEN, "lm_head"]}),
        one("vision and language", "vision", {"target_modules": UNSLOTH_VISION}),
        one("language of a vision model", "vision", {"target_modules": UNSLOTH_LANGUAGE}),
        one("a long expression", "vision", {"target_modules": f"{UNSLOTH_LANGUAGE}|{'x' * 1200}"}),
        one("a path with a newline", base_model_name_or_path="unsloth/x\n"),
        one("experts", "mixture", PARAMETERS, lora_B_layout="rank_major"),
        one("experts, before it said their order", "mixture", PARAMETERS),
        one("bias all", config={"bias": "all"}),
        one("layers_to_transform", config={"layers_to_transform": [1]}),
    ]


SWIFT = {"base_model_name_or_path": "/root/.cache/modelscope/hub/Qwen/Qwen2___5-VL-7B-Instruct"}


def swift() -> list[Folder]:
    def one(what, base="decoder", config=None, **fields):
        return Folder(f"ms-swift: {what}", base, config or {}, {**SWIFT, **fields})

    language = r"^(model\.language_model(?=\.).*\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj))$"
    return [
        one("all-linear, resolved"),
        one("its own fields", lora_dtype=None, lorap_lr_ratio=None),
        one("its own fields, on", lora_dtype="bfloat16", lorap_lr_ratio=16.0),
        one(
            "model of a vision model",
            "vision",
            {"target_modules": r"^(model(?=\.).*\.(q_proj|v_proj))$"},
        ),
        one("language alone", "vision", {"target_modules": language}),
        one(
            "without the merger",
            "vision",
            {"target_modules": r"^(model\.visual(?=\.)(?!.*merger).*\.(qkv|proj))$"},
        ),
        one(
            "language and aligner",
            "vision",
            {"target_modules": rf"{language}|^(model\.visual\.merger(?=\.).*\.(0|2))$"},
        ),
        one("DoRA", config={"use_dora": True}),
        one("PiSSA", config={"init_lora_weights": "pissa"}),
        one("fast PiSSA", config={"init_lora_weights": "pissa_niter_4"}),
        one("OLoRA", config={"init_lora_weights": "olora"}),
        one("rsLoRA", config={"use_rslora": True}),
        one("modules_to_save", "llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        one("dropout of 1", lora_dropout=1.0),
    ]


def llama_factory() -> list[Folder]:
    def one(what, base="decoder", config=None, **fields):
        return Folder(f"LLaMA-Factory: {what}", base, config or {}, fields)

    names = "|".join(SEVEN)
    return [
        one("all"),
        one("q_proj and v_proj", config={"target_modules": ["q_proj", "v_proj"]}),
        one("frozen vision tower", "vision", {"target_modules": rf"^(?!.*visual).*(?:{names}).*"}),
        one(
            "frozen vision tower and merger",
            "vision",
            {"target_modules": rf"^(?!.*(?:visual|merger)).*(?:{names}).*"},
        ),
        one(
            "without patch_embed",
            "vision",
            {"target_modules": rf"^(?!.*patch_embed).*(?:{names}|qkv|proj).*"},
        ),
        one(
            "exclude_modules by an expression",
            "vision",
            {"target_modules": ["qkv", *SEVEN], "exclude_modules": r"^(?=.*patch_embed).*"},
        ),
        one("additional_target", "llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        one("additional_target, tied", "tied llama", {"modules_to_save": ["embed_tokens"]}),
        one("rsLoRA and dropout", config={"use_rslora": True, "lora_dropout": 0.05}),
        one("DoRA", config={"use_dora": True}),
        one("PiSSA", config={"init_lora_weights": "pissa"}),
        one("PiSSA of 16 iterations", config={"init_lora_weights": "pissa_niter_16"}),
        one("LoRA+", config={"lora_alpha": 16}, lora_plus_scale=2.0),
        one("a GPT-2", "gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        Folder("LLaMA-Factory: the output folder", edit=beside_checkpoints),
    ]


def axolotl() -> list[Folder]:
    def one(what, base="decoder", config=None, **fields):
        return Folder(f"axolotl: {what}", base, config or {}, fields)

    return [
        one("lora_target_linear"),
        one("lora_modules_to_save", "llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
        one("peft_layers_to_transform", config={"layers_to_transform": [0, 1]}),
        one("peft_layers_pattern", config={"layers_to_transform": 1, "layers_pattern": "layers"}),
        one(
            "an expression",
            "vision",
            {"target_modules": r"model.language_model.layers.[\d]+.(mlp|self_attn).(up|q|v)_proj"},
        ),
        one("experts", "experts", {"target_modules": ["up_proj"]}),
        one("router and experts", "experts", {"target_modules": ["gate", "up_proj"]}),
        one("peft_use_dora", config={"use_dora": True}),
        one("peft_use_rslora", config={"use_rslora": True}),
        one("rank_pattern", config={"rank_pattern": {r".*\.mlp\..*": 2, "k_proj": 6}}),
        one("alpha_pattern", config={"alpha_pattern": {r".*\.mlp\..*": 2, "k_proj": 6}}),
        one("qLoRA's dropout", config={"lora_dropout": 0.05}),
        one("trainable tokens", "llama", {"trainable_token_indices": [1, 2]}),
    ]


def trl() -> list[Folder]:
    def one(what, base="llama", config=None, edit=None, **fields):
        return Folder(f"TRL: {what}", base, config or {}, fields, edit=edit)

    linear = {"target_modules": "all-linear"}
    return [
        one("SFT, all-linear", config={**linear, "task_type": "CAUSAL_LM"}),
        one("SFT, chat template's tokens", config={"modules_to_save": ["lm_head", "embed_tokens"]}),
        one("SFT, tied base", "tied llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
        one("DPO", config={"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}),
        one("GRPO", config={**linear, "task_type": "CAUSAL_LM", "lora_alpha": 64}),
        one("reward model", "reward", {**linear, "task_type": "SEQ_CLS"}),
        one(
            "reward model, score",
            "reward",
            {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]},
        ),
        one("a Trainer's folder", edit=beside_checkpoints),
        one("the default targets", config={"target_modules": None, "task_type": "CAUSAL_LM"}),
        one("LoRA without regret", config={**linear, "lora_alpha": 32}),
    ]


def options() -> list[Folder]:
    """What PEFT itself offers."""

    def one(what, base="decoder", config=None, edit=None, **fields):
        return Folder(f"PEFT: {what}", base, config or {}, fields, edit=edit)

    zoo = {"target_modules": ["emb", "q_proj", "mlp", "c_attn", "conv"]}
    inits = ("gaussian", "eva", "orthogonal", "olora", "pissa", "mica", False)
    return [
        *(one(f"init {init}", config={"init_lora_weights": init}) for init in inits),
        one("every kind of layer", "zoo", zoo),
        one("every kind of layer, rsLoRA", "zoo", {**zoo, "use_rslora": True}),
        one("an embedding of a language model", "llama", {"target_modules": ["embed_tokens"]}),
        one("a classifier", "bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
        one("GPT-2, tied embedding", "gpt2", {"target_modules": ["c_attn", "wte"]}),
        *(one(f"bias {bias}", "zoo", {**zoo, "bias": bias}) for bias in ("all", "lora_only")),
        one("lora_bias", config={"lora_bias": True}),
        one("exclude_modules", config={"exclude_modules": ["layers.0.mlp.up_proj"]}),
        one("a negative alpha", config={"lora_alpha": -4}),
        one("an alpha of 0.5", config={"lora_alpha": 0.5}),
        one(
            "names escaped in alpha_pattern",
            config={"alpha_pattern": {r"^model\.layers\.0\.self_attn\.q_proj$": 3}},
        ),
        one("a lookahead in alpha_pattern", config={"alpha_pattern": {r"(?!.*mlp).*_proj": 3}}),
        one("a lookahead in rank_pattern", config={"rank_pattern": {r"(?!.*mlp).*_proj": 3}}),
        one("experts", "mixture", PARAMETERS),
        one("experts and router", "mixture", {"target_modules": "all-linear"}),
        one("experts, by 0.18", "mixture", PARAMETERS, swapped, peft_version="0.18.1"),
        one("whole paths", config={"target_modules": [p for p in DECODER if "v_proj" in p]}),
        *(
            one(f"stored in {str(d)[6:]}", edit=in_dtype(d))
            for d in (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn)
        ),
        one("rank 600", config={"r": 600}),
        one("aLoRA", "llama", {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}),
        one("replicated layers", "llama", {"layer_replication": [[0, 2], [0, 2]]}),
        one(
            "tied adapters",
            "tied llama",
            {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        ),
        one("KaSA's field", kasa_config={"beta": 1e-4, "gamma": 1e-3}),
        one("infinity in an unused field", eva_config={"rho": float("inf")}),
        one("a list for auto_mapping", auto_mapping=["x"]),
        one("one layer's tensors lost", edit=without("layers.1.mlp")),
        one("tensors of another prefix", edit=renamed("base_model.model.", "transformer.")),
        one("another method", peft_type="LOHA"),
        one("no alpha", lora_alpha=None),
    ]


def folders() -> list[Folder]:
    groups = (versions, unsloth, swift, llama_factory, axolotl, trl, options)
    return [folder for group in groups for folder in group()]
