"""What PEFT's accelerated layers share: one decision, which a forward runs and `explain` shows.

Within a block of `lora_ext.use_adapters`, and with PEFT's adapter_names, rows have different
adapters:

    y[m] = base(x)[m] + scaling_g * ((drop(x)[m] A_g^T) B_g^T + bias_g)       g: adapter of row m

PEFT loops over the adapters, each with a copy of its samples, and raises an error in training.
Cases that are not computed here are left to that loop if a name for each sample is sufficient.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor

from ..call import Call, Decision, Path
from ..rows.row_adapters import BASE_NAME, RowAdapters, current_row_adapters, forget
from .reasons import adapters_state, is_passed_over
from .variants import row_reason

NONE_ACTIVE = "none of the active adapters is in this layer"
NONE_OF_ROWS = "none of the batch's adapters is in this layer"


class Accelerated:
    """A mix-in placed before a class of PEFT, whose rows can have different adapters."""

    row_adapters: Any = None  # as in lora_ext.nn.LoRALayer

    decide: Any  # (self, call) -> how a forward is computed, and why
    example: Any  # (self, rows, block) -> an x that suits the base, as `LoRALayer.example`

    def path(self, rows: int | None = None) -> tuple[Path, str]:
        """As `LoRALayer.path`."""
        return self.decision(rows).explained()

    def decision(self: Any, rows: int | None = None) -> Decision:
        """`decide` for the next forward, as `LoRALayer.decision`."""
        block = rows_of(self, {})
        found = self.decide(Call(self.example(rows, block), block))
        if found.path == Path.BASE or not is_passed_over(self):
            return found
        reason = "the layer's forward was replaced, as by hooks, before lora_ext.accelerate"
        return Decision(self.forward, Path.PEFT, reason)

    def delete_adapter(self: Any, adapter_name: str) -> None:
        forget(self, adapter_name)
        LoraLayer.delete_adapter(self, adapter_name)

    def pefts_forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        # By name: torch.compile does not follow `super()` in a variable on Python 3.13.
        parent: Any = super(Accelerated, self)  # noqa: UP008
        return parent.forward(x, *args, **kwargs)


def forward_over(theirs: Any) -> Any:
    """The forward of a class that replaces `theirs`. It calls `theirs` by name: hooks on the
    instance may keep a bound method that outlives `decelerate`, in which self is of PEFT's class.
    """

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self) is theirs:
            return theirs.forward(self, x, *args, **kwargs)
        rows = rows_of(self, kwargs)
        if rows is not None:
            kwargs.pop("alora_offsets", None)  # the rows with aLoRA's adapters are in the block
        return self.decide(Call(x, rows, args, kwargs)).run(x)

    return forward


def rows_of(layer: Any, kwargs: Mapping[str, Any]) -> RowAdapters | None:
    """The block whose adapters the rows of a forward have, None for the active ones."""
    rows = None if layer.row_adapters is None else current_row_adapters(layer)
    return None if layer._disable_adapters or "adapter_names" in kwargs else rows


def names_of(layer: Any, table: Container[str], rows: RowAdapters | None) -> list[str]:
    """The adapters of a layer's table that a forward has, in PEFT's order or the block's."""
    active = layer._active_adapter if rows is None else rows.names
    return [name for name in ([active] if isinstance(active, str) else active) if name in table]


def settled(layer: Any, call: Call, names: list[str]) -> Decision | None:
    """The decision by conditions that hold for any layer, or None if there are updates to add."""
    rows, state = call.rows, adapters_state(layer)
    if rows is not None and layer.merged_adapters:
        merged = f"{layer.merged_adapters} are merged into the weight; call unmerge_adapter first"
        return by_peft(layer, call, merged, is_refused=True)
    if state is not None:
        return by_peft(layer, call, state[1], state[0])
    if call.args or call.kwargs:
        return by_peft(layer, call, "the layer gets more arguments than x")
    if rows is None:
        return None if names else by_peft(layer, call, NONE_ACTIVE, Path.BASE)
    reason = row_reason(layer, names, rows.is_pefts)
    if reason:
        return by_peft(layer, call, reason, is_refused=True)
    if rows.is_pefts and (call.x.dim() == 0 or len(call.x) != len(rows.index)):
        return by_peft(layer, call, "x has another number of samples than the batch")
    return None if names else Decision(layer._modules["base_layer"], Path.BASE, NONE_OF_ROWS)


def by_peft(
    layer: Any, call: Call, reason: str, path: Path = Path.PEFT, is_refused: bool = False
) -> Decision:
    """PEFT's own forward; for rows its loop, if it supports the case and computes it correctly.

    Args:
        is_refused: whether it does not.
    """
    given, rows, args, kwargs = call
    if rows is None:
        return Decision(lambda x: layer.pefts_forward(x, *args, **kwargs), path, reason)
    index = rows.index
    if rows.is_pefts or (not is_refused and index.dim() == 1 and len(given) == len(index)):

        def loop(x: Tensor) -> Tensor:
            names = rows.sample_names(BASE_NAME)
            return layer.pefts_forward(x, *args, adapter_names=names, **kwargs)

        return Decision(loop, Path.PEFT, f"each row its own adapter, in PEFT's loop: {reason}")

    def refuse(x: Tensor) -> Tensor:
        raise ValueError(
            f"lora_ext.use_adapters: expected a layer whose rows can have different adapters, but "
            f"in a {type(layer).__name__} {reason}"
        )

    return Decision(refuse, Path.PEFT, f"each row its own adapter, which PEFT refuses: {reason}")
