"""What quantises linear layers and stacks of experts to 4 bits while a folder is read, and loads
what was saved of them; registered with transformers under the name of `packed.METHODS`.

    linear layer    bitsandbytes' Linear4bit, as by transformers' own quantiser
    stack           bitsandbytes' parametrization; saved as NAME, NAME.absmax, ...

Imported on demand, since it imports transformers and bitsandbytes.
"""

from __future__ import annotations

import math
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import core_model_loading
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils import logging
from transformers.utils.quantization_config import BitsAndBytesConfig

from ..device import free_memory
from ..experts.decorated import up_name
from ..nn.experts import is_experts
from ..nn.frozen import take_frozen
from . import files
from .packed import METHODS
from .quantise import BLOCK, quantised

bitsandbytes: Any = import_module("bitsandbytes")
_parametrize: Any = import_module("bitsandbytes.nn.parametrize")
logger = logging.get_logger(__name__)
_STATES = [f"quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
_PARTS = [*_STATES, "nested_quant_map", "nested_absmax", "quant_map", "absmax"]

if not hasattr(core_model_loading, "LoadStateDictInfo"):
    # Older releases read tensors in threads, faster than one quantises them.
    raise ImportError("it reads all weights before they are quantised")


@register_quantization_config(METHODS["lora_ext_four_bits"])
class FourBitConfig(BitsAndBytesConfig):
    """bitsandbytes' of 4 bits, for experts, too."""

    def __init__(self, **words: Any) -> None:
        # transformers takes a dictionary with load_in_4bit for bitsandbytes'.
        super().__init__(load_in_4bit=True, **words)
        self.quant_method: Any = METHODS["lora_ext_four_bits"]

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if "load_in" not in name}


def of(**words: Any) -> FourBitConfig:
    """The config of `four_bit_config`'s words."""
    known = {n for n in signature(BitsAndBytesConfig).parameters if n not in ("kwargs", "self")}
    known -= {n for n in known if "8bit" in n or n == "load_in_4bit"}
    if unknown := words.keys() - known:
        raise TypeError(
            f"lora_ext.pretrained.four_bit_config: expected words of {sorted(known)}, but got "
            f"{sorted(unknown)}"
        )
    ours = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return FourBitConfig(**{**ours, "bnb_4bit_compute_dtype": torch.bfloat16, **words})


@register_quantizer(METHODS["lora_ext_four_bits"])
class FourBits(Bnb4BitHfQuantizer):
    """transformers' of bitsandbytes' 4 bits, for stacks of experts, too.

    Attributes:
        stacks: the names of the stacks that are quantised.
    """

    stacks: frozenset[str] = frozenset()
    quantization_config: Any

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, checkpoint_files: Any = None, **words: Any
    ) -> None:
        super()._process_model_before_weight_loading(model, device_map, **words)
        found = set[str]()
        for path, module in model.named_modules():
            if not (
                is_experts(module) and should_convert_module(path, self.modules_to_not_convert)
            ):
                continue
            for name in (up_name(module), "down_proj"):
                if module.get_parameter(name).shape[-1] % BLOCK == 0:
                    found.add(f"{path}.{name}")
                    continue
                logger.warning(
                    f"lora_ext: {path}.{name} is not quantised: a row's "
                    f"{module.get_parameter(name).shape[-1]} values are no whole blocks of {BLOCK}"
                )
        self.stacks = frozenset(found)
        if self.pre_quantized:
            stored = files.headers(checkpoint_files or ())
            files.check_scales(stored, files.four_bits, self.quantization_config)
        if is_on_cpu(device_map):
            self._check_memory(model)

    def param_needs_quantization(self, model: Any, param_name: str, **words: Any) -> bool:
        return param_name in self.stacks or super().param_needs_quantization(
            model, param_name, **words
        )

    def get_quantize_ops(self) -> Any:
        return Quantise(self.quantization_config)

    def get_weight_conversions(self) -> list[Any]:
        if not self.pre_quantized:
            return []
        # A model within another has other paths in the folder than here.
        ends = {".".join(name.rsplit(".", 2)[-2:]) for name in self.stacks}
        load = [
            WeightConverter([*(f"{end}.{part}" for part in _PARTS), end], end, [Load(end, self)])
            for end in sorted(ends)
        ]
        return [*super().get_weight_conversions(), *load]

    def _process_model_after_weight_loading(self, model: Any, **words: Any) -> Any:
        super()._process_model_after_weight_loading(model, **words)
        # What was merged of a folder's tensors is saved as it is here.
        kept = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [each for each in kept if isinstance(each, WeightRenaming)]
        take_frozen(model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        raise NotImplementedError(
            "lora_ext: expected a model whose experts transformers can dequantise; load its folder "
            "without quantization_config"
        )

    def _check_memory(self, model: Any) -> None:
        """Raises ValueError if less memory is free than loading takes."""
        free, config = free_memory(), self.quantization_config
        scale = (1 + 4 / 256 if config.bnb_4bit_use_double_quant else 4) / BLOCK
        numbers, kept, largest = 0, 0, 0
        for name, parameter in model.named_parameters():
            if self.param_needs_quantization(model, name):
                numbers += math.prod(parameter.shape)
                largest = max(largest, math.prod(parameter.shape))
            else:
                kept += parameter.nbytes
        codes = int(numbers * (0.5 + scale))
        # Read, and merged from the folder's single experts.
        reading = 0 if self.pre_quantized else 2 * largest * model.dtype.itemsize
        needed = codes + kept + reading
        if free is None or needed <= free:
            return
        smaller = (0.5 + (1 + 4 / 256) / BLOCK) * numbers + kept + reading
        cure = f"a model of {free / needed:.0%} of its size would fit"
        if smaller <= free and smaller < needed:
            cure = "with bnb_4bit_use_double_quant=True it fits"
        raise ValueError(
            f"lora_ext: expected {_gib(needed)} GiB of free memory to load this model: "
            f"{_gib(codes)} for {numbers / 1e9:.1f} billion weights in 4 bits, {_gib(kept)} for "
            f"the others in {model.dtype} and {_gib(reading)} for a stack while it is read; but "
            f"{_gib(free)} GiB are free: {cure}"
        )


class Quantise(ConversionOps):
    """A weight ``[..., in]`` as bitsandbytes' codes, in its place in the model."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def convert(self, input_dict: Any, *patterns: Any, **words: Any) -> Any:
        made: dict[str, Tensor] = {}
        for name, values in input_dict.items():
            values = values[0] if isinstance(values, list) else values
            module, own = get_module_from_name(words["model"], name)
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                made[name] = self._linear(module, values)
            else:
                codes, state = quantised(values, self.config, torch.uint8)
                hold(module, own, codes, state.as_dict(packed=True))
                words["missing_keys"].discard(name)
        return made

    def _linear(self, module: Any, values: Tensor) -> Any:
        values = values.T if issubclass(module.source_cls, Conv1D) else values
        old, module._is_hf_initialized = module.weight, True
        codes, module.quant_state = quantised(values, self.config, old.quant_storage)
        words = {**old.__dict__, "quant_state": module.quant_state, "bnb_quantized": True}
        return bitsandbytes.nn.Params4bit(codes, **{**words, "requires_grad": False})


class Load(ConversionOps):
    """A stack's codes and what they are multiplied by, in its place in the model."""

    def __init__(self, end: str, hf_quantizer: FourBits) -> None:
        # By the second transformers knows that scales are not to be cast to the model's dtype.
        self.end, self.hf_quantizer = end, hf_quantizer

    def convert(self, input_dict: Any, *patterns: Any, **words: Any) -> Any:
        name = words["full_layer_name"]
        parts = {n: t[0] if isinstance(t, list) else t for n, t in input_dict.items()}
        codes = parts.pop(self.end)
        module, own = get_module_from_name(words["model"], name)
        hold(module, own, codes, {n.removeprefix(f"{self.end}."): t for n, t in parts.items()})
        words["missing_keys"].discard(name)
        return {}


def hold(module: nn.Module, name: str, codes: Tensor, state: dict[str, Any]) -> None:
    """Puts codes in the place of a parameter, as bitsandbytes does."""
    setattr(module, name, nn.Parameter(codes, requires_grad=False))
    _parametrize.replace_parameter_4bit_prequantized(module, name, state, codes.device)
    module._is_hf_initialized = True  # type: ignore[assignment]


def is_on_cpu(device_map: Any) -> bool:
    """Whether all weights of a model with this `device_map` are in the main memory."""
    if isinstance(device_map, dict):
        return all(str(device) == "cpu" for device in device_map.values())
    return device_map == "cpu" or not torch.accelerator.is_available()


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"
