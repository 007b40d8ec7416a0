"""adapter_config.json: PEFT's LoraConfig, of which all that changes the result is understood.

Fields and defaults are those of PEFT 0.21.2. A field is applied, kept as information, without
effect once the tensors are saved, or has to be at its default; so is a field that is not known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import BIASES, MAX_RANK
from .errors import AdapterError, shown
from .strict_json import parse_json

ALL_LINEAR = "all-linear"
MAX_NAME = 1024
_MAX_TEXT = 4096
_MAX_SAVED = 1024
_MAX_ALPHA = 1e9
_MAX_INDEX = 1 << 31

_APPLIED = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "lora_bias",
    "bias",
    "init_lora_weights",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
}
_INFORMATION = {"base_model_name_or_path", "revision", "task_type", "peft_version"}
# Checked, then dropped: which classes to import, training or inference, the layout of the weight
# (which the module's class says), and settings of a first initialization that is long past.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "inference_mode",
    "fan_in_fan_out",
    "runtime_config",
    "qalora_group_size",
    "eva_config",
    "corda_config",
    "lora_ga_config",
}
# Variants of LoRA and their settings, with the defaults of those whose default is not empty.
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
    "target_parameters": "LoRA of parameters instead of modules",
    "trainable_token_indices": "trainable tokens",
    "megatron_config": "Megatron's parallel layers",
    "megatron_core": "Megatron's parallel layers",
    "loftq_config": "LoftQ",
    "ensure_weight_tying": "tied adapters",
}
_DEFAULTS = {"megatron_core": "megatron.core"}

# Of init_lora_weights: what leaves the weight alone, so that the tensors say everything.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
_CHANGES_WEIGHT = {
    "corda": "of data",
    "lora_ga": "of gradients",
    "loftq": "of a quantization",
    "pissa_niter_": "of a random decomposition",
}


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says, checked and in this library's terms.

    Attributes:
        r, alpha, dropout, use_rslora, lora_bias: as in `lora_ext.AdapterSpec`.
        init: "kaiming", or "pissa" or "olora", where W stands for W - scaling * B0 A0.
        bias: "none", "all" or "lora_only".
        target_modules: names, or a string: a regular expression or "all-linear".
        exclude_modules: names, or a string: a regular expression.
        modules_to_save: names of modules that are stored whole.
        rank_pattern, alpha_pattern: expression -> value where it differs, the first match wins.
        layers_to_transform: indices of layers; None is all.
        layers_pattern: names of the lists that the indices count in.
        base_model_name_or_path, revision, task_type: information, never used.
    """

    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    use_rslora: bool = False
    lora_bias: bool = False
    init: str = "kaiming"
    bias: str = "none"
    target_modules: str | tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: frozenset[int] | None = None
    layers_pattern: tuple[str, ...] = ()
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None


def parse_config(data: bytes) -> AdapterConfig:
    """Reads and checks adapter_config.json.

    Args:
        data: its bytes; at most 1 MiB, which the caller checks.

    Raises:
        AdapterError: it is no JSON object, a value is not valid, or it asks for what is not
            supported; the message names the field.
    """
    table = parse_json(data, max_depth=16)
    if not isinstance(table, dict):
        raise AdapterError(f"expected an object, but got {shown(table)}")
    if table.get("peft_type") != "LORA":
        raise AdapterError(f"expected peft_type 'LORA', but got {shown(table.get('peft_type'))}")
    _check_support(table)
    return _Fields(table).config()


def render_config(config: AdapterConfig, fan_in_fan_out: bool) -> bytes:
    """The bytes of adapter_config.json: the same for the same config.

    Args:
        config: with init "kaiming".
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
        "lora_alpha": config.alpha,
        "lora_bias": config.lora_bias,
        "lora_dropout": config.dropout,
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
    return (json.dumps(table, indent=2) + "\n").encode()


def check_information(name: str, value: Any) -> str | None:
    """The value of base_model_name_or_path, revision or task_type, if it is None or a string."""
    return None if value is None else _text(name, value, _MAX_TEXT)


def _list_or_text(names: str | tuple[str, ...]) -> str | list[str]:
    return names if isinstance(names, str) else list(names)


def _is_off(name: str, value: Any) -> bool:
    off = value is None or value is False or value == [] or value == {} or value == ""
    return off or (name in _DEFAULTS and value == _DEFAULTS[name])


def _check_support(table: dict[str, Any]) -> None:
    init = table.get("init_lora_weights", True)
    problems = []
    if not isinstance(init, (bool, str)):
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
    for name, value in table.items():
        if name not in known and not _is_off(name, value):
            raise AdapterError(
                f"expected the fields of PEFT 0.21.2, but got {shown(name)}: {shown(value)}, which "
                "is not known; remove it if the adapter's result does not depend on it"
            )


class _Fields:
    """The fields of the object, one method for each kind of value."""

    def __init__(self, table: dict[str, Any]) -> None:
        self.table = table

    def config(self) -> AdapterConfig:
        init = self.table.get("init_lora_weights", True)
        init = init.lower() if isinstance(init, str) else ""
        for name in ("inference_mode", "fan_in_fan_out"):
            self.flag(name)
        self.check_auto_mapping()
        self.text("peft_version")
        config = AdapterConfig(
            r=_rank("r", self.table.get("r", 8)),
            alpha=_alpha("lora_alpha", self.table.get("lora_alpha", 8)),
            dropout=self.dropout(),
            use_rslora=self.flag("use_rslora"),
            lora_bias=self.flag("lora_bias"),
            init=init if init in ("pissa", "olora") else "kaiming",
            bias=self.bias(),
            target_modules=self.names_or_expression("target_modules"),
            exclude_modules=self.names_or_expression("exclude_modules"),
            modules_to_save=self.names("modules_to_save", self.table.get("modules_to_save")),
            rank_pattern=self.patterns("rank_pattern", _rank),
            alpha_pattern=self.patterns("alpha_pattern", _alpha),
            layers_to_transform=self.layers(),
            layers_pattern=self.layers_pattern(),
            base_model_name_or_path=self.text("base_model_name_or_path"),
            revision=self.text("revision"),
            task_type=self.text("task_type"),
        )
        if not config.target_modules:
            raise AdapterError(
                "expected target_modules to be names or an expression, but got "
                f"{shown(self.table.get('target_modules'))}"
            )
        if isinstance(config.target_modules, str) and (
            config.layers_to_transform is not None or config.layers_pattern
        ):
            raise AdapterError(
                "expected a list in target_modules beside layers_to_transform and layers_pattern, "
                f"but got {shown(config.target_modules)}"
            )
        if len(config.modules_to_save) > _MAX_SAVED:
            raise AdapterError(
                f"expected at most {_MAX_SAVED} names in modules_to_save, but got "
                f"{len(config.modules_to_save)}"
            )
        return config

    def flag(self, name: str) -> bool:
        value = self.table.get(name, False)
        if not isinstance(value, bool):
            raise AdapterError(f"expected {name} to be true or false, but got {shown(value)}")
        return value

    def text(self, name: str) -> str | None:
        return check_information(name, self.table.get(name))

    def dropout(self) -> float:
        value = self.table.get("lora_dropout", 0.0)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
            raise AdapterError(f"expected lora_dropout in [0, 1), but got {shown(value)}")
        return float(value)

    def bias(self) -> str:
        value = self.table.get("bias", "none")
        if not isinstance(value, str) or value not in BIASES:
            raise AdapterError(f"expected bias to be one of {BIASES}, but got {shown(value)}")
        return value

    def names(self, name: str, value: Any) -> tuple[str, ...]:
        if value is None:
            return ()
        if not isinstance(value, list):
            raise AdapterError(f"expected {name} to be a list of names, but got {shown(value)}")
        return tuple(_module_name(name, entry) for entry in value)

    def names_or_expression(self, name: str) -> str | tuple[str, ...]:
        value = self.table.get(name)
        return _text(name, value, MAX_NAME) if isinstance(value, str) else self.names(name, value)

    def patterns(self, name: str, check: Any) -> dict[str, Any]:
        value = self.table.get(name) or {}
        if not isinstance(value, dict):
            raise AdapterError(f"expected {name} to be an object, but got {shown(value)}")
        return {
            _text(f"a key of {name}", key, MAX_NAME): check(f"{name}[{shown(key)}]", number)
            for key, number in value.items()
        }

    def layers(self) -> frozenset[int] | None:
        value = self.table.get("layers_to_transform")
        if value is None or value == []:
            return None
        indices: list[Any] = value if isinstance(value, list) else [value]
        if not all(_is_integer(index) and 0 <= index < _MAX_INDEX for index in indices):
            raise AdapterError(
                f"expected layers_to_transform to be indices, but got {shown(value)}"
            )
        return frozenset(indices)

    def layers_pattern(self) -> tuple[str, ...]:
        value = self.table.get("layers_pattern")
        if isinstance(value, str):
            value = [value] if value else []
        names = self.names("layers_pattern", value)
        if set("".join(names)) & set("^$*+?()[]{}|"):
            raise AdapterError(
                f"expected names without an expression in layers_pattern, but got {shown(value)}; "
                "write the modules' names in target_modules instead"
            )
        return names

    def check_auto_mapping(self) -> None:
        """Plain strings, which name classes for PEFT to import; nothing is imported here."""
        value = self.table.get("auto_mapping")
        if value is None:
            return
        if not isinstance(value, dict):
            raise AdapterError(f"expected auto_mapping to be an object, but got {shown(value)}")
        for key, entry in value.items():
            check_information(f"auto_mapping[{shown(key)}]", entry)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _rank(name: str, value: Any) -> int:
    if not _is_integer(value) or not 1 <= value <= MAX_RANK:
        raise AdapterError(
            f"expected {name} to be an integer of 1 to {MAX_RANK}, but got {shown(value)}"
        )
    return value


def _alpha(name: str, value: Any) -> float:
    # A comparison with NaN is False; an integer may be too large for a float.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not -_MAX_ALPHA <= value <= _MAX_ALPHA:
        raise AdapterError(
            f"expected {name} to be a number of at most {_MAX_ALPHA:g} in magnitude, but got "
            f"{shown(value)}"
        )
    return value


def _text(name: str, value: Any, limit: int) -> str:
    if not isinstance(value, str) or len(value) > limit or not value.isprintable():
        raise AdapterError(
            f"expected {name} to be a printable string of at most {limit} characters, but got "
            f"{shown(value)}"
        )
    return value


def _module_name(name: str, value: Any) -> str:
    text = _text(name, value, MAX_NAME)
    if not all(text.split(".")) or "/" in text or "\\" in text:
        raise AdapterError(
            f"expected module names in {name}, such as 'layers.0.q_proj', but got {shown(text)}"
        )
    return text
