"""`packed_config`: the config of a folder in MXFP4 or FP8 whose weights stay as they are stored."""

from __future__ import annotations

import importlib
from typing import Any

from ..versions import TOO_OLD

# transformers' name of a method, and of the module here that registers what loads it -> our name.
METHODS = {"mxfp4": "lora_ext_mxfp4", "fp8": "lora_ext_fp8"}


def packed_config(folder: Any, **words: Any) -> Any:
    """The config of a model in MXFP4 or FP8, with which transformers loads its weights as they are
    stored, on any device and without the package `kernels`:

        config = lora_ext.pretrained.packed_config(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, config=config)

    Without it transformers dequantises such a model where it has no kernel for it: gpt-oss-20b
    then takes 38 GB instead of 13. `apply_lora` and `accelerate` take the model as any quantised
    one. `save_pretrained` writes the format that was read. Before a weight is read, the files are
    checked: a file that is cut off, scales that are missing or do not fit, are a ValueError that
    names tensor and file.

    Args:
        folder: a folder, or a name on the hub.
        **words: of `AutoConfig.from_pretrained`.

    Raises:
        ImportError: transformers is older than its class for the format, or cannot import it.
        ValueError: the model is in no such format.
    """
    if TOO_OLD["transformers"]:
        raise ImportError(f"lora_ext.pretrained.packed_config: {TOO_OLD['transformers']}")
    transformers: Any = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(folder, **words)
    holder = config
    if getattr(config, "quantization_config", None) is None:
        holder = config.get_text_config(decoder=True)
    found = getattr(holder, "quantization_config", None)
    found = found if isinstance(found, dict) or found is None else found.to_dict()
    method = str((found or {}).get("quant_method", "none"))
    if found is None or method not in METHODS:
        raise ValueError(
            "lora_ext.pretrained.packed_config: expected a quantization_config whose quant_method "
            f"is one of {sorted(METHODS)}, but {str(folder)!r} has {method!r}; load it without "
            "config="
        )
    _register(method, transformers.__version__)
    holder.quantization_config = {**found, "quant_method": METHODS[method]}
    return config


def _register(method: str, version: str) -> None:
    try:
        importlib.import_module(f"{__package__}.{method}")
    except ImportError as error:
        raise ImportError(
            "lora_ext.pretrained.packed_config: expected a transformers that can import its layers "
            f"of {method}, but {version} cannot ({error}); pip install 'transformers>=5.20'"
        ) from error
