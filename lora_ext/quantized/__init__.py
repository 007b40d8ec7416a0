"""Quantised bases: weights that are stored in another form, as `lora_linear` takes them.

weight       what a format says of itself       layers    which layers have one
linear       the op on a dequantised weight     base      what a layer is to the op, for one x
of_*         the layers of each library         workspace the memory that layers share
"""

from .weight import QuantizedWeight

__all__ = ["QuantizedWeight"]
