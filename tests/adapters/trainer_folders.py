"""Adapter folders as the trainers that people use write them, and every version of PEFT."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from adapter_folders import (
    ATTENTION,
    DECODER,
    PARAMETERS,
    SEVEN,
    Folder,
    as_pickle,
    beside_checkpoints,
    in_dtype,
    renamed,
    swapped,
    without,
)


def trainer(name: str, base: str = "decoder", **every: Any) -> Callable[..., Folder]:
    """A maker of the folders of a trainer, which writes these fields in every one."""
    of_trainer = base

    def one(
        what: str,
        targets: Any = SEVEN,
        base: str = of_trainer,
        fields: dict[str, Any] | None = None,
        drop: Collection[str] = (),
        edit: Callable[[Path], None] | None = None,
        **config: Any,
    ) -> Folder:
        config = {"target_modules": targets, **config}
        return Folder(f"{name}{what}", base, config, {**every, **(fields or {})}, drop, edit)

    return one


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


def versions() -> list[Folder]:
    one, found = trainer("PEFT "), []
    fields: dict[str, Any] = {}
    for version, new in SINCE:
        fields = {**fields, **new}
        later = {name for _, table in SINCE for name in table} - set(fields)
        if version not in ("0.2", "0.3"):
            fields.pop("enable_lora", None)
            fields.pop("merge_weights", None)
        found.append(one(version, fields=dict(fields), drop={*later, "monteclora_config"}))
    first, fifth = ({"fields": each.fields, "drop": each.drop} for each in (found[0], found[3]))
    return [
        *found,
        one("0.2: a pickle", **first, edit=as_pickle),
        one("0.5: a pickle", **fifth, edit=as_pickle),
        one("0.6: null for booleans", fields={"use_rslora": None, "lora_bias": None}),
        one("1.0: fields to come", fields={"peft_version": "1.0.0", "use_next": True}),
    ]


# ---- by trainers ----

EMBEDDINGS = {"modules_to_save": ["embed_tokens", "lm_head"]}
OF_EXPERTS = {"targets": ["q_proj"], "base": "mixture", "target_parameters": PARAMETERS}
HEAD_FIRST = {"modules_to_save": ["lm_head", "embed_tokens"]}
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
    one = trainer("Unsloth: ", **UNSLOTH)
    return [
        one("seven projections"),
        one("attention alone", ATTENTION),
        one("rsLoRA", use_rslora=True),
        one("LoftQ's empty config", fields={"loftq_config": {}}),
        one("LoftQ's settings", fields={"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}),
        one("continued pretraining", base="llama", **HEAD_FIRST),
        one("continued pretraining, tied", base="tied llama", modules_to_save=["lm_head"]),
        one("embed_tokens and lm_head, tied", base="tied llama", **HEAD_FIRST),
        one("targets lm_head", [*SEVEN, "lm_head"], "llama"),
        one("vision and language", UNSLOTH_VISION, "vision"),
        one("language of a vision model", UNSLOTH_LANGUAGE, "vision"),
        one("a long expression", f"{UNSLOTH_LANGUAGE}|{'x' * 1200}", "vision"),
        one("a path with a newline", fields={"base_model_name_or_path": "unsloth/x\n"}),
        one("experts", **OF_EXPERTS, fields={"lora_B_layout": "rank_major"}),
        one("experts, before it said their order", **OF_EXPERTS),
        one("bias all", bias="all"),
        one("layers_to_transform", layers_to_transform=[1]),
    ]


def swift() -> list[Folder]:
    path = "/root/.cache/modelscope/hub/Qwen/Qwen2___5-VL-7B-Instruct"
    one = trainer("ms-swift: ", base_model_name_or_path=path)
    language = r"^(model\.language_model(?=\.).*\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj))$"
    aligner = r"^(model\.visual\.merger(?=\.).*\.(0|2))$"
    tower = r"^(model\.visual(?=\.)(?!.*merger).*\.(qkv|proj))$"
    return [
        one("all-linear, resolved"),
        one("its own fields", fields={"lora_dtype": None, "lorap_lr_ratio": None}),
        one("its own fields, on", fields={"lora_dtype": "bfloat16", "lorap_lr_ratio": 16.0}),
        one("model of a vision model", r"^(model(?=\.).*\.(q_proj|v_proj))$", "vision"),
        one("language alone", language, "vision"),
        one("without the merger", tower, "vision"),
        one("language and aligner", f"{language}|{aligner}", "vision"),
        one("DoRA", use_dora=True),
        one("PiSSA", init_lora_weights="pissa"),
        one("fast PiSSA", init_lora_weights="pissa_niter_4"),
        one("OLoRA", init_lora_weights="olora"),
        one("rsLoRA", use_rslora=True),
        one("modules_to_save", base="llama", **EMBEDDINGS),
        one("dropout of 1", fields={"lora_dropout": 1.0}),
    ]


def llama_factory() -> list[Folder]:
    one, names = trainer("LLaMA-Factory: "), "|".join(SEVEN)
    without_merger = rf"^(?!.*(?:visual|merger)).*(?:{names}).*"
    excluded = {"exclude_modules": r"^(?=.*patch_embed).*"}
    return [
        one("all"),
        one("q_proj and v_proj", ["q_proj", "v_proj"]),
        one("frozen vision tower", rf"^(?!.*visual).*(?:{names}).*", "vision"),
        one("frozen vision tower and merger", without_merger, "vision"),
        one("without patch_embed", rf"^(?!.*patch_embed).*(?:{names}|qkv|proj).*", "vision"),
        one("exclude_modules by an expression", ["qkv", *SEVEN], "vision", **excluded),
        one("additional_target", base="llama", **EMBEDDINGS),
        one("additional_target, tied", base="tied llama", modules_to_save=["embed_tokens"]),
        one("rsLoRA and dropout", use_rslora=True, lora_dropout=0.05),
        one("DoRA", use_dora=True),
        one("PiSSA", init_lora_weights="pissa"),
        one("PiSSA of 16 iterations", init_lora_weights="pissa_niter_16"),
        one("LoRA+", lora_alpha=16, fields={"lora_plus_scale": 2.0}),
        one("a GPT-2", ["c_attn", "c_proj"], "gpt2", fan_in_fan_out=True),
        one("the output folder", edit=beside_checkpoints),
    ]


def axolotl() -> list[Folder]:
    one = trainer("axolotl: ")
    expression = r"model.language_model.layers.[\d]+.(mlp|self_attn).(up|q|v)_proj"
    pattern = {r".*\.mlp\..*": 2, "k_proj": 6}
    return [
        one("lora_target_linear"),
        one("lora_modules_to_save", base="llama", **HEAD_FIRST),
        one("peft_layers_to_transform", layers_to_transform=[0, 1]),
        one("peft_layers_pattern", layers_to_transform=1, layers_pattern="layers"),
        one("an expression", expression, "vision"),
        one("experts", ["up_proj"], "experts"),
        one("router and experts", ["gate", "up_proj"], "experts"),
        one("peft_use_dora", use_dora=True),
        one("peft_use_rslora", use_rslora=True),
        one("rank_pattern", rank_pattern=pattern),
        one("alpha_pattern", alpha_pattern=pattern),
        one("qLoRA's dropout", lora_dropout=0.05),
        one("trainable tokens", base="llama", trainable_token_indices=[1, 2]),
    ]


def trl() -> list[Folder]:
    one, all_linear = trainer("TRL: ", "llama"), "all-linear"
    return [
        one("SFT, all-linear", all_linear, task_type="CAUSAL_LM"),
        one("SFT, chat template's tokens", **HEAD_FIRST),
        one("SFT, tied base", base="tied llama", **HEAD_FIRST),
        one("DPO", ["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        one("GRPO", all_linear, task_type="CAUSAL_LM", lora_alpha=64),
        one("reward model", all_linear, "reward", task_type="SEQ_CLS"),
        one("reward model, score", ["q_proj", "v_proj"], "reward", modules_to_save=["score"]),
        one("a Trainer's folder", edit=beside_checkpoints),
        one("the default targets", None, task_type="CAUSAL_LM"),
        one("LoRA without regret", all_linear, lora_alpha=32),
    ]


def options() -> list[Folder]:
    """What PEFT itself offers."""
    one = trainer("PEFT: ")
    zoo = {"targets": ["emb", "q_proj", "mlp", "c_attn", "conv"], "base": "zoo"}
    inits = ("gaussian", "eva", "orthogonal", "olora", "pissa", "mica", False)
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn)
    tied = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    escaped, lookahead = r"^model\.layers\.0\.self_attn\.q_proj$", {r"(?!.*mlp).*_proj": 3}
    tokens = {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}
    return [
        *(one(f"init {init}", init_lora_weights=init) for init in inits),
        one("every kind of layer", **zoo),
        one("every kind of layer, rsLoRA", **zoo, use_rslora=True),
        one("an embedding of a language model", ["embed_tokens"], "llama"),
        one("a classifier", ["query", "value"], "bert", task_type="SEQ_CLS"),
        one("GPT-2, tied embedding", ["c_attn", "wte"], "gpt2"),
        *(one(f"bias {bias}", **zoo, bias=bias) for bias in ("all", "lora_only")),
        one("lora_bias", lora_bias=True),
        one("exclude_modules", exclude_modules=["layers.0.mlp.up_proj"]),
        one("a negative alpha", lora_alpha=-4),
        one("an alpha of 0.5", lora_alpha=0.5),
        one("names escaped in alpha_pattern", alpha_pattern={escaped: 3}),
        one("a lookahead in alpha_pattern", alpha_pattern=lookahead),
        one("a lookahead in rank_pattern", rank_pattern=lookahead),
        one("experts", **OF_EXPERTS),
        one("experts and router", "all-linear", "mixture"),
        one("experts, by 0.18", **OF_EXPERTS, fields={"peft_version": "0.18.1"}, edit=swapped),
        one("whole paths", [path for path in DECODER if "v_proj" in path]),
        *(one(f"stored in {str(dtype)[6:]}", edit=in_dtype(dtype)) for dtype in dtypes),
        one("rank 600", r=600),
        one("aLoRA", base="llama", **tokens),
        one("replicated layers", base="llama", layer_replication=[[0, 2], [0, 2]]),
        one("tied adapters", base="tied llama", **tied),
        one("KaSA's field", fields={"kasa_config": {"beta": 1e-4, "gamma": 1e-3}}),
        one("infinity in an unused field", fields={"eva_config": {"rho": float("inf")}}),
        one("a list for auto_mapping", fields={"auto_mapping": ["x"]}),
        one("one layer's tensors lost", edit=without("layers.1.mlp")),
        one("tensors of another prefix", edit=renamed("base_model.model.", "transformer.")),
        one("another method", fields={"peft_type": "LOHA"}),
        one("no alpha", fields={"lora_alpha": None}),
    ]


def folders() -> list[Folder]:
    groups = (versions, unsloth, swift, llama_factory, axolotl, trl, options)
    return [folder for group in groups for folder in group()]
