"""adapter_config.json: PEFT's LoraConfig. Every field that changes the result is understood.

Fields and defaults are those of PEFT 0.21.2. The tensors determine which layers have an adapter,
and with which rank. So the fields that choose layers, like those that describe the base, are kept
as information. Any other field is applied or must be off; an unknown field is ignored with a
warning, as in PEFT.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..models.config import BIASES
from ..nn.adapter_spec import MAX_RANK, is_finite, is_integer
from ..strict_json import parse_json
from .errors import AdapterError, shown, telling

# The version of PEFT whose format is written.
PEFT_VERSION = "0.21.2"
_MOST_NAMES = 1024

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


# ---- values ----


def _expect(is_valid: bool, name: str, expected: str, value: Any) -> None:
    if not is_valid:
        raise AdapterError(f"expected {name} {expected}, but got {shown(value)}")


def _rank(name: str, value: Any) -> int:
    is_valid = is_integer(value) and 1 <= value <= MAX_RANK
    _expect(is_valid, name, f"to be an integer of 1 to {MAX_RANK}", value)
    return value


def _alpha(name: str, value: Any) -> float:
    _expect(is_finite(value), name, "to be a finite number", value)
    return value


def _dropout(name: str, value: Any) -> float:
    _expect(is_finite(value) and 0 <= value < 1, name, "in [0, 1)", value)
    return float(value)


def _flag(name: str, value: Any) -> bool:
    _expect(isinstance(value, int) and value in (0, 1), name, "to be true or false", value)
    return bool(value)


def _init(name: str, value: Any) -> bool | str:
    lower = value.lower() if isinstance(value, str) else ""
    return lower if lower in ("pissa", "olora") else True


def _one_of(values: tuple[str, ...], name: str, value: Any) -> str:
    _expect(value in values, name, f"to be one of {values}", value)
    return value


def _text(name: str, value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _names(name: str, value: Any) -> tuple[str, ...]:
    is_valid = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    _expect(is_valid, name, "to be a list of names", value)
    return tuple(value)


def _few_names(name: str, value: Any) -> tuple[str, ...]:
    names = _names(name, value)
    if len(names) > _MOST_NAMES or not all(names):
        raise AdapterError(
            f"expected at most {_MOST_NAMES} names in {name}, none of them empty, but got "
            f"{len(names)}"
        )
    return names


def _names_or_expression(name: str, value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else _names(name, value)


def _indices(name: str, value: Any) -> tuple[int, ...]:
    value = value if isinstance(value, list) else [value]
    return tuple(index for index in value if isinstance(index, int))


def _patterns(check: Callable[[str, Any], Any], name: str, value: Any) -> dict[str, Any]:
    _expect(isinstance(value, dict), name, "to be an object", value)
    return {key: check(f"{name}[{shown(key)}]", number) for key, number in value.items()}


# The fields that AdapterConfig has, by PEFT's names: in it they are in lower case.
_READ: dict[str, Callable[[str, Any], Any]] = {
    "r": _rank,
    "lora_alpha": _alpha,
    "lora_dropout": _dropout,
    "use_rslora": _flag,
    "lora_bias": _flag,
    "init_lora_weights": _init,
    "bias": partial(_one_of, BIASES),
    "modules_to_save": _few_names,
    "rank_pattern": partial(_patterns, _rank),
    "alpha_pattern": partial(_patterns, _alpha),
    "target_modules": _names_or_expression,
    "exclude_modules": _names_or_expression,
    "target_parameters": _few_names,
    "peft_version": _text,
    "lora_B_layout": partial(_one_of, ("rank_major", "grouped_by_expert")),
    "layers_to_transform": _indices,
    "base_model_name_or_path": _text,
    "revision": _text,
    "task_type": _text,
}


def parse_config(data: bytes) -> AdapterConfig:
    """Reads and checks the bytes of adapter_config.json, at most 1 MiB, which the caller checks.
    AdapterError if it is not a JSON object, a value is not valid, or it requests something that is
    not supported; the message names the field."""
    with telling():
        table = parse_json(data, max_depth=16)
    if not isinstance(table, dict):
        raise AdapterError(f"expected an object, but got {shown(table)}")
    if table.get("peft_type") != "LORA":
        raise AdapterError(
            f"expected peft_type 'LORA', but got {shown(table.get('peft_type'))}; load it "
            "with PEFT: peft.PeftModel.from_pretrained(model, folder)"
        )
    _check_support(table)
    # null is the default, but r and lora_alpha have to be numbers.
    values = {
        name.lower(): read(name, table[name])
        for name, read in _READ.items()
        if table.get(name) is not None or (name in table and name in ("r", "lora_alpha"))
    }
    return AdapterConfig(**values, is_of_unsloth=_is_of_unsloth(table))


def _is_of_unsloth(table: dict[str, Any]) -> bool:
    mapping, base = table.get("auto_mapping"), table.get("base_model_name_or_path")
    marked = isinstance(mapping, dict) and "unsloth_fixed" in mapping
    return marked or (isinstance(base, str) and base.startswith("unsloth/"))


def render_config(config: AdapterConfig, fan_in_fan_out: bool) -> bytes:
    """The bytes of adapter_config.json, the same for the same config, whose init_lora_weights is
    True; fan_in_fan_out: whether there are Conv1D layers."""
    of_parameters = {"peft_version", "target_parameters"}
    names = _READ.keys() - of_parameters - {"lora_B_layout", "layers_to_transform"}
    table = {name: getattr(config, name) for name in names}
    table |= {name: table[name] or None for name in ("exclude_modules", "modules_to_save")}
    table |= dict.fromkeys(("auto_mapping", "layers_pattern", "layers_to_transform"))
    table |= {"peft_type": "LORA", "fan_in_fan_out": fan_in_fan_out}
    table |= {"inference_mode": True, "use_dora": False}
    table = dict(sorted(table.items()))
    if config.target_parameters:
        table |= {name: getattr(config, name) for name in sorted(of_parameters)}
    return (json.dumps(table, indent=2) + "\n").encode()


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
    known = {"peft_type", *_READ, *_WITHOUT_EFFECT, *_REFUSED}
    unknown = {n: v for n, v in table.items() if n not in known and not _is_off(n, v)}
    if unknown:
        warnings.warn(
            "lora_ext: adapter_config.json has fields that PEFT 0.21.2 does not have; they are "
            f"ignored, as by PEFT: {shown(unknown, 300)}",
            stacklevel=4,
        )
