"""What loads folders in MXFP4, registered with transformers under the name of `packed.METHODS`.

Imported on demand, since it imports transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..experts.decorated import up_name
from ..nn.experts import is_experts
from ..nn.frozen import take_frozen
from ..quantized.of_mxfp4 import hold_mxfp4
from . import files
from .packed import METHODS

# A folder's name of a tensor of experts -> the parametrized module's.
_NAMES = {
    f"{name}_{part}": f"parametrizations.{name}.{place}"
    for name in ("gate_up_proj", "down_proj")
    for part, place in (("blocks", "original"), ("scales", "0.scales"))
}


@register_quantization_config(METHODS["mxfp4"])
class PackedMxfp4Config(QuantizationConfigMixin):
    """As transformers' `Mxfp4Config`; saved as that."""

    def __init__(self, modules_to_not_convert: list[str] | None = None, **words: Any) -> None:
        self.quant_method: Any = METHODS["mxfp4"]
        self.modules_to_not_convert = modules_to_not_convert

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "quant_method": "mxfp4"}


@register_quantizer(METHODS["mxfp4"])
class PackedMxfp4(HfQuantizer):
    """Puts parametrizations in the places of experts' parameters, which have the folder's codes and
    scales as they are stored."""

    @property
    def is_trainable(self) -> Any:
        return True

    def is_serializable(self, *args: Any, **words: Any) -> Any:
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **words: Any
    ) -> None:
        stored = files.headers(checkpoint_files or ())
        files.check_scales(stored, files.mxfp4, self.quantization_config)
        for path, module in list(model.named_modules()):
            if not is_experts(module):
                continue
            for name in (up_name(module), "down_proj"):
                # Experts that a folder keeps in bfloat16 stay so.
                if stored and not any(
                    f"{path}.{name}_blocks".endswith(each) or each.endswith(f"{path}.{name}_blocks")
                    for each in stored
                ):
                    continue
                count, *sizes = module.get_parameter(name).shape
                columns, rows = sizes if module.is_transposed else reversed(sizes)
                shape = count, rows, -(-columns // 32)
                codes = torch.empty(*shape, 16, dtype=torch.uint8, device="meta")
                scales = torch.empty(shape, dtype=torch.uint8, device="meta")
                hold_mxfp4(module, name, codes, scales, module.get_parameter(name).dtype)

    def get_weight_conversions(self) -> list[Any]:
        return [WeightRenaming(stored, ours) for stored, ours in _NAMES.items()]

    def get_state_dict_and_metadata(self, model: Any, *args: Any, **words: Any) -> Any:
        """With the folder's names at once: transformers 5.0 cannot sort ours."""
        state = model.state_dict()
        for stored, ours in _NAMES.items():
            for name in [each for each in state if each.endswith(f".{ours}")]:
                state[name.removesuffix(ours) + stored] = state.pop(name)
        return state, {}

    def _process_model_after_weight_loading(self, model: Any, **words: Any) -> Any:
        take_frozen(model)
        return model
