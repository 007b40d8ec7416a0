"""LoRALayer: named adapters on a frozen base layer of any kind.

The base's own parameters keep their names (``weight``, ``bias``) and are never written, so that the
base's checkpoints load unchanged and `unmerge` has nothing to undo. Each class has one purpose and
uses only the classes above it:

    DropIn            replaces a module of torch
    NamedAdapters     holds the adapters next to its weight
    LoRALayer         selects what a forward adds: active, merged, disabled or per-row adapters
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor, nn

from ..call import Call, Decision, Path
from ..call.decision import example
from ..rows.row_adapters import RowAdapters, current_row_adapters
from .merging import merged_tensors
from .named_adapters import NamedAdapters


class LoRALayer(NamedAdapters):
    """Base class of the layers; a subclass also derives from the nn.Module that it replaces.

    Attributes:
        merged_adapters: names that the merged weight holds, () when it is not merged.
    """

    merged_weight: Tensor | None
    merged_bias: Tensor | None
    # Set on the instance by `use_adapters`; a graph guards what is declared.
    row_adapters: Any = None
    # Whether the weight is dense, and its name for messages.
    can_merge = True
    weight_name = "weight"

    def _init_lora(self, base: nn.Module | None = None) -> None:
        super()._init_lora(base)
        self.merged_adapters: tuple[str, ...] = ()
        # One entry for each open block of disable_adapter, in any thread.
        self._disabled: list[None] = []
        # Caches, not state: not in state dicts, but kept by .to(), copies and pickles.
        self.register_buffer("merged_weight", None, persistent=False)
        self.register_buffer("merged_bias", None, persistent=False)

    # Merging.

    @property
    def merged(self) -> bool:
        return self.merged_weight is not None

    def merge(self, adapter_names: str | Iterable[str] | None = None) -> None:
        """Computes W + sum of scaling * B A in float32 as a second weight, and uses it from now on.

        The layer's function stays the same: active adapters that are not merged are added to the
        product with the merged weight. W is kept, so `unmerge` is exact, at the cost of a second
        weight in memory (`lora_ext.merge_and_unload` keeps one). The merged weight is a
        snapshot: merge again after the adapters change. ``train()`` and loading a state dict
        unmerge. Merged adapters get no gradient.

        Args:
            adapter_names: active adapters; None merges all of them.

        Raises:
            ValueError: a name is unknown, comes twice, or is not active.
            RuntimeError: an update is not finite, or the weight is sharded; nothing is changed.
        """
        adapter_names = (
            self.active_adapters if adapter_names is None else self._known(adapter_names, "merge")
        )
        self.check_active(adapter_names)
        self.install_merged(*self.compute_merged(adapter_names))

    def check_active(self, names: Iterable[str], at: str = "") -> None:
        """Raises ValueError for names that are not active: merging them would change the output."""
        inactive = [name for name in names if name not in self.active_adapters]
        if inactive:
            raise ValueError(
                f"lora_ext.nn.{type(self).__name__}.merge: expected active adapters, which are "
                f"{list(self.active_adapters)}, but got {inactive}{at}; call set_adapter first"
            )

    def compute_merged(
        self, names: str | Iterable[str] | None = None
    ) -> tuple[tuple[str, ...], Tensor | None, Tensor | None]:
        """(names, weight, bias) for `install_merged`; changes nothing."""
        names = self._known(self.active_adapters if names is None else names, "merge")
        if names and not self.can_merge:
            self._refuse_merge()
        weight, bias = merged_tensors(self, names) if names else (None, None)
        return names, weight, bias

    def _refuse_merge(self) -> NoReturn:
        raise RuntimeError(
            f"lora_ext.nn.{type(self).__name__}.merge: expected a dense {self.weight_name} to "
            "merge into, but it is quantised, and W + B A, quantised again, would be another "
            "layer; keep the adapters beside it, or save_adapter and merge into the model that "
            "was quantised"
        )

    def install_merged(
        self, names: tuple[str, ...], weight: Tensor | None, bias: Tensor | None
    ) -> None:
        """Sets the tensors of `compute_merged`; cannot fail."""
        self.merged_adapters = names
        self.merged_weight, self.merged_bias = weight, bias

    def unmerge(self) -> None:
        """Drops the merged weight. W was never written, so it is unchanged."""
        self.install_merged((), None, None)

    def _set_active(self, names: Iterable[str]) -> None:
        """Sets the active adapters; a weight merged from any other adapter is unmerged."""
        names = tuple(names)
        if not set(self.merged_adapters) <= set(names):
            self.unmerge()
        super()._set_active(names)

    def check_unmerged(self) -> None:
        """Raises RuntimeError for a merged layer, whose weight is the same for every row."""
        if self.merged_adapters:
            raise RuntimeError(
                f"lora_ext.use_adapters: expected adapters that are not merged, but a "
                f"{type(self).__name__} has {list(self.merged_adapters)} merged into its weight, "
                "for every row; unmerge first"
            )

    @property
    def adapters_enabled(self) -> bool:
        """False within a block of `disable_adapter`."""
        return not self._disabled

    @contextmanager
    def disable_adapter(self) -> Any:
        """Within the block the layer computes its base alone, merged or not, for all threads.

        Blocks may overlap; the adapters are back when the last one is left.
        """
        self._disabled.append(None)
        try:
            yield self
        finally:
            self._disabled.pop()

    # What a forward computes.

    def path(self, rows: int | None = None) -> tuple[Path, str]:
        """How the next forward on an x in the base's dtype is computed, and why.

        Args:
            rows: number of rows of x as ``[rows, in]``, which selects the kernel; None for many.
        """
        return self.decision(rows).explained()

    def decision(self, rows: int | None = None) -> Decision:
        """`decide` for the next forward, as for `path`."""
        block = self.adapters_of_rows()
        return self.decide(Call(self.example(rows, block), block))

    def example(self, rows: int | None, block: RowAdapters | None) -> Any:
        """An x that suits the base, for `decision`."""
        return example(self, self.stored_weight.dtype, rows, block, self.matrix_shape[1])

    def decide(self, call: Call) -> Decision:
        """How a forward is computed."""
        rows = call.rows
        if rows is None and not self.adapters:
            detail = None if self.pool is None else self._pool_path
            return Decision(self.base_forward, Path.BASE, "no adapter", detail)
        if self._disabled:
            return Decision(self.base_forward, Path.BASE, "adapters are disabled")
        if rows is not None:
            self.check_unmerged()
        names = self.added_adapters if rows is None else self.row_names(rows)
        if names:
            found = self._decide_for(names, call)
            return found.noted(self._merged_note()) if self.merged else found
        if rows is not None:
            reason = "none of the batch's adapters is in this layer"
            return Decision(self.base_forward, Path.BASE, reason)
        if self.merged:
            return Decision(self.base_forward, Path.MERGED, self._merged_note())
        return Decision(self.base_forward, Path.BASE, "no adapter is active")

    def _decide_for(self, names: Sequence[str], call: Call) -> Decision:
        """`decide` for adapters of the layer, which all rows have, or each its own."""
        raise NotImplementedError

    def _merged_note(self) -> str:
        return f"merged: {', '.join(self.merged_adapters)}"

    def base_forward(self, x: Tensor) -> Tensor:
        """The base's y, without adapters but those that are merged."""
        raise NotImplementedError

    def _pool_path(self) -> tuple[Path, str]:
        used, capacity = len(self.pool.names), len(self.pool.ranks)
        what = f"a pool with {used} of {capacity} slots used, only in blocks of use_adapters"
        return Path.BASE, what

    def adapters_of_rows(self) -> RowAdapters | None:
        """The open block of `use_adapters` that applies to a forward now, or None."""
        return current_row_adapters(self)

    @property
    def added_adapters(self) -> tuple[str, ...]:
        """The active adapters that the merged weight does not contain."""
        if not self.merged_adapters:
            return self.active_adapters
        return tuple(name for name in self.active_adapters if name not in self.merged_adapters)

    @property
    def computes_base(self) -> bool:
        """Whether a forward computes the base only, with the merged weight if there is one."""
        return bool(self._disabled) or not self.added_adapters

    def base_operands(self) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of the base's product: the merged tensors if they are in use."""
        if self.merged_weight is None or self._disabled:
            return self.weight, self.bias
        return self.merged_weight, self.bias if self.merged_bias is None else self.merged_bias

    # Methods of nn.Module.

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_disabled": []}  # a copy or a pickle is not in a block

    def train(self, mode: bool = True) -> LoRALayer:
        """As nn.Module.train; training mode unmerges, since merged adapters get no gradient."""
        if mode and self.merged:
            self.unmerge()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)
