"""NamedAdapters: adapters by name next to a frozen weight, and their initial values.

    adapters      name -> AdapterSpec
    lora_a        name -> [r, in]         lora_a_init   name -> [r, in]    (PiSSA and OLoRA)
    lora_b        name -> [out, r]        lora_b_init   name -> [out, r]
    lora_bias     name -> [out]           (where the spec has lora_bias)

PiSSA and OLoRA start from factors of the weight. In the papers the initial product is subtracted
from the weight; here the weight is kept and the layer computes W + s (B A - B0 A0), a product of
rank 2 r. So any number of them can be added, switched, merged and deleted, and a bfloat16 weight is
not rounded a second time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..rows.row_adapters import RowAdapters, forget
from ..torch_state import is_sharded
from . import initialize
from .adapter_spec import DEFAULT_ADAPTER, MAX_RANK, AdapterSpec
from .over import DropIn

# The attributes that are ParameterDicts by adapter, in the order of a state dict.
TABLES = ("lora_a", "lora_b", "lora_bias", "lora_a_init", "lora_b_init")


class NamedAdapters(DropIn):
    """The adapters of a layer; `LoRALayer` defines how a forward uses them.

    Attributes:
        adapters: name -> `AdapterSpec`, in the order in which they were added.
        active_adapters: names whose updates are added, a tuple.
    """

    def _init_lora(self, base: nn.Module | None = None) -> None:
        super()._init_lora(base)
        self.adapters: dict[str, AdapterSpec] = {}
        self.active_adapters: tuple[str, ...] = ()
        # The layer's part of an `AdapterPool`, a `LayerPool`.
        self.pool: Any = None
        self.lora_a = nn.ParameterDict()
        # This hook is never called, but its presence matters: nn.TransformerEncoderLayer reads
        # linear1.weight directly, without the adapters, unless a module within it has a hook.
        self.lora_a.register_forward_pre_hook(_unused_hook)
        self.lora_b = nn.ParameterDict()
        self.lora_bias = nn.ParameterDict()
        self.lora_a_init = nn.ParameterDict()
        self.lora_b_init = nn.ParameterDict()

    # Overridden by a subclass for its base.

    def matrix(self, weight: Tensor) -> Tensor:
        """The ``[out, in]`` view of a tensor in the layout of ``self.weight``."""
        raise NotImplementedError

    @property
    def stored_weight(self) -> Tensor:
        """The tensor in which the base stores its weight; the adapters are on its device."""
        return self.weight

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of the base's product."""
        out_features, in_features = self.matrix(self.weight).shape
        return out_features, in_features

    def weight_values(self) -> Tensor:
        """The weight ``[out, in]``, for an init that uses its values."""
        return self.matrix(self.weight.detach())

    def factor_dtype(self, wanted: torch.dtype | None = None) -> torch.dtype:
        """The dtype of an adapter; if `wanted` is None float32, on a float64 weight float64."""
        if wanted is not None:
            return wanted
        return torch.float64 if self.stored_weight.dtype == torch.float64 else torch.float32

    def factor_shapes(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of lora_a and lora_b as they are stored."""
        out_features, in_features = self.matrix_shape
        return (r, in_features), (out_features, r)

    def initialize(self, name: str) -> None:
        """Sets the initial values of the adapter, by the init of its spec."""
        spec, lora_a, lora_b = self.adapters[name], self.lora_a[name], self.lora_b[name]
        if not spec.subtracts_init:
            initialize.plain_(spec, lora_a, lora_b)
        else:
            factors = initialize.pissa if spec.init_lora_weights == "pissa" else initialize.olora
            first_a, first_b = factors(self.weight_values(), spec)
            pairs = (lora_a, self.lora_a_init, first_a), (lora_b, self.lora_b_init, first_b)
            for factor, subtracted, first in pairs:
                with torch.no_grad():
                    factor.copy_(first)
                subtracted[name] = nn.Parameter(factor.detach().clone(), requires_grad=False)

    def spec_of(self, name: str) -> AdapterSpec | None:
        """The spec of an adapter of the layer or of its pool, None if there is none."""
        spec = self.adapters.get(name)
        if spec is None and self.pool is not None and name in self.pool:
            return self.pool.specs[name]
        return spec

    def rank(self, name: str) -> int:
        """R of `factors`, the rank that determines the adapter's cost."""
        return self.factors(name)[0].shape[0]

    def row_names(self, rows: RowAdapters) -> list[str]:
        """The adapters of a block of `use_adapters` that the layer has."""
        own, pooled = self.adapters, self.pool
        if pooled is None:
            return [name for name in rows.names if name in own]
        specs, names = pooled.specs, pooled.names
        return [n for n in rows.names if n in own or (n in specs and n in names)]

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A ``[R, in]``, B ``[out, R]``) with delta W = scaling * B A; R is r, or 2 r if the init
        is subtracted."""
        if name not in self.adapters and self.pool is not None:
            return self.pool.slots[name]
        lora_a, lora_b = self.lora_a[name], self.lora_b[name]
        if name in self.lora_a_init:
            lora_a = torch.cat([lora_a, self.lora_a_init[name]])
            lora_b = torch.cat([lora_b, -self.lora_b_init[name]], dim=1)
        return lora_a, lora_b

    # Adapters by name.

    def add_adapter(
        self, adapter_name: str, spec: AdapterSpec, dtype: torch.dtype | None = None
    ) -> None:
        """Adds an adapter and freezes the weight. If it is the only one, it becomes active and
        trainable.

        Args:
            adapter_name: without dots, since it is part of the state dict's keys.
            spec: rank, alpha and so on.
            dtype: of the factors; None is float32 on a half weight, else the weight's.

        Raises:
            ValueError: the name is taken or cannot be used, the rank does not fit, or a merge or
                init needs values that the weight does not have (meta device).
            RuntimeError: the weight is sharded over processes.
        """
        self.check_whole("add_adapter")
        self._check_new(adapter_name, spec)
        weight = self.stored_weight
        like: dict[str, Any] = {"dtype": self.factor_dtype(dtype), "device": weight.device}
        with torch.inference_mode(False):  # parameters must be able to train later
            shape_a, shape_b = self.factor_shapes(spec.r)
            lora_a, lora_b = torch.empty(shape_a, **like), torch.empty(shape_b, **like)
            try:
                self.adapters[adapter_name] = spec
                self.lora_a[adapter_name], self.lora_b[adapter_name] = (
                    nn.Parameter(lora_a),
                    nn.Parameter(lora_b),
                )
                if spec.lora_bias:
                    out_features = self.matrix_shape[0]
                    self.lora_bias[adapter_name] = nn.Parameter(torch.zeros(out_features, **like))
                self.initialize(adapter_name)
            except BaseException:  # also an interrupt must not leave an incomplete adapter
                self._remove(adapter_name)
                raise
        weight.requires_grad_(False)
        is_alone = len(self.adapters) == 1
        self._set_trainable(adapter_name, is_alone)
        if is_alone:
            self.active_adapters = (adapter_name,)

    def _add_default(self, spec: AdapterSpec | None, dtype: torch.dtype | None) -> None:
        if spec is not None:
            self.add_adapter(DEFAULT_ADAPTER, spec, dtype)

    def _check_new(self, name: str, spec: AdapterSpec) -> None:
        where = f"lora_ext.nn.{type(self).__name__}.add_adapter"
        # ParameterDict keeps entries as attributes: "keys" would hide its method.
        if not name or "." in name or hasattr(nn.ParameterDict(), name):
            raise ValueError(
                f"{where}: expected a name that is not empty, has no dot and is no attribute of "
                f"nn.ParameterDict, but got {name!r}"
            )
        if name in self.adapters or (self.pool is not None and name in self.pool.names):
            raise ValueError(
                f"{where}: {name!r} exists already; delete_adapter it first or choose another name"
            )
        self._check_weight(where)
        if spec.subtracts_init:
            limit = min(*self.matrix_shape, MAX_RANK // 2)
            if spec.r > limit:
                raise ValueError(
                    f"{where}: init {spec.init_lora_weights!r} takes r columns of a decomposition "
                    f"of the weight: expected r of at most {limit}, but got {spec.r}"
                )
            if self.stored_weight.is_meta:
                raise ValueError(
                    f"{where}: init {spec.init_lora_weights!r} needs the weight's values, but the "
                    "weight is on the meta device; load it first"
                )
            if spec.init_lora_weights == "pissa" and spec.scaling <= 0:
                raise ValueError(
                    f"{where}: init 'pissa' divides by the scaling: expected lora_alpha above 0, "
                    f"but got {spec.lora_alpha}"
                )

    def _check_weight(self, where: str) -> None:
        """Raises ValueError for a weight on which there can be no adapter."""
        if not self.weight.is_floating_point():
            raise ValueError(f"{where}: expected a floating weight, but got {self.weight.dtype}")

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; other active adapters stay active; unmerges if it was merged.

        Raises:
            ValueError: no adapter has this name.
            RuntimeError: the weight is sharded over processes.
        """
        self._known(adapter_name, "delete_adapter")
        self.check_whole("delete_adapter")
        forget(self, adapter_name)
        self._set_active(active for active in self.active_adapters if active != adapter_name)
        self._remove(adapter_name)

    def check_whole(self, method: str) -> None:
        """Raises RuntimeError if the weight is sharded over processes."""
        # FSDP keeps its own list of parameters: it would neither shard nor average a new one, and
        # would restore a deleted one.
        if is_sharded(self.stored_weight):
            raise RuntimeError(
                f"lora_ext.nn.{type(self).__name__}.{method}: expected a whole weight, but it is "
                f"sharded (DTensor); {method} before fully_shard"
            )

    def _remove(self, name: str) -> None:
        self.adapters.pop(name, None)
        for table in self.tables().values():
            if name in table:
                del table[name]

    def set_adapter(self, adapter_names: str | Iterable[str]) -> None:
        """Makes exactly these adapters active and trainable; their updates add up.

        A weight merged from any other adapter is unmerged.

        Raises:
            ValueError: no adapter has one of the names, or a name comes twice.
        """
        adapter_names = self._known(adapter_names, "set_adapter")
        self._set_active(adapter_names)
        for name in self.adapters:
            self._set_trainable(name, name in adapter_names)

    def _set_active(self, names: Iterable[str]) -> None:
        self.active_adapters = tuple(names)

    def _set_trainable(self, name: str, trainable: bool) -> None:
        for table in (self.lora_a, self.lora_b, self.lora_bias):
            if name in table:
                table[name].requires_grad_(trainable)

    def _known(self, names: str | Iterable[str], method: str) -> tuple[str, ...]:
        names = (names,) if isinstance(names, str) else tuple(names)
        unknown = [name for name in names if name not in self.adapters]
        if unknown or len(set(names)) != len(names):
            raise ValueError(
                f"lora_ext.nn.{type(self).__name__}.{method}: expected distinct names out of "
                f"{list(self.adapters)}, but got {list(names)}"
            )
        return names

    def tables(self) -> dict[str, nn.ParameterDict]:
        """All tables of the adapters: attribute name -> ParameterDict by adapter."""
        return {name: getattr(self, name) for name in TABLES}

    def extra_repr(self) -> str:
        shown = [
            f"{name}{'' if name in self.active_adapters else ' (inactive)'}: r={spec.r}, "
            f"lora_alpha={spec.lora_alpha:g}, lora_dropout={spec.lora_dropout:g}"
            for name, spec in self.adapters.items()
        ]
        return ", ".join([super().extra_repr(), f"adapters={{{'; '.join(shown)}}}"])

    def __repr__(self) -> str:
        # One line, like the repr of the replaced layer, without the tables of parameters.
        return f"{type(self).__name__}({self.extra_repr()})"


def _unused_hook(module: nn.Module, args: Any) -> None:
    """The hook of a ParameterDict, which is never called."""
