"""adapter_config.json: PEFT's LoraConfig. Every field that changes the result is understood.

Fields and defaults are those of PEFT 0.21.2. The tensors determine which layers have an adapter,
and with which rank. So the fields that choose layers, like those that describe the base, are kept
as information. Any other field is applied or must be off; an unknown field is ignored with a
warning, as in PEFT.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .config_fields import Fields, as_alpha, as_rank
from .errors import AdapterError, shown
from .strict_json import parse_json

# The version of PEFT whose format is written.
PEFT_VERSION = "0.21.2"

_APPLIED = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "lora_bias",
    "bias",
    "init_lora_weights",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    "peft_version",
    "lora_B_layout",
}
_INFORMATION = {
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "base_model_name_or_path",
    "revision",
    "task_type",
}
# Fields that are not needed: which layers (known from the tensors), which classes to import,
# training or inference, the layout of the weight (known from the module's class), and settings of
# the first initialization, which is over.
_WITHOUT_EFFECT = {
    "layers_pattern",
    "auto_mapping",
    "inference_mode",
    "fan_in_fan_out",
    "runtime_config",
    "qalora_group_size",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
}
# Variants of LoRA and their settings, with the defaults where these are not empty.
_REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "velora_config": "VeLoRA",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow routing",
    "monteclora_config": "MonteCLoRA",
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trainable tokens",
    "megatron_config": "Megatron's parallel layers",
    "megatron_core": "Megatron's parallel layers",
    "ensure_weight_tying": "tied adapters",
}
_DEFAULTS = {"megatron_core": "megatron.core"}

_LAYOUTS = ("rank_major", "grouped_by_expert")

# Values of init_lora_weights that do not change the weight: the tensors are then sufficient.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
_CHANGES_WEIGHT = {
    "corda": "of data",
    "lora_ga": "of gradients",
    "loftq": "of a quantization",
    "pissa_niter_": "of a random decomposition",
}


@dataclass(frozen=True)
class AdapterConfig:
    """The content of adapter_config.json, checked and in this library's terms.

    Attributes:
        r, lora_alpha, lora_dropout, use_rslora, lora_bias: as in `lora_ext.nn.AdapterSpec`.
        init_lora_weights: True, or "pissa" or "olora", where the base is W - scaling * B0 A0.
        bias: "none", "all" or "lora_only".
        modules_to_save: names of modules that are stored whole.
        rank_pattern: expression -> rank where it differs; the tensors determine the ranks.
        alpha_pattern: expression -> alpha where it differs, the first match wins.
        target_modules, exclude_modules: names, or a string: a regular expression or "all-linear";
            information, never used to load.
        target_parameters: names of parameters that have adapters, instead of modules.
        peft_version: that wrote the folder; determines the layout of factors of stacks
            (`parameters.py`).
        lora_b_layout: Unsloth's "rank_major", which is PEFT's, or "grouped_by_expert".
        is_of_unsloth: whether Unsloth wrote it.
        layers_to_transform: indices of layers; information, never used to load.
        base_model_name_or_path, revision, task_type: information, never used.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: str | tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    peft_version: str | None = None
    lora_b_layout: str | None = None
    is_of_unsloth: bool = False
    layers_to_transform: tuple[int, ...] = ()
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None


def parse_config(data: bytes) -> AdapterConfig:
    """Reads and checks adapter_config.json.

    Args:
        data: its bytes; at most 1 MiB, which the caller checks.

    Raises:
        AdapterError: it is not a JSON object, a value is not valid, or it requests something that
            is not supported; the message names the field.
    """
    table = parse_json(data, max_depth=16)
    if not isinstance(table, dict):
        raise AdapterError(f"expected an object, but got {shown(table)}")
    if table.get("peft_type") != "LORA":
        raise AdapterError(
            f"expected peft_type 'LORA', but got {shown(table.get('peft_type'))}; what is no LoRA "
            "is PEFT's alone: peft.PeftModel.from_pretrained(model, folder)"
        )
    _check_support(table)
    fields = Fields(table)
    init = table.get("init_lora_weights", True)
    init = init.lower() if isinstance(init, str) else ""
    return AdapterConfig(
        r=as_rank("r", table.get("r", 8)),
        lora_alpha=as_alpha("lora_alpha", table.get("lora_alpha", 8)),
        lora_dropout=fields.dropout(),
        use_rslora=fields.flag("use_rslora"),
        lora_bias=fields.flag("lora_bias"),
        init_lora_weights=init if init in ("pissa", "olora") else True,
        bias=fields.bias(),
        modules_to_save=fields.few_names("modules_to_save"),
        rank_pattern=fields.patterns("rank_pattern", as_rank),
        alpha_pattern=fields.patterns("alpha_pattern", as_alpha),
        target_modules=fields.names_or_expression("target_modules"),
        exclude_modules=fields.names_or_expression("exclude_modules"),
        target_parameters=fields.few_names("target_parameters"),
        peft_version=fields.text("peft_version"),
        lora_b_layout=fields.one_of("lora_B_layout", _LAYOUTS),
        is_of_unsloth=_is_of_unsloth(table),
        layers_to_transform=fields.indices("layers_to_transform"),
        base_model_name_or_path=fields.text("base_model_name_or_path"),
        revision=fields.text("revision"),
        task_type=fields.text("task_type"),
    )


def _is_of_unsloth(table: dict[str, Any]) -> bool:
    mapping, base = table.get("auto_mapping"), table.get("base_model_name_or_path")
    marked = isinstance(mapping, dict) and "unsloth_fixed" in mapping
    return marked or (isinstance(base, str) and base.startswith("unsloth/"))


def render_config(config: AdapterConfig, fan_in_fan_out: bool) -> bytes:
    """The bytes of adapter_config.json: the same for the same config.

    Args:
        config: with init_lora_weights True.
        fan_in_fan_out: whether there are Conv1D layers.
    """
    table = {
        "alpha_pattern": dict(config.alpha_pattern),
        "auto_mapping": None,
        "base_model_name_or_path": config.base_model_name_or_path,
        "bias": config.bias,
        "exclude_modules": _list_or_text(config.exclude_modules) or None,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": config.lora_alpha,
        "lora_bias": config.lora_bias,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": list(config.modules_to_save) or None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "revision": config.revision,
        "target_modules": _list_or_text(config.target_modules),
        "task_type": config.task_type,
        "use_dora": False,
        "use_rslora": config.use_rslora,
    }
    if config.target_parameters:
        table |= {
            "peft_version": config.peft_version,
            "target_parameters": list(config.target_parameters),
        }
    return (json.dumps(table, indent=2) + "\n").encode()


def _list_or_text(names: str | tuple[str, ...]) -> str | list[str]:
    return names if isinstance(names, str) else list(names)


def _is_off(name: str, value: Any) -> bool:
    return not value or (name in _DEFAULTS and value == _DEFAULTS[name])


def _check_support(table: dict[str, Any]) -> None:
    init = table.get("init_lora_weights", True)
    problems = []
    if init is not None and not isinstance(init, (bool, str)):
        problems.append(f"init_lora_weights={shown(init)}")
    elif isinstance(init, str) and init.lower() not in (*_PLAIN_INITS, "pissa", "olora"):
        sources = [w for name, w in _CHANGES_WEIGHT.items() if init.lower().startswith(name)]
        why = (
            f" (it changes the base's weights by the result {sources[0]}, which the folder does "
            "not hold; let PEFT save plain LoRA with path_initial_model_for_weight_conversion)"
            if sources
            else ""
        )
        problems.append(f"init_lora_weights={shown(init)}{why}")
    for name, value in table.items():
        if name in _REFUSED and not _is_off(name, value):
            problems.append(f"{name}={shown(value)} ({_REFUSED[name]})")
    if problems:
        raise AdapterError(f"expected plain LoRA, but got {'; '.join(problems)}")
    known = _APPLIED | _INFORMATION | _WITHOUT_EFFECT | set(_REFUSED)
    unknown = {n: v for n, v in table.items() if n not in known and not _is_off(n, v)}
    if unknown:
        warnings.warn(
            "lora_ext: adapter_config.json has fields that PEFT 0.21.2 does not have; they are "
            f"ignored, as by PEFT: {shown(unknown, 300)}",
            stacklevel=4,
        )
