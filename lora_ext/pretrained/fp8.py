"""What loads folders in FP8, registered with transformers under the name of `packed.METHODS`.

Imported on demand, since it imports transformers.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config

from ..nn.frozen import take_frozen
from . import files
from .packed import METHODS


@register_quantization_config(METHODS["fp8"])
class PackedFP8Config(FineGrainedFP8Config):
    """transformers' own; saved as that."""

    def __init__(self, *args: Any, **words: Any) -> None:
        super().__init__(*args, **words)
        self.quant_method: Any = METHODS["fp8"]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "quant_method": "fp8"}


@register_quantizer(METHODS["fp8"])
class PackedFP8(FineGrainedFP8HfQuantizer):
    """transformers' own, which does not dequantise where it has no kernel."""

    def validate_environment(self, *args: Any, **words: Any) -> None:
        pass

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **words: Any
    ) -> None:
        stored = files.headers(checkpoint_files or ())
        files.check_scales(stored, files.fp8, self.quantization_config)
        super()._process_model_before_weight_loading(model, **words)

    def _process_model_after_weight_loading(self, model: Any, **words: Any) -> Any:
        super()._process_model_after_weight_loading(model, **words)
        take_frozen(model)
        return model
