"""Reports on how a model computes and what it trains, for print()."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any, overload

from torch import Tensor, nn

from .call import Decision, Path
from .kernels.kernel_plan import CallPlan, explain_call
from .model_layers import peft_layers
from .models.model import lora_layers
from .nn import LoRALayer
from .nn.frozen import frozen_decision
from .packing import packed_bytes
from .peft.reasons import HOOKED, has_hooks
from .peft.report import peft_decision
from .torch_state import is_sharded

# Paths on which our kernels, or torch's products arranged by us, compute the update.
ACCELERATED = {Path.FUSED, Path.PACKED, Path.LIBRARY, Path.ADDED}
_OTHERS = {Path.PEFT: "by PEFT's own forward", Path.BASE: "without an adapter now"}


@dataclass(frozen=True)
class LayerPath:
    """How one layer computes its next forward.

    Attributes:
        name: dotted path of the layer in the model.
        kind: its class.
        path: one of `lora_ext.call.Path`, each equal to its text such as "fused".
        reason: why.
        workspace_bytes: for a quantised base that is dequantised for the op, the size of the
            dequantised weight; else 0.
    """

    name: str
    kind: str
    path: Path
    reason: str
    workspace_bytes: int = 0


class Explanation(list[LayerPath]):
    """A list of `LayerPath`; str() is a line of how many layers are accelerated, then a table, with
    equal layers counted on one line.

    Attributes:
        workspace_bytes: size of the largest dequantised weight. The layers with a quantised base
            share this memory, one at a time; there is one for each device, stream and dtype.
        packed_bytes: size of the packed copies of weights that `lora_ext.warmup` made on a CPU.
        frozen: the modules without adapters that `lora_ext.nn.frozen` computes.
    """

    packed_bytes: int = 0
    frozen: tuple[LayerPath, ...] = ()

    @property
    def workspace_bytes(self) -> int:
        return max((layer.workspace_bytes for layer in (*self, *self.frozen)), default=0)

    def __str__(self) -> str:
        if not self:
            return "no layer has adapters; see lora_ext.apply_lora and lora_ext.accelerate"
        lines: dict[tuple[str, str, str, str], list[str]] = {}
        for layer in self:
            short = ".".join("*" if part.isdigit() else part for part in layer.name.split("."))
            key = (short or "(itself)", layer.kind, layer.path, layer.reason)
            lines.setdefault(key, []).append(layer.name)
        others = Counter(layer.path for layer in self if layer.path not in ACCELERATED)
        left = ", ".join(f"{count} {_OTHERS.get(path, path)}" for path, count in others.items())
        count = len(self) - others.total()
        text = [
            f"{count} of {len(self)} layers accelerated" + (f"; others: {left}" if left else "")
        ]
        rows = [("layer", "count", "class", "path", "reason")]
        rows += [(k[0], str(len(names)), *k[1:]) for k, names in lines.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        text += [
            "  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[4]])
            for row in rows
        ]
        frozen = Counter((layer.kind, layer.reason) for layer in self.frozen)
        for (kind, reason), count in frozen.items():
            text.append(f"without an adapter, computed here: {count} {kind}, {reason}")
        sharing = sum(layer.workspace_bytes > 0 for layer in (*self, *self.frozen))
        if sharing:
            mib = self.workspace_bytes / 2**20
            text.append(f"memory to dequantise: {mib:.3g} MiB, shared by {sharing} layers")
        if self.packed_bytes:
            text.append(f"packed weights: {self.packed_bytes / 2**20:.3g} MiB")
        return "\n".join(text)


@overload
def explain(model: nn.Module, rows: int | None = None) -> Explanation: ...


@overload
def explain(
    model: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, dropout_p: float = 0.0
) -> CallPlan: ...


def explain(model, *arguments, **named):
    """Explains how layers, or one call on given tensors, are computed, and why.

        print(lora_ext.explain(model))                          # each layer's next forward
        print(lora_ext.explain(x, weight, lora_a, lora_b))      # one call of lora_linear

    Args:
        model: a model with layers of this package or of PEFT, or one layer; or x, followed by
            weight, lora_a, lora_b and dropout_p as `lora_linear` takes them.
        rows: with a model, the number of rows of x (batch times sequence), which selects the
            kernel; None for many.

    Returns:
        A table of layers, or a `CallPlan`: on CUDA, the kernels, their tiles, splits and workspace
        for forward and backward, and the result of their check on this device.
    """
    if isinstance(model, Tensor):
        if len(arguments) + len(named.keys() & {"weight", "lora_a", "lora_b"}) < 3:
            raise TypeError(
                "lora_ext.explain: expected x, weight, lora_a and lora_b of a call, but got x and "
                f"{len(arguments) + len(named)} more; or a model"
            )
        return explain_call(model, *arguments, **named)
    if not isinstance(model, nn.Module):
        raise TypeError(
            "lora_ext.explain: expected a model (nn.Module), or x, weight, lora_a and lora_b of a "
            f"call, but got {type(model).__name__}"
        )
    return _explain_model(model, *arguments, **named)


def _explain_model(model: nn.Module, rows: int | None = None) -> Explanation:
    found = Explanation()
    managed = _managed_by_fsdp(model)
    for name, layer in [*lora_layers(model), *peft_layers(model)]:
        if _is_in_pieces(layer, managed):
            decision = _sharded(layer)
        elif isinstance(layer, LoRALayer):
            decision = layer.decision(rows)
        else:
            decision = peft_decision(layer, rows)
        found.append(_line(name, layer, decision))
    bases = {f"{layer.name}.base_layer" for layer in found}
    others = ((name, module) for name, module in model.named_modules() if name not in bases)
    decisions = ((name, module, frozen_decision(module)) for name, module in others)
    found.frozen = tuple(_line(n, m, made) for n, m, made in decisions if made is not None)
    found.packed_bytes = packed_bytes(model)
    return found


def _line(name: str, layer: nn.Module, decision: Decision) -> LayerPath:
    path, reason = decision.explained()
    return LayerPath(name, type(layer).__name__, path, reason, decision.workspace_bytes)


def _managed_by_fsdp(model: nn.Module) -> set[int]:
    """The ids of the modules that FSDP1 or FSDP2 gathers for their forwards."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # slow to import; absent if unused
    if fsdp is None:
        return set()
    kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    wrappers = [module for module in model.modules() if isinstance(module, kinds)]
    return {id(part) for wrapper in wrappers for part in wrapper.modules()}


def _is_in_pieces(layer: nn.Module, managed: set[int]) -> bool:
    """Whether FSDP or ZeRO-3 has sharded a layer: its parameters are parts of flat ones, or it has
    none; or it is PEFT's, some of whose are parts."""
    own, is_managed = list(layer.parameters()), id(layer) in managed
    if is_managed and not isinstance(layer, LoRALayer) and any(map(is_sharded, own)):
        return True
    return max((parameter.dim() for parameter in own), default=0 if is_managed else 2) < 2


def _sharded(layer: nn.Module) -> Decision:
    parts = [part for path, part in layer.named_modules() if path.startswith("lora_")]
    if isinstance(layer, LoRALayer) or not any(map(has_hooks, parts)):
        reason = "sharded; the layer chooses when it is gathered"
        return Decision(layer.forward, Path.SHARDED, reason)
    # ZeRO-3's hooks, which remain when it is gathered.
    return Decision(layer.forward, Path.PEFT, HOOKED)
