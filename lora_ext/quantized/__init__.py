"""Quantised bases: weights stored in another form, as operands of `lora_linear`.

weight       the interface of a format, and a layer as base of the op, for one x
layers       which layers have a quantised weight
linear       the op on a dequantised weight     workspace the memory that layers share
of_*         the layers of each library         stack     matrices dequantised one at a time
codes        operands of the kernels
"""

from .weight import QuantizedWeight

__all__ = ["QuantizedWeight"]
