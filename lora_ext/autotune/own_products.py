"""Times layers on quantised bases whose library has its own product for few rows, against the
op."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from ..functional import lora_linear, lora_update
from ..measure import interleaved_us, share
from ..quantized.few_rows import FEW_ROWS, Kind, kind_of, measured
from ..quantized.layers import quantized_base
from ..quantized.weight import QuantizedBase

_RANK = 16  # rank of the update, the same for both

Forward = Callable[[Tensor], Tensor]
BaseFor = Callable[[Tensor | None], QuantizedBase | str | None]


def measure(
    model: nn.Module, rows: Iterable[int], device: torch.device, say: Callable[[str], object]
) -> list[str]:
    """Times each kind of layer on a device whose library has a product without dequantisation: this
    product followed by `lora_update`, and the op. `few_rows` uses the results from now on. Returns
    a line of text for each kind and number of rows, with which `say` was called.

    Layers are called without gradients and in their current mode: on a CPU in eval mode
    bitsandbytes then changes the order of its codes.
    """
    lines, counts = [], sorted(set(rows))
    with torch.no_grad():
        for kind, (forward, base) in _kinds(model, device).items():
            found = []
            for count in counts:
                times = interleaved_us(_calls(forward, base, count), device)
                own, op = (statistics.median(times[name]) for name in ("own", "op"))
                found.append((count, share(times, "own", "op")))
                faster = "its own product" if found[-1][1] < 1.0 else "the op"
                line = f"{kind}, {count} rows: {faster} (own {own:.1f} us, op {op:.1f} us)"
                say(line)
                lines.append(line)
            measured[kind] = tuple(found)
    return lines


def _kinds(model: nn.Module, device: torch.device) -> dict[Kind, tuple[Forward, QuantizedBase]]:
    found = {}
    for forward, base_for in _layers(model):
        base = base_for(None)
        if not isinstance(base, QuantizedBase) or base.weight.device != device:
            continue
        measured.pop(kind_of(base.weight, base.dtype), None)  # so that one row has what there is
        x = torch.zeros(1, base.weight.shape[1], dtype=base.dtype, device=device)
        if base_for(x) != FEW_ROWS:
            continue
        forward(x)  # may change the order of the codes
        base = base_for(None)
        if isinstance(base, QuantizedBase):
            found.setdefault(kind_of(base.weight, base.dtype), (forward, base))
    return found


def _layers(model: nn.Module) -> Iterator[tuple[Forward, BaseFor]]:
    """(its base's own forward, the result of `quantized_base` for an x) of layers with adapters."""
    from ..model_layers import peft_layers
    from ..models.model import lora_layers
    from ..nn import LoRAQuantizedLinear

    for _, layer in lora_layers(model):
        if isinstance(layer, LoRAQuantizedLinear):
            yield layer.base_forward, lambda x, at=layer: quantized_base(at, x, at.base_type)
    each: nn.Module
    for _, each in peft_layers(model):
        base = each.get_base_layer()  # pyright: ignore[reportCallIssue]
        if isinstance(base, nn.Module):
            yield base, lambda x, at=base: quantized_base(at, x)


def _calls(forward: Forward, base: QuantizedBase, rows: int) -> dict[str, Callable[[], Tensor]]:
    """The layer's own product and the update, and the op."""
    out_features, in_features = base.weight.shape
    words = {"dtype": base.dtype, "device": base.weight.device}
    x, lora_a = torch.ones(rows, in_features, **words), torch.ones(_RANK, in_features, **words)
    lora_b = torch.ones(out_features, _RANK, **words)

    def own() -> Tensor:
        return lora_update(forward(x), x, lora_a, lora_b)

    def op() -> Tensor:
        return lora_linear(x, base.weight, lora_a, lora_b, base.call_bias)

    return {"own": own, "op": op}
