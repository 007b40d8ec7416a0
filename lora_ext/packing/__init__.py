"""Packing the frozen weights of a model for the CPU, where that was measured to be faster.

pack      what `lora_ext.warmup` does on a CPU     trial    the times of one shape
layers    which weights of a model there are       report   what was found, for people
"""

from .pack import DECODE_AND_TRAINING, pack_for, pack_weights, packed_bytes, unpack_weights
from .report import Packing

__all__ = [
    "DECODE_AND_TRAINING",
    "Packing",
    "pack_for",
    "pack_weights",
    "packed_bytes",
    "unpack_weights",
]
