"""Packs the frozen weights of a model for the CPU, where this was measured to be faster.

pack      the work of `lora_ext.warmup` on a CPU   trial    the times of one shape, and the results
layers    the weights of a model
"""

from .pack import DECODE_AND_TRAINING, pack_for, pack_weights, packed_bytes, unpack_weights
from .trial import Packing

__all__ = [
    "DECODE_AND_TRAINING",
    "Packing",
    "pack_for",
    "pack_weights",
    "packed_bytes",
    "unpack_weights",
]
