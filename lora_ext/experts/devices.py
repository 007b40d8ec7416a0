"""Which devices sort the rows of experts, and sum over slots, with the kernels of this package."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import lora_ext._C as _C

from ..quantized.devices import is_right

_ops = torch.ops.lora_ext
_found: dict[torch.device, bool] = {}


def has_kernels(device: torch.device) -> bool:
    """Whether this build's kernels run on the device, with correct results for a small case, which
    is tested at the first use.

    Raises:
        RuntimeError: the first use is in the capture of a CUDA graph, which allows no test.
    """
    if device not in _found:
        if not _C.runs_kernels(device):
            return False
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "lora_ext.experts.lora_experts: expected kernels that were checked before a CUDA "
                "graph is captured, but got their first use in a capture; call the layer once "
                "before it"
            )
        words = "surround the products of experts", "torch's own operations are used there"
        _found[device] = is_right(device, _wrong, *words)
    return _found[device]


# As torch.compiler.assume_constant_result, which would import all of torch._dynamo: one second.
has_kernels._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _wave(*sizes: int) -> Tensor:
    numbers = torch.arange(math.prod(sizes), dtype=torch.float32, device="cpu")
    return numbers.mul_(0.7).sin_().view(sizes)


def _wrong(device: torch.device) -> str:
    """The op that differs from torch's operations on a CPU for a case of several blocks, in which
    some numbers are no expert."""
    tokens, k, experts, rank, n, half = 130, 3, 5, 3, 40, torch.bfloat16

    def differs(got: Tensor, expected: Tensor, tolerance: float = 2e-2) -> bool:
        return not torch.allclose(got.cpu().double(), expected.double(), tolerance, tolerance)

    index = (torch.arange(tokens * k, device="cpu") * 5 % (experts + 2) - 1).view(tokens, k)
    ids = index.masked_fill(index < 0, experts).flatten()
    perm = ids.argsort(stable=True)
    place, count = perm.argsort(), int((ids < experts).sum())
    offs = torch.bincount(ids, minlength=experts).cumsum(0)[:experts]
    routes = _ops.experts_routes(index.to(device), experts)
    for got, expected in zip(routes[:4], (perm, perm // k, place, offs), strict=True):
        if not torch.equal(got.cpu().long(), expected):
            return "experts_routes"

    a, b = _wave(experts * rank, n), _wave(n, rank * experts)
    given = [a.to(device)], [b.to(device)], [0.5], experts, half, 2
    by_expert = a.view(experts, rank, n), 0.5 * b.view(n, rank, experts).permute(2, 1, 0)
    pools = _ops.experts_factors(*given)
    for pool, expected in zip((pools[0], pools[1].transpose(1, 2)), by_expert, strict=True):
        hi, lo = pool.float().unflatten(1, (2, 8)).unbind(1)
        padded = torch.nn.functional.pad(expected, (0, 0, 0, 8 - rank))
        if differs(hi + lo, padded, 1e-4):
            return "experts_factors"
    for pool, same in zip(_ops.experts_factors(*given, None, True), pools, strict=True):
        none, own = pool.unflatten(0, (experts, 2)).unbind(1)
        if none.any() or not torch.equal(own, same):
            return "experts_factors"

    # Of few rows, beside the same pool of B.
    x, with_expert = _wave(tokens, n).to(half), perm[:count]
    given = x.to(device), *given[:3], 0.7, experts, 2, routes[3], routes[1]
    _, pool_b, s, t = _ops.experts_low_rank(*given)
    own_a = by_expert[0][ids[with_expert]]
    expected = (own_a @ x[with_expert // k].float().unsqueeze(2)).squeeze(2)
    total = t[:count].float().unflatten(1, (2, 8)).sum(1)[:, :rank]
    is_wrong = differs(s[:count], expected, 1e-4) or differs(total, 0.7 * expected, 1e-4)
    if is_wrong or not torch.equal(pool_b.cpu(), pools[1].cpu()):
        return "experts_low_rank"

    rows, dx, weights = (
        _wave(tokens * k, n).to(half),
        _wave(n, tokens * k).t().to(half),
        _wave(tokens, k),
    )
    own = (weights.flatten()[perm] * (ids[perm] < experts))[:, None]
    found = _ops.experts_sum(rows.to(device), *routes[2:4], weights.to(device), k)
    if differs(found, (own * rows)[place].view(tokens, k, n).sum(1)):
        return "experts_sum"

    grad, bias, scaled = (
        _wave(tokens, n).to(half),
        _wave(experts, n).to(half),
        dx.contiguous().to(device),
    )
    own_bias = grad[perm // k].float() * bias[ids[perm].clamp(max=experts - 1)]
    expected = ((rows.float() * dx + own_bias).sum(1) * (ids[perm] < experts))[place]
    words = {"grad": grad.to(device), "bias": bias.to(device)}
    given = rows.to(device), scaled, routes[0], routes[3], weights.to(device), k
    is_wrong = differs(_ops.experts_dot(*given, **words), expected.view(tokens, k))
    return "experts_dot" if is_wrong or differs(scaled[:count], (own * dx)[:count]) else ""
