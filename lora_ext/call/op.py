"""The fused LoRA linear, and its update alone: from arguments to the operands of the op.

The factors of many adapters are lists of matrices, whose ranks may differ, or a pool: two tensors
with one slot for each adapter. None is copied for each row or padded to the largest rank.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dropout import draw_seed
from ..invariance import refuse, row_block
from ..packed_weight import PackedWeight
from ..quantized.linear import Call, quantized_linear
from ..quantized.weight import QuantizedWeight

Factors: TypeAlias = Tensor | Sequence[Tensor]
Scaling: TypeAlias = float | Sequence[float] | Tensor

_lora = torch.ops.lora_ext.lora.default
_grouped = torch.ops.lora_ext.lora_grouped.default


def lora_linear(
    x: Tensor,
    weight: Tensor | PackedWeight | QuantizedWeight,
    lora_a: Factors,
    lora_b: Factors,
    bias: Tensor | None = None,
    scaling: Scaling = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    *,
    index: Tensor | None = None,
    offs: Tensor | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    """A frozen linear layer with a low-rank update (Hu et al. 2021, LoRA).

        y = x W^T + scaling * (drop(x) lora_a^T) lora_b^T + bias

    With ``index`` or ``offs``, each row has its own adapter, or none:

        y[m] = x[m] W^T + scaling[g] * (drop(x)[m] lora_a[g]^T) lora_b[g]^T + bias,  g = index[m]

    Differentiable once in x, lora_a, lora_b and bias, each gradient computed only if needed; never
    in weight. Saved for backward: x, the [M, r] product drop(x) lora_a^T and a seed of 8 bytes.

    Args:
        x: ``[..., in_features]``; float64, float32, bfloat16 or float16; any strides.
        weight: ``[out_features, in_features]`` in x's dtype, frozen; or a `PackedWeight` of it; or
            a `lora_ext.quantized.QuantizedWeight`, which is dequantised for the product and again
            in backward. Under ``torch.autocast`` any floating dtype: it is cast for the product and
            again in backward, and the cast copy is not saved.
        lora_a: ``[r, in_features]``, 1 <= r <= 512, in x's dtype, or float32 with a half x. float32
            adapters are never rounded to half: their products have about float32 precision, and
            their gradients are float32.
        lora_b: ``[out_features, r]`` in lora_a's dtype.
        bias: ``[out_features]`` in x's dtype or float32.
        scaling: factor of the update: alpha / r, or alpha / sqrt(r) for rsLoRA. With many adapters
            one for all, or one for each: a sequence, or a float32 tensor ``[adapters]`` on x's
            device, or a float64 one with a float64 x. It has no gradient.
        dropout_p: probability in [0, 1) that an element of x is zero in the update (not in the base
            product), as PEFT's lora_dropout. The keep probability is rounded to 1/65536 and the
            kept elements are divided by the rounded value. The mask is a function of (row, column)
            and of a seed; it is never stored. A dropped element does not propagate NaN.
        training: False turns dropout off.
        seed: int64 tensor of one element on x's device, which fixes the mask (`dropout_mask`); None
            draws one from torch's generator.
        index: int32, one element for each row of x (any shape), from -1 (the base alone) to
            adapters - 1. Then lora_a and lora_b are lists of matrices, whose ranks may differ, or
            pools ``[adapters, r, in_features]`` and ``[adapters, out_features, r]``.
        offs: instead of an index, int32 ``[adapters]``: adapter g has the rows from offs[g - 1] (0
            for the first) to offs[g], like the groups of `torch.nn.functional.grouped_mm`; rows
            from offs[-1] on have the base alone.
        ranks: ranks of the slots of a pool, int32 ``[adapters]``: slot g is lora_a[g, :ranks[g]]
            and lora_b[g, :, :ranks[g]]; a rank of 0 is a free slot, whose rows have the base alone.

    With many adapters the gradient of each is that of its own rows, summed in their order; it is
    zero for an adapter without rows. The values in an adapter's factors affect only its own rows.
    CUDA kernels read index, offs, ranks and scaling on the device, without synchronising with the
    host: they treat a number out of range as no adapter. Everywhere else it raises.

    Returns:
        ``[..., out_features]`` in x's dtype (the autocast dtype under autocast).

    Raises:
        IndexError: a value in index, offs or ranks is out of range, where the host reads it.
        NotImplementedError: within `lora_ext.batch_invariant`, if it does not support the call.
        RuntimeError: shapes, rank, devices or numbers do not fit; weight or scaling requires grad
            under grad mode; a second backward.
        TypeError: a dtype does not fit, an operand is not a tensor, x is nested, or scaling is not
            a number.
    """
    many = index is not None or offs is not None or ranks is not None
    is_each = many or (isinstance(lora_a, Tensor) and isinstance(lora_b, Tensor))
    if not (is_each and isinstance(x, Tensor)):
        raise _not_a_tensor("lora_linear", x=x, lora_a=lora_a, lora_b=lora_b)
    if x.is_nested or x.layout is not torch.strided:
        raise _not_dense("lora_linear", "x", x)
    if many:
        lora_a, lora_b, scaling = _operands("lora_linear", x, lora_a, lora_b, scaling)
    else:
        _check_scaling("lora_linear", scaling)
    if dropout_p != 0.0 or not training:
        dropout_p, seed = _dropout("lora_linear", x, dropout_p, training, seed)
    packed = packed_t = None
    if isinstance(weight, PackedWeight):
        weight, packed, packed_t = weight.operands(x)
    elif not isinstance(weight, Tensor):
        if not isinstance(weight, QuantizedWeight):
            raise _not_a_tensor("lora_linear", weight=weight)
        call = Call(weight, scaling, dropout_p, seed, (index, offs, ranks), row_block(weight))
        factors: Any = (*lora_a, *lora_b) if many else (lora_a, lora_b)
        return quantized_linear(call, x, bias, factors)
    rest = (dropout_p, seed, 0, 0, False, packed, packed_t, row_block(weight))
    if many:
        groups = (index, offs, ranks)
        return _grouped(x, weight, None, lora_a, lora_b, scaling, *groups, bias, *rest)
    return _lora(x, weight, None, lora_a, lora_b, scaling, bias, *rest)


def lora_update(
    y: Tensor,
    x: Tensor,
    lora_a: Factors,
    lora_b: Factors,
    scaling: Scaling = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
    *,
    index: Tensor | None = None,
    offs: Tensor | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    """A low-rank update added onto the output y of any base layer for x.

        y + scaling * (drop(x) lora_a^T) lora_b^T

    If the base is a plain weight, `lora_linear` computes both and saves one pass over y.
    Differentiable once in y, x, lora_a and lora_b. Saved for backward: x, the [M, r] product
    drop(x) lora_a^T and the seed; not y.

    Args:
        y: ``[..., out_features]``; float64, float32, bfloat16 or float16, not necessarily x's
            dtype; any strides. It is not written.
        x: ``[..., in_features]``; the same dtypes; any strides. Under ``torch.autocast`` it is cast
            to the autocast dtype, and y keeps its own.
        lora_a: ``[r, in_features]``, 1 <= r <= 512, in x's dtype, or float32 with a half x.
        lora_b: ``[out_features, r]`` in lora_a's dtype.
        scaling: factor of the update.
        dropout_p: probability in [0, 1) that an element of x is zero, as in `lora_linear`.
        training, seed: as in `lora_linear`.
        row_offset, col_offset: position of x in the whole mask, if x is a part of a larger tensor.
        index, offs, ranks: for many adapters, as in `lora_linear`.

    Returns:
        A new contiguous tensor of y's shape and dtype. The sum is computed in the widest of the
        dtypes, at least in float32, and rounded once.

    Raises:
        IndexError: a value in index, offs or ranks is out of range, where the host reads it.
        NotImplementedError: within `lora_ext.batch_invariant`.
        RuntimeError: shapes, rank, devices or numbers do not fit; scaling requires grad under grad
            mode; a second backward.
        TypeError: a dtype does not fit, an operand is not a tensor or is nested, or scaling is not
            a number.
    """
    refuse("lora_update, onto what another base returned")
    many = index is not None or offs is not None or ranks is not None
    one = () if many else (("lora_a", lora_a), ("lora_b", lora_b))
    for name, tensor in (("y", y), ("x", x), *one):
        if not isinstance(tensor, Tensor):
            raise _not_a_tensor("lora_update", **{name: tensor})
        if tensor.is_nested or tensor.layout is not torch.strided:
            raise _not_dense("lora_update", name, tensor)
    if many:
        lora_a, lora_b, scaling = _operands("lora_update", x, lora_a, lora_b, scaling)
    else:
        _check_scaling("lora_update", scaling)
    if dropout_p != 0.0 or not training:
        dropout_p, seed = _dropout("lora_update", x, dropout_p, training, seed)
    dropout = (dropout_p, seed, row_offset, col_offset)
    if not many:
        return _lora(x, None, y, lora_a, lora_b, scaling, None, *dropout)
    return _grouped(x, None, y, lora_a, lora_b, scaling, index, offs, ranks, None, *dropout)


def base_linear(
    x: Tensor, weight: Tensor | PackedWeight | QuantizedWeight, bias: Tensor | None
) -> Tensor:
    """x W^T + bias, the base alone, for any weight that `lora_linear` accepts."""
    if isinstance(weight, QuantizedWeight):
        return quantized_linear(Call(weight), x, bias, ())
    return F.linear(x, weight.matrix if isinstance(weight, PackedWeight) else weight, bias)


def _check_scaling(function: str, scaling: Scaling) -> None:
    if type(scaling) is float:
        return
    if scaling is None or isinstance(scaling, str | list | tuple):
        raise TypeError(f"lora_ext.{function}: expected a number scaling, but got {scaling!r}")
    _check_no_gradient(function, scaling)


def _dropout(
    function: str, x: Tensor, dropout_p: float, training: bool, seed: Tensor | None
) -> tuple[float, Tensor | None]:
    """The probability and the seed of a call."""
    if training:
        return dropout_p, draw_seed(x.device) if seed is None else seed
    if not 0.0 <= dropout_p < 1.0:
        raise RuntimeError(
            f"lora_ext.{function}: expected dropout_p in [0, 1), but got {dropout_p}"
        )
    return 0.0, seed


def _not_dense(function: str, name: str, given: Tensor) -> TypeError:
    if not given.is_nested:
        return TypeError(
            f"lora_ext.{function}: expected a dense {name}, but got one of layout {given.layout}; "
            f"pass {name}.to_dense()"
        )
    return TypeError(
        f"lora_ext.{function}: expected a dense {name}, but got a nested one; pass {name}.values() "
        "of a jagged layout, whose rows are independent"
    )


def _not_a_tensor(function: str, **operands: object) -> TypeError:
    name, got = next((n, t) for n, t in operands.items() if not isinstance(t, Tensor))
    many = "; many adapters need index or offs" if isinstance(got, list | tuple) else ""
    return TypeError(
        f"lora_ext.{function}: expected {name} to be a tensor, but got {type(got).__name__}{many}"
    )


def _operands(
    function: str, x: Tensor, lora_a: Factors, lora_b: Factors, scaling: Scaling
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The factors and the scaling as the op takes them.

    Raises:
        TypeError: a factor is not a tensor, or scaling is not a number.
    """
    first, second = _listed(function, "lora_a", lora_a), _listed(function, "lora_b", lora_b)
    adapters = len(first[0]) if len(first) == 1 and first[0].dim() == 3 else len(first)
    _check_no_gradient(function, scaling)
    return first, second, _scaling(function, scaling, adapters, x)


def _check_no_gradient(function: str, scaling: Scaling) -> None:
    """Raises RuntimeError for a scaling that requires grad, since it gets no gradient."""
    each = scaling if isinstance(scaling, list | tuple) else (scaling,)
    if torch.is_grad_enabled() and any(isinstance(s, Tensor) and s.requires_grad for s in each):
        raise RuntimeError(
            f"lora_ext.{function}: expected a scaling without gradient, but got a tensor that "
            "requires grad; to train it, multiply lora_b by it and leave scaling at 1"
        )


def _listed(function: str, name: str, factors: Factors) -> list[Tensor]:
    if isinstance(factors, Tensor):
        if factors.dim() != 3:
            raise RuntimeError(
                f"lora_ext.{function}: expected {name} of many adapters as a list of matrices or a "
                f"pool of 3 dimensions, but got a tensor of shape {list(factors.shape)}"
            )
        return [factors]
    listed = list(factors)
    for i, factor in enumerate(listed):
        if not isinstance(factor, Tensor):
            raise TypeError(
                f"lora_ext.{function}: expected {name}[{i}] to be a tensor, but got "
                f"{type(factor).__name__}"
            )
    return listed


def _scaling(function: str, scaling: Scaling, adapters: int, x: Tensor) -> Tensor:
    if isinstance(scaling, Tensor) and scaling.dim() > 0:
        return scaling
    kind = {
        "dtype": torch.float64 if x.dtype is torch.float64 else torch.float32,
        "device": x.device,
    }
    try:
        if isinstance(scaling, Sequence):
            if torch.compiler.is_compiling() or not (x.is_cuda and torch.cuda.is_initialized()):
                return torch.tensor(scaling, **kind)
            # Without waiting for the device: from pinned memory. A graph that is captured would
            # read that again in each replay, so there torch refuses the copy, as it does from
            # other memory.
            pinned = not torch.cuda.is_current_stream_capturing()
            # The host by its name: torch.set_default_device may name another, without pages.
            host = torch.tensor(scaling, dtype=kind["dtype"], device="cpu", pin_memory=pinned)
            return host.to(x.device, non_blocking=pinned)
        return torch.full((adapters,), float(scaling), **kind)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"lora_ext.{function}: expected scaling to be a number, a sequence of numbers or a "
            f"float32 tensor, one for each adapter, but got {scaling!r}"
        ) from error
