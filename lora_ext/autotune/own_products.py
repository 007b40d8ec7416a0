"""Times layers on quantised bases whose library has its own product for few rows, against the
op."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..functional import lora_linear, lora_update
from ..quantized.base import QuantizedBase
from ..quantized.few_rows import FEW_ROWS, Kind, forced, keep, kind_of
from ..quantized.layers import quantized_base
from . import clock

_RANK = 16  # rank of the update, the same for both


class _Layer(NamedTuple):
    """The quantised base of a layer with adapters.

    Attributes:
        forward: its own forward.
        base_for: the result of `quantized_base` for an x.
    """

    forward: Callable[[Tensor], Tensor]
    base_for: Callable[[Tensor | None], QuantizedBase | str | None]


def measure(
    model: nn.Module, rows: Iterable[int], device: torch.device, say: Callable[[str], object]
) -> list[str]:
    """Times each kind of layer on a device whose library has a product without dequantisation: this
    product followed by `lora_update`, and the op. `few_rows` uses the results from now on.

    Args:
        model: its layers are called without gradients and in their current mode: on a CPU in eval
            mode bitsandbytes then changes the order of its codes.
        rows: batch times sequence length of later calls.
        device: the device of the layers that are timed.
        say: is called with each line.

    Returns:
        A line of text for each kind and number of rows.
    """
    lines, counts = [], sorted(set(rows))
    with torch.no_grad():
        for kind, (layer, base) in _kinds(model, device).items():
            times = []
            for count in counts:
                own, op = _microseconds(layer, base, count)
                times.append((count, op / own))
                faster = "its own product" if own < op else "the op"
                line = f"{kind}, {count} rows: {faster} (own {own:.1f} us, op {op:.1f} us)"
                say(line)
                lines.append(line)
            keep(kind, times)
    return lines


def _kinds(model: nn.Module, device: torch.device) -> dict[Kind, tuple[_Layer, QuantizedBase]]:
    found = {}
    for layer in _layers(model):
        base = layer.base_for(None)
        if not isinstance(base, QuantizedBase) or base.weight.device != device:
            continue
        x = torch.zeros(1, base.weight.shape[1], dtype=base.dtype, device=device)
        with forced(True):
            has_own = layer.base_for(x) == FEW_ROWS
        if not has_own:
            continue
        layer.forward(x)  # may change the order of the codes
        base = layer.base_for(None)
        if isinstance(base, QuantizedBase):
            found.setdefault(kind_of(base.weight, base.dtype), (layer, base))
    return found


def _layers(model: nn.Module) -> Iterator[_Layer]:
    from ..models.model import lora_layers
    from ..nn import LoRAQuantizedLinear
    from ..peft.report import peft_layers

    for _, layer in lora_layers(model):
        if isinstance(layer, LoRAQuantizedLinear):
            yield _Layer(
                layer.base_forward, lambda x, at=layer: quantized_base(at, x, at.base_type)
            )
    each: nn.Module
    for _, each in peft_layers(model):
        base = each.get_base_layer()  # pyright: ignore[reportCallIssue]
        if isinstance(base, nn.Module):
            yield _Layer(base, lambda x, at=base: quantized_base(at, x))


def _microseconds(layer: _Layer, base: QuantizedBase, rows: int) -> tuple[float, float]:
    """(its own product and the update, the op), medians of alternating rounds."""
    out_features, in_features = base.weight.shape
    words = {"dtype": base.dtype, "device": base.weight.device}
    x, lora_a = torch.ones(rows, in_features, **words), torch.ones(_RANK, in_features, **words)
    lora_b = torch.ones(out_features, _RANK, **words)

    def own() -> Tensor:
        return lora_update(layer.forward(x), x, lora_a, lora_b)

    def op() -> Tensor:
        return lora_linear(x, base.weight, lora_a, lora_b, base.call_bias)

    calls = {"own": own, "op": op}
    for call in (own, op) * clock.WARM_UP:
        call()
    times = clock.interleaved_us(calls, base.weight.device)
    return statistics.median(times["own"]), statistics.median(times["op"])
