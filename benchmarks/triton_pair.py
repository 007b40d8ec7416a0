"""LoRAFusion's structure in Triton, in our own writing: a pair of kernels for each direction.

    forward    S = x A^T by the library; Y = x W^T + s S B^T in one kernel
    backward   dS = dY B by the library; dX = dY W + s dS A in one kernel;
               dB = s dY^T S and dA = s dS^T x by the library

The fused kernel is Triton's own matrix product with the low-rank one as a last step along k.
Dropout, which the original stores as a mask, is applied to x for S alone, and to dS A in dX.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_CONFIGS = [
    triton.Config(
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 64, "GROUP_M": 8},
        num_warps=warps,
        num_stages=stages,
    )
    for m, n, warps, stages in ((128, 256, 8, 3), (128, 128, 4, 4), (64, 128, 4, 4), (64, 64, 4, 4))
]


@triton.jit
def fused_product(
    p, q, t, u, mask, out,
    m, n, k,
    p_row, q_k, q_n, t_row, u_r, u_n, mask_row, out_row,
    scaling, keep_scale,
    RANK: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out [m, n] = p [m, k] q [k, n] + scaling * mask * (t [m, RANK] u [RANK, n])."""
    block = tl.program_id(0)
    rows_of_blocks, columns_of_blocks = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    group = block // (GROUP_M * columns_of_blocks)
    first = group * GROUP_M
    size = tl.minimum(rows_of_blocks - first, GROUP_M)
    within = block % (GROUP_M * columns_of_blocks)
    rows = (first + within % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (within // size) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, columns = rows.to(tl.int64), columns.to(tl.int64)
    in_rows, in_columns = rows[:, None] < m, columns[None, :] < n

    ranks = tl.arange(0, RANK)
    left = tl.load(t + rows[:, None] * t_row + ranks[None, :], mask=in_rows, other=0.0)
    right = tl.load(u + ranks[:, None] * u_r + columns[None, :] * u_n, mask=in_columns, other=0.0)
    sums = tl.dot(left, right) * scaling
    if MASKED:
        kept = tl.load(
            mask + rows[:, None] * mask_row + columns[None, :], mask=in_rows & in_columns
        )
        sums = tl.where(kept, sums * keep_scale, 0.0)

    for start in range(0, k, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        inside = depth < k
        left = tl.load(p + rows[:, None] * p_row + depth[None, :], in_rows & inside[None, :], 0.0)
        right = tl.load(
            q + depth[:, None] * q_k + columns[None, :] * q_n, inside[:, None] & in_columns, 0.0
        )
        sums = tl.dot(left, right, sums)
    target = out + rows[:, None] * out_row + columns[None, :]
    tl.store(target, sums.to(out.dtype.element_ty), in_rows & in_columns)


_tuned = triton.autotune(_CONFIGS, key=["m", "n", "k", "RANK", "MASKED"])(fused_product)


def product(
    p: Tensor,
    q: Tensor,
    t: Tensor,
    u: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    keep_scale: float = 1.0,
    config: dict[str, int] | None = None,
) -> Tensor:
    """P Q + scaling * mask * (T U): p [m, k], q [k, n], t [m, r], u [r, n], mask [m, n] of bool.

    config: block sizes, instead of the autotuner's choice
    """
    (m, k), n = p.shape, q.shape[1]
    rank = max(16, triton.next_power_of_2(t.shape[1]))  # tl.dot's least depth
    if rank != t.shape[1]:
        t, u = F.pad(t, (0, rank - t.shape[1])), F.pad(u, (0, 0, 0, rank - u.shape[0]))
    t = t.contiguous()
    out = torch.empty(m, n, dtype=p.dtype, device=p.device)
    kept = out if mask is None else mask
    operands = (p, q, t, u, kept, out, m, n, k)
    strides = (p.stride(0), *q.stride(), t.stride(0), *u.stride(), kept.stride(0), out.stride(0))
    factors = (scaling, keep_scale, rank, mask is not None)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)

    if config is None:
        _tuned[grid](*operands, *strides, *factors)
    else:
        fused_product[grid](*operands, *strides, *factors, **config)
    return out


class TritonPair(torch.autograd.Function):
    """y = x W^T + scaling * (drop(x) A^T) B^T on 2-D x with adapters in its dtype."""

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, scaling, dropout_p, config=None):
        mask, scale = None, 1.0 / (1.0 - dropout_p)
        dropped = x
        if dropout_p:
            mask = torch.rand_like(x) >= dropout_p
            dropped = x * mask * scale
        s = dropped @ lora_a.t()
        ctx.save_for_backward(x, weight, lora_a, lora_b, s, mask)
        ctx.scaling, ctx.keep_scale, ctx.config = scaling, scale, config
        return product(x, weight.t(), s, lora_b.t(), scaling, config=config)

    @staticmethod
    def backward(ctx, grad):
        x, weight, lora_a, lora_b, s, mask = ctx.saved_tensors
        ds = grad @ lora_b
        dropped = x if mask is None else x * mask * ctx.keep_scale
        dlora_a = (ds.t() @ dropped).mul_(ctx.scaling)
        dlora_b = (grad.t() @ s).mul_(ctx.scaling)
        dx = product(grad, weight, ds, lora_a, ctx.scaling, mask, ctx.keep_scale, ctx.config)
        return dx, None, dlora_a, dlora_b, None, None, None
