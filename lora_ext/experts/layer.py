"""`lora_experts`: a layer of frozen experts with low-rank updates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..dropout import draw_seed, keep_scale_of
from ..dtypes import HALVES
from ..invariance import row_block
from ..quantized.stack import QuantizedStack
from .autograd import GateDown, Projected, with_factors
from .gate_blocks import in_equal_blocks
from .operands import Experts, ExpertsAdapter, Projection
from .projection import way_of
from .routing import Routes, example_routes, places_of, routes_of


def lora_experts(
    experts: Experts,
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: Sequence[ExpertsAdapter | None] = (),
    down: Sequence[ExpertsAdapter | None] = (),
    adapter_index: Tensor | None = None,
) -> Tensor:
    """The experts that a router chose for each token, each with a low-rank update.

        z = x W1_e^T + b1_e + s1 (drop(x) A1_e^T) B1_e^T        h = gate(z)
        y = h W2_e^T + b2_e + s2 (drop(h) A2_e^T) B2_e^T        y = norm(y)
        out[t] = sum over t's k slots of weight * y             in the slots' order

    drop(x) has a mask for each token, the same for all of its experts; drop(h) has one for each
    slot. Each call draws a seed for each projection with dropout from torch's generator; a mask
    depends on it and on the token, or on the token and the slot: not on the numbers of experts.

    Differentiable once in x, the weights and the factors; never in W1, W2 or their biases.

    Args:
        experts: the frozen part.
        x: ``[T, H]``, brought to the experts' dtype.
        top_k_index: ``[T, k]``, integers; a number that is E or larger is no expert: it adds
            nothing and has no gradient.
        top_k_weights: ``[T, k]``, any floating dtype; at a slot of no expert any number.
        up, down: the active adapters of each projection; their updates add. Those of one projection
            share its mask, so they have the same dropout. With adapter_index: the adapters that
            tokens may have, the same ones in the same order, None for one that the projection
            lacks; an empty sequence for a projection without any.
        adapter_index: ``[T]``, integers: which of the adapters a token has alone, -1 for none. On a
            GPU and in a traced program a number out of range counts as -1.

    Returns:
        ``[T, H]`` in x's dtype.

    Raises:
        IndexError: a number in adapter_index is out of range.
        NotImplementedError: within `lora_ext.batch_invariant`, on a GPU, or in a dtype without
            products by panels.
        ValueError: adapters of one projection differ in dropout, or it is not in [0, 1);
            adapter_index has another shape or dtype, or up and down have other numbers of adapters.
    """
    block = row_block(experts.up)
    if block and not torch.compiler.is_compiling():
        experts = experts._replace(gate=partial(in_equal_blocks, experts.gate))
    count = experts.up.shape[0]
    adapters = max(len(up), len(down))
    if adapters == 0:
        adapter_index = None
    if adapter_index is not None:
        _check_index(adapter_index, len(x), up, down)
    routes = routes_of(top_k_index, count, adapter_index, adapters)
    # Their rows are zero, but zero times NaN is NaN; the kernels do not read them.
    if routes.place is None or experts.norm is not None or experts.up.dtype not in HALVES:
        top_k_weights = top_k_weights.masked_fill((top_k_index < 0) | (top_k_index >= count), 0)
    given = routes, top_k_index.shape[-1], block
    first, first_factors = _call(experts, True, up, *given)
    second, second_factors = _call(experts, False, down, *given)
    first, second = map(_seeded, (first, second))
    with torch.autocast(x.device.type, enabled=False):
        z = Projected.apply(x.to(experts.up.dtype), first, *first_factors)
        gate, h = experts.gate, z
        if experts.norm is not None or experts.is_gate_trained or torch.compiler.is_compiling():
            gate, h = None, gate(z)
        if experts.norm is None:
            out = GateDown.apply(h, second, gate, top_k_weights, *second_factors)
        else:
            y = experts.norm(Projected.apply(h, second, *second_factors))
            # In torch's own differentiable calls.
            slots = y[places_of(routes)].view(*top_k_weights.shape, y.shape[-1])
            wide = torch.promote_types(y.dtype, torch.float32)
            out = (slots * top_k_weights[..., None].to(wide)).sum(1).to(y.dtype)
    return out.to(x.dtype)


def explained(
    experts: Experts,
    up: Sequence[ExpertsAdapter | None],
    down: Sequence[ExpertsAdapter | None],
    is_by_row: bool,
) -> str:
    """How a forward is computed, as text. Arguments as of `lora_experts`."""
    weight = experts.up
    routes = example_routes(weight.device, weight.shape[0], 1, is_by_row)
    given = routes, 1, row_block(weight) if weight.is_cpu else 0
    calls = _call(experts, True, up, *given), _call(experts, False, down, *given)
    first, second = (way_of(with_factors(*call)) for call in calls)
    return first if first == second else f"{first}; the second projection: {second}"


def _seeded(call: Projection) -> Projection:
    return call._replace(seed=draw_seed(call.weight.device)) if call.dropout_p else call


def _call(
    experts: Experts,
    is_first: bool,
    given: Sequence[ExpertsAdapter | None],
    routes: Routes,
    slots: int,
    block: int,
) -> tuple[Projection, list[Tensor]]:
    """A projection without its factors and its seed, and the factors."""
    weight, bias = experts.up, experts.up_bias
    if not is_first:
        weight, bias = experts.down, experts.down_bias
    if experts.is_transposed:
        weight = weight.transpose(1, 2)
    adapters = [_with_number(adapter) for adapter in _with_rank_0(given, weight)]
    scalings = tuple(float(adapter.scaling) for adapter in adapters)
    factors = [adapter.lora_a for adapter in adapters] + [adapter.lora_b for adapter in adapters]
    # No default of the class: a traced program would make such a number an input.
    call = Projection(weight, bias, routes, (), (), scalings, is_first, block, 0.0, None, slots)
    p = _dropout_of(adapters)
    if p > 0.0:
        scalings = tuple(scaling * keep_scale_of(p) for scaling in scalings)
        call = call._replace(scalings=scalings, dropout_p=p)
    return call, factors


def _with_rank_0(
    given: Sequence[ExpertsAdapter | None], weight: Tensor | QuantizedStack
) -> Sequence[ExpertsAdapter]:
    """The adapters of a projection, those that it lacks with rank 0; none if it lacks all."""
    here = [adapter for adapter in given if adapter is not None]
    if len(here) == len(given) or not here:
        return here
    like = here[0]
    lacking = ExpertsAdapter(
        like.lora_a.new_empty(0, weight.shape[2]),
        like.lora_b.new_empty(weight.shape[1], 0),
        1.0,
        like.dropout,
    )
    return [lacking if adapter is None else adapter for adapter in given]


def _check_index(
    index: Tensor, tokens: int, up: Sequence[ExpertsAdapter | None], down: Sequence
) -> None:
    where = "lora_ext.experts.lora_experts: expected"
    if len({len(up) or len(down), len(down) or len(up)}) > 1:
        raise ValueError(
            f"{where} the same adapters in up and down beside adapter_index, None for one that a "
            f"projection lacks, but got {len(up)} and {len(down)}"
        )
    if index.shape != (tokens,) or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(
            f"{where} adapter_index of integers and shape [{tokens}], one for each token, but got "
            f"{index.dtype} of {list(index.shape)}"
        )
    if torch.compiler.is_compiling() or not index.is_cpu or not tokens:
        return
    adapters = max(len(up), len(down))
    low, high = int(index.min()), int(index.max())
    if low < -1 or high >= adapters:
        raise IndexError(
            f"{where} adapter_index from -1 to {adapters - 1} for {adapters} adapters, but got "
            f"{low if low < -1 else high}"
        )


def _dropout_of(adapters: Sequence[ExpertsAdapter]) -> float:
    """The probability of dropout of a projection's adapters."""
    # Numbers, where a traced program has made them inputs.
    found = sorted({float(adapter.dropout) for adapter in adapters})
    if not all(0.0 <= p < 1.0 for p in found):
        raise ValueError(
            f"lora_ext.experts.lora_experts: expected dropout in [0, 1), but got {found}"
        )
    if len(found) > 1:
        raise ValueError(
            "lora_ext.experts.lora_experts: expected one dropout for all active adapters of a "
            f"mixture's experts, which share a mask, but got {found}; give them the same, or set "
            "one of them active at a time"
        )
    return found[0] if found else 0.0


def _with_number(adapter: ExpertsAdapter) -> ExpertsAdapter:
    """The adapter with a number as scaling: a scaling in a tensor is multiplied into B."""
    lora_a, lora_b, scaling, dropout = adapter
    if not isinstance(scaling, Tensor):
        return adapter
    if lora_a.dtype in HALVES:  # a half B times a scaling would be rounded again
        lora_a, lora_b = lora_a.float(), lora_b.float()
    return ExpertsAdapter(lora_a, lora_b * scaling, 1.0, dropout)
