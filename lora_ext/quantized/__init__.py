"""Quantised bases: weights stored in another form, as operands of `lora_linear`.

weight       the interface of a format          layers    which layers have a quantised weight
linear       the op on a dequantised weight     base      a layer as base of the op, for one x
of_*         the layers of each library         workspace the memory that layers share
codes        operands of the kernels            stack     matrices dequantised one at a time
"""

from .weight import QuantizedWeight

__all__ = ["QuantizedWeight"]
