"""Experts in Triton, in our own writing: a grouped product, and the update as another one onto it.

    forward    S = x A_e^T; Y = x W_e^T, then Y + s S B_e^T
    backward   dS = s dY B_e; dX = dY W_e, then dX + dS A_e; dB_e = s dY_e^T S_e; dA_e = dS_e^T x_e

Each is one launch for all experts, and nothing is read on the host: a program finds its expert by
the ends of the experts' rows. Gather, gate and weighted sum are torch's, as in transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in (
        (128, 256, 64, 8, 3), (128, 128, 64, 4, 4), (64, 128, 64, 4, 4), (16, 128, 64, 4, 4),
        (128, 16, 64, 4, 4), (16, 16, 64, 2, 4), (128, 128, 16, 4, 2), (16, 128, 16, 2, 2),
    )
]  # fmt: skip


@triton.jit
def grouped_product(
    p, q, base, out, ends,
    experts, n, k,
    p_row, q_e, q_k, q_n, out_row,
    scaling,
    PADDED: tl.constexpr, ONTO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [rows, n] = scaling * p [rows, k] q_e [k, n], onto base if ONTO, for the rows of expert e
    from ends[e - 1] to ends[e]; PADDED is a power of two of at least as many experts."""
    tile = tl.program_id(1)
    every = tl.arange(0, PADDED)
    end = tl.load(ends + every, every < experts, 0)
    begin = tl.load(ends + every - 1, (every > 0) & (every < experts), 0)
    own_tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(own_tiles, 0)
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    if expert < experts:
        is_own = every == expert
        first = tl.sum(tl.where(is_own, begin + (tile - last + own_tiles) * BLOCK_M, 0), 0)
        rows = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        columns = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        in_rows = rows[:, None] < tl.sum(tl.where(is_own, end, 0), 0)
        in_columns = columns[None, :] < n
        matrix = q + expert.to(tl.int64) * q_e
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, k, BLOCK_K):
            depth = start + tl.arange(0, BLOCK_K)
            inside = depth < k
            left = tl.load(
                p + rows[:, None] * p_row + depth[None, :], in_rows & inside[None, :], 0.0
            )
            right = tl.load(
                matrix + depth[:, None] * q_k + columns[None, :] * q_n,
                inside[:, None] & in_columns,
                0.0,
            )
            sums = tl.dot(left, right, sums)
        sums = sums * scaling
        place = rows[:, None] * out_row + columns[None, :]
        if ONTO:
            sums += tl.load(base + place, in_rows & in_columns, 0.0).to(tl.float32)
        tl.store(out + place, sums.to(out.dtype.element_ty), in_rows & in_columns)


@triton.jit
def grouped_outer(
    p, q, out, ends,
    m, n,
    p_row, q_row, out_e, out_m,
    scaling,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out_e [m, n] = scaling * p_e [rows, m]^T q_e [rows, n] for the rows of expert e, as above."""
    expert = tl.program_id(2)
    begin = tl.load(ends + expert - 1, expert > 0, 0)
    end = tl.load(ends + expert)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        depth = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        inside = depth < end
        left = tl.load(
            p + depth[None, :] * p_row + rows[:, None], (rows[:, None] < m) & inside[None, :], 0.0
        )
        right = tl.load(
            q + depth[:, None] * q_row + columns[None, :],
            inside[:, None] & (columns[None, :] < n),
            0.0,
        )
        sums = tl.dot(left, right, sums)
    place = expert.to(tl.int64) * out_e + rows[:, None] * out_m + columns[None, :]
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(out + place, (sums * scaling).to(out.dtype.element_ty), inside)


_tuned_product = triton.autotune(_CONFIGS, key=["experts", "n", "k", "ONTO"])(grouped_product)
_tuned_outer = triton.autotune(_CONFIGS, key=["m", "n"])(grouped_outer)


class _Launch(NamedTuple):
    """How kernels are launched.

    Attributes:
        ends: int32 ``[E]``.
        config: block sizes, instead of the autotuner's choice.
    """

    ends: Tensor
    config: dict[str, int] | None = None

    def product(
        self, p: Tensor, q: Tensor, scaling: float = 1.0, onto: Tensor | None = None
    ) -> Tensor:
        """scaling * P Q_e, onto a tensor: p [rows, k], q [E, k, n]."""
        (rows, k), (experts, _, n) = p.shape, q.shape
        p = p if p.stride(1) == 1 else p.contiguous()
        out = torch.empty(rows, n, dtype=p.dtype, device=p.device)
        base = out if onto is None else onto

        def grid(meta: dict[str, int]) -> tuple[int, int]:
            return triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(rows, meta["BLOCK_M"]) + experts

        sizes = (experts, n, k, p.stride(0), *q.stride(), out.stride(0), scaling)
        padded = triton.next_power_of_2(experts)
        given = (p, q, base, out, self.ends, *sizes, padded, onto is not None)
        if self.config is None:
            _tuned_product[grid](*given)
        else:
            grouped_product[grid](*given, **self.config)
        return out

    def outer(self, p: Tensor, q: Tensor, scaling: float = 1.0) -> Tensor:
        """scaling * P_e^T Q_e ``[E, m, n]``: p [rows, m], q [rows, n]."""
        m, n, experts = p.shape[1], q.shape[1], len(self.ends)
        p, q = (each if each.stride(1) == 1 else each.contiguous() for each in (p, q))
        out = torch.empty(experts, m, n, dtype=p.dtype, device=p.device)

        def grid(meta: dict[str, int]) -> tuple[int, int, int]:
            return triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(m, meta["BLOCK_M"]), experts

        given = (p, q, out, self.ends, m, n, p.stride(0), q.stride(0), *out.stride()[:2], scaling)
        if self.config is None:
            _tuned_outer[grid](*given)
        else:
            grouped_outer[grid](*given, **self.config)
        return out


class TritonProjection(torch.autograd.Function):
    """y = x W_e^T + scaling * (x A_e^T) B_e^T for rows that are sorted by expert.

    x [rows, in], weight [E, out, in], lora_a [E, r, in], lora_b [E, out, r], all of one dtype.
    """

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, launch, scaling):
        s = launch.product(x, lora_a.transpose(1, 2))
        ctx.save_for_backward(x, weight, lora_a, lora_b, s)
        ctx.launch, ctx.scaling = launch, scaling
        y = launch.product(x, weight.transpose(1, 2))
        return launch.product(s, lora_b.transpose(1, 2), scaling, y)

    @staticmethod
    def backward(ctx, grad):
        (x, weight, lora_a, lora_b, s), launch = ctx.saved_tensors, ctx.launch
        ds = launch.product(grad, lora_b, ctx.scaling)
        dx = launch.product(ds, lora_a, onto=launch.product(grad, weight))
        return dx, None, launch.outer(ds, x), launch.outer(grad, s, ctx.scaling), None, None


class Stack(NamedTuple):
    """One projection: weight ``[E, out, in]``, bias ``[E, out]`` or None, and its factors."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor


def experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: Stack,
    down: Stack,
    gate: Callable[[Tensor], Tensor],
    scaling: float,
    config: dict[str, int] | None = None,
) -> Tensor:
    """The layer ``[T, H]``: x ``[T, H]``, index and weights ``[T, k]``."""
    count, slots = len(up.weight), index.shape[1]
    numbers, order = index.flatten().sort(stable=True)
    every = torch.arange(count, device=x.device)
    launch = _Launch(torch.searchsorted(numbers, every, right=True).int(), config)

    def projection(rows: Tensor, stack: Stack) -> Tensor:
        factors = stack.lora_a, stack.lora_b
        y = TritonProjection.apply(rows, stack.weight, *factors, launch, scaling)
        return y if stack.bias is None else y + stack.bias[numbers]

    y = projection(gate(projection(x[order // slots], up)), down)
    y = y * weights.flatten()[order, None].to(y.dtype)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=x.device)
    return y[back].view(*index.shape, -1).sum(1)
