"""Applies a gate to rows so that a row's bits do not depend on the number of rows.

torch's elementwise functions compute most elements by vectors and the last of a call, or of a
thread's part of it, one by one, with other bits. So each call gets as many rows as make whole
vectors, and few enough for one thread; where there is no such number, one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Elements of whole vectors, also in each half of a row; the most that torch leaves to one thread.
_VECTORS = 256
_ONE_THREAD = 32768


def rows_of_a_call(columns: int) -> int:
    """How many rows of `columns` elements each call gets."""
    least = _VECTORS // math.gcd(_VECTORS, columns)
    most = _ONE_THREAD // max(columns, 1)
    return most // least * least or 1


def in_equal_blocks(gate: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """gate(z) for z ``[S, N]``, by calls with equal numbers of rows."""
    size, rows = rows_of_a_call(z.shape[1]), len(z)
    if rows == 0:
        return gate(z)
    padded = torch.nn.functional.pad(z, (0, 0, 0, -rows % size))
    return torch.cat([gate(part) for part in padded.split(size)])[:rows]
