"""The configs with which transformers loads a model's weights here.

packed_config      the folder's own, whose weights stay as they are stored
four_bit_config    a quantization_config, by which linear layers and experts become NF4
"""

from __future__ import annotations

import importlib
from typing import Any

from ..versions import TOO_OLD

# The quant_method of a folder -> the name under which what loads it is registered, by the module
# here that has the rest of that name.
METHODS = {each: f"lora_ext_{each}" for each in ("mxfp4", "fp8")}
METHODS["lora_ext_four_bits"] = "lora_ext_four_bits"


def packed_config(folder: Any, **words: Any) -> Any:
    """The config of a model in MXFP4 or FP8, or one that was saved after `four_bit_config`, with
    which transformers loads its weights as they are stored, on any device and without the package
    `kernels`:

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
    _registered(METHODS[method], "packed_config")
    holder.quantization_config = {**found, "quant_method": METHODS[method]}
    return config


def four_bit_config(**words: Any) -> Any:
    """A quantization_config by which transformers quantises linear layers and the experts of
    mixtures to NF4 while it reads a folder, one stack after the other:

        config = lora_ext.pretrained.four_bit_config()
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.bfloat16
        )

    transformers' own `BitsAndBytesConfig` quantises linear layers alone. The layers are
    bitsandbytes' `Linear4bit`, experts have its parametrization (`replace_parameter_4bit`), both
    its bits. `save_pretrained` writes them in 4 bits, and `packed_config` loads such a folder. The
    peak of the main memory is the quantised model and twice the largest stack as it is read; if
    less is free, that is a ValueError before a weight is read.

    Args:
        **words: of `BitsAndBytesConfig`, but for those of int8. Unlike there the type is "nf4",
            with scales quantised again, and computed is in bfloat16. Modules of
            `llm_int8_skip_modules` keep their weights, experts included.

    Raises:
        ImportError: transformers or bitsandbytes is too old, or not installed.
        TypeError: an unknown word.
    """
    if TOO_OLD["bitsandbytes"]:
        raise ImportError(f"lora_ext.pretrained.four_bit_config: {TOO_OLD['bitsandbytes']}")
    return _registered("lora_ext_four_bits", "four_bit_config").of(**words)


def _registered(name: str, function: str) -> Any:
    """The module that registers what loads weights, once it has."""
    version = importlib.import_module("transformers").__version__
    module = name.removeprefix("lora_ext_")
    try:
        return importlib.import_module(f"{__package__}.{module}")
    except ImportError as error:
        oldest = "5.4" if module == "four_bits" else "5.20"
        raise ImportError(
            f"lora_ext.pretrained.{function}: expected a transformers that can import what loads "
            f"{module}, but {version} cannot ({error}); pip install 'transformers>={oldest}'"
        ) from error
