"""Measures which products of a model's frozen weights are fastest: by panels or by torch, and packs
the weights where that is faster still."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

import lora_ext._C as _C

from ..device import free_memory
from ..packed_weight import PackedWeight, Wins, pack_weight
from .layers import Kind, Weight, packable_layers, weights_of
from .trial import Packing, Products, Trial

# A trial alternates between weights of this many bytes, if the model has them: more than a core's
# share of the last-level cache.
_BYTES_OF_TRIAL = 2**26
_MOST_IN_TRIAL = 8


# One token, the tokens of a few requests, a training batch.
DECODE_AND_TRAINING = (1, 16, 2048)


def default_budget() -> int:
    """A quarter of the memory that is available now: packed copies of frozen float32 weights, for
    both directions, take twice the size of the weights."""
    free = free_memory()
    return 2**30 if free is None else free // 4


def pack_weights(
    model: nn.Module,
    rows: Iterable[int],
    *,
    training: bool | None = None,
    budget: int | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Packing:
    """Times plain and packed products for each kind of weight, and packs where this is faster.
    Plain products, packed or not, go by panels or by torch from then on, whichever is faster.
    Existing packs are replaced.

    Args:
        model, rows, budget, say: as in `lora_ext.warmup`, on a CPU.
        training: whether to pack for dX also; None: if any parameter of the model is trained.

    Raises:
        ValueError: budget is negative.
    """
    if budget is not None and budget < 0:
        raise ValueError(f"lora_ext.warmup: expected a budget of 0 bytes or more, but got {budget}")
    budget = default_budget() if budget is None else budget
    counts = sorted(set(rows))
    unpack_weights(model)
    weights, reasons = weights_of(model)
    if torch.are_deterministic_algorithms_enabled():
        weights, reasons = [], ["nothing is timed under torch.use_deterministic_algorithms"]
    groups: dict[Kind, list[Weight]] = {}
    for weight in weights:
        groups.setdefault(weight.kind, []).append(weight)
    if training is None:
        training = any(parameter.requires_grad for parameter in model.parameters())
    products = []
    for kind, group in groups.items():
        for backward in (False, True)[: 1 + training]:
            say(f"timing {kind}, {'backward' if backward else 'forward'}")
            products.append(_measured(kind, group, counts, backward))
    left, wins = budget, {}
    # First what saves the most time for each byte.
    for each in sorted(products, key=lambda each: each.saved, reverse=True):
        if each.saved > 0:
            each.packed = min(each.count, left // each.kind.nbytes)
        left -= each.nbytes
        for weight in groups[each.kind][: each.packed]:
            wins.setdefault(id(weight), (weight, [(), ()]))[1][each.backward] = each.ratios
    for weight, won in wins.values():
        pack = _pack(weight, *map(bool, won)).of_layer()
        pack.wins = Wins(*won)
        for layer in weight.layers:
            layer.packed = pack
    products.sort(key=lambda each: (each.kind[:2], each.backward))
    return Packing(tuple(products), budget, tuple(reasons))


def pack_for(model: nn.Module, pack: bool | int | Iterable[int]) -> None:
    """`pack_weights` for the keyword `pack` of other functions, False, True or the rows of later
    calls, for a model on the CPU. TypeError if it is none of these; ValueError for rows below 1."""
    if pack is False:
        return
    rows = DECODE_AND_TRAINING if pack is True else (pack,) if isinstance(pack, int) else pack
    if isinstance(rows, str) or not isinstance(rows, Iterable):
        raise TypeError(f"lora_ext: expected pack as a bool or numbers of rows, but got {pack!r}")
    counts = list(rows)
    if not counts or not all(isinstance(count, int) and count >= 1 for count in counts):
        raise ValueError(f"lora_ext: expected rows of at least 1 to pack for, but got {counts}")
    if all(parameter.is_cpu for parameter in model.parameters()):
        pack_weights(model, counts)


def unpack_weights(model: nn.Module) -> None:
    """Frees the packs of a model's layers."""
    for layer in packable_layers(model):
        layer.packed = None


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the packs of a model's layers; tied weights count once."""
    packs = {id(layer.packed): layer.packed for layer in packable_layers(model) if layer.packed}
    return sum(pack.nbytes for pack in packs.values())


def _measured(kind: Kind, group: list[Weight], counts: list[int], backward: bool) -> Products:
    """What is fastest; of panels calls take that from now on."""
    count = min(len(group), _MOST_IN_TRIAL, max(1, _BYTES_OF_TRIAL // kind.nbytes))
    packs = [_pack(weight, not backward, backward) for weight in group[:count]]
    bias = group[0].bias
    bias = None if bias is None else bias.detach().to(kind.dtype)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        keep_panels(kind, backward, [])
        trials = [Trial(packs, bias, kind, rows, backward) for rows in counts]
        wrong = tuple(dict.fromkeys(name for trial in trials for name in trial.wrong()))
        found = tuple(trial.found(wrong) for trial in trials)
    # Otherwise the rule is the fastest.
    if wrong or any(each.gain < 1.0 for each in found):
        keep_panels(kind, backward, [each[:2] for each in found])
    return Products(kind, backward, found, wrong, len(group))


def keep_panels(
    kind: Kind, backward: bool, measured: Sequence[tuple[int, torch.dtype | None]]
) -> None:
    """Sets the panels for products of a kind in this process; none measured: as by the rule."""
    _C.set_measured_panels(*kind.matrix(backward), measured)


def _pack(weight: Weight, forward: bool, backward: bool) -> PackedWeight:
    return pack_weight(
        weight.parameter, forward=forward, backward=backward, transposed=weight.kind.transposed
    )
