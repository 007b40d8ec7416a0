"""Models whose weights are packed as transformers' `from_pretrained` loads them."""

from .packed import four_bit_config, packed_config

__all__ = ["four_bit_config", "packed_config"]
