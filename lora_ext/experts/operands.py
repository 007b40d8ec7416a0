"""The parts of a layer of experts, and what the passes of a projection take besides rows:
`Projection`.

    y = x W_e^T + b_e + s (drop(x) A_e^T) B_e^T           for the rows of each expert e
    drop(x)[j] = keep_scale * mask[rows[j]] * x[j]        for the sorted row j

The mask of x, the input of the first projection, has a row for each token; that of h, the input of
the second, a row for each slot: rows[j] is the token t, or t k + slot. So a mask depends on the
seed and on the place of a row, not on how rows are sorted, and a token has the same mask of x for
each of its experts.

Masks are never stored. Kept elements are not scaled here, so that a masked row is exact in half
precision: keep_scale is a factor of the update's scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import FLOATS
from ..quantized.stack import QuantizedStack
from ..torch_state import is_plain
from .decorated import has_gate, norm_of, up_name, weight_of
from .routing import Routes


class Experts(NamedTuple):
    """The frozen part of the experts, E matrices for each of two projections.

    Attributes:
        up: ``[E, N, H]``, gate and up together or up alone; ``[E, H, N]`` if transposed. This
            and `down` may be quantised.
        down: ``[E, H, I]``; ``[E, I, H]`` if it is transposed.
        up_bias, down_bias: ``[E, N]`` and ``[E, H]``, or None.
        is_transposed: whether both have ``[in, out]`` for each expert.
        gate: from ``[S, N]`` to ``[S, I]``, applied to each row: activation and product.
        norm: a function of each row of the down projection's result, or None.
        is_gate_trained: whether the gate has parameters that require a gradient.
    """

    up: Tensor | QuantizedStack
    down: Tensor | QuantizedStack
    gate: Callable[[Tensor], Tensor]
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    is_transposed: bool = False
    norm: Callable[[Tensor], Tensor] | None = None
    is_gate_trained: bool = False

    @classmethod
    def of(cls, module: Any, adapters: Any = None) -> Experts:
        """The experts of a module decorated with transformers' `use_experts_implementation`, whose
        child `adapters` is no part of the gate."""
        name, parts = up_name(module), [m for m in module.children() if m is not adapters]
        return cls(
            weight_of(module, name),
            weight_of(module, "down_proj"),
            # `_apply_gate` exists also in a module without a gate, but it would split its input.
            module._apply_gate if has_gate(module) else module.act_fn,
            getattr(module, f"{name}_bias") if module.has_bias else None,
            module.down_proj_bias if module.has_bias else None,
            module.is_transposed,
            norm_of(module),
            any(each.requires_grad for part in parts for each in part.parameters()),
        )

    def fit(self, x: Tensor, index: Tensor, weights: Tensor) -> bool:
        """Whether `lora_experts` supports these operands of a module's forward."""
        return (
            all(map(is_plain, (x, index, weights)))
            and x.dim() == index.dim() == weights.dim() == 2
            and index.shape == weights.shape
            and x.shape == (len(index), self.down.shape[2 if self.is_transposed else 1])
            and x.dtype in FLOATS
            and weights.dtype in FLOATS
            and not index.is_floating_point()
            and x.device == self.down.device
        )


class ExpertsAdapter(NamedTuple):
    """scaling * B_e A_e drop(x) for each expert e of one projection, in PEFT's layout.

    Attributes:
        lora_a: ``[E r, in]``; A_e is the rows from e r to (e + 1) r.
        lora_b: ``[out, r E]``; B_e is the columns e, e + E, e + 2 E, ...
        scaling: a number, or a tensor of one element, which can change without a new graph.
        dropout: the probability that an element of x is zero in the update of this call.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float | Tensor
    dropout: float = 0.0


class Projection(NamedTuple):
    """One projection of all experts.

    Attributes:
        weight: ``[E, out, in]``, any strides, or quantised.
        bias: ``[E, out]`` or None.
        routes: those of the rows.
        lora_a, lora_b: one tensor for each adapter, in PEFT's layout.
        scalings: one number for each adapter.
        is_first: whether x, and the mask, have a row for each token; else one for each slot.
        row_block: the op's, positive in `lora_ext.batch_invariant`.
        dropout_p: the probability that an element is dropped.
        seed: that of the mask, int64, one element; None: no dropout.
        slots: k, the number of rows of each token.
    """

    weight: Tensor | QuantizedStack
    bias: Tensor | None
    routes: Routes
    lora_a: Sequence[Tensor] = ()
    lora_b: Sequence[Tensor] = ()
    scalings: Sequence[float] = ()
    is_first: bool = False
    row_block: int = 0
    dropout_p: float = 0.0
    seed: Tensor | None = None
    slots: int = 1

    def ranks(self) -> list[int]:
        """The rank of one expert, for each adapter."""
        return [len(a) // self.weight.shape[0] for a in self.lora_a]

    def rank(self) -> int:
        """The number of columns of S = drop(x) A^T: all ranks, or the largest if each row has one
        of the adapters."""
        return (sum if self.routes.ends is None else max)(self.ranks() or [0])

    def token(self) -> Tensor | None:
        """For each sorted row its index in x; None if x has the sorted rows."""
        return self.routes.token if self.is_first else None

    @property
    def mask_rows(self) -> Tensor:
        """The mask's row of each sorted row."""
        return self.routes.token if self.is_first else self.routes.perm

    def drop(self, values: Tensor, where: slice, in_place: bool) -> Tensor:
        """Some of the sorted rows with zeros where the mask drops.

        Args:
            values: ``[rows, n]``.
            where: which rows these are.
            in_place: whether they may be written to.
        """
        if self.seed is None:
            return values
        values = values if in_place else values.clone(memory_format=torch.contiguous_format)
        mask_rows = self.mask_rows[where].long()
        torch.ops.lora_ext.drop_rows(values, mask_rows, self.seed, self.dropout_p)
        return values


class Gradient(NamedTuple):
    """What a projection's backward gets besides x and the rows.

    Attributes:
        grad: ``[S, out]``, sorted; with weights ``[T, out]``.
        weights: ``[S]`` by slot, or None for 1.
        s: ``[S, R]`` of forward.
        want_x, want_a, want_b: which gradients are requested, of lora_a and lora_b for each
            adapter.
    """

    grad: Tensor
    weights: Tensor | None
    s: Tensor
    want_x: bool
    want_a: Sequence[bool]
    want_b: Sequence[bool]


class Backward(NamedTuple):
    """The gradients of a projection.

    Attributes:
        dx: ``[S, in]``, or None.
        dweights: ``[S]`` by slot, in their dtype, or None.
        dlora_a, dlora_b: one for each adapter, None if not requested.
    """

    dx: Tensor | None
    dweights: Tensor | None
    dlora_a: list[Tensor | None]
    dlora_b: list[Tensor | None]


def part_of(values: Tensor, token: Tensor | None, where: slice) -> Tensor:
    """Some of the sorted rows: of such, or of those that token gives the indices of."""
    return values[where] if token is None else values.index_select(0, token[where])
