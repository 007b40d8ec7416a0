"""LoRAQuantizedLinear: linear layers of other libraries, quantised, with adapters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..packed_weight import PackedWeight
from ..quantized.base import workspace_bytes
from ..quantized.layers import QuantizedBase, is_quantized, quantized_base
from ..torch_state import is_onnx_export, is_plain, is_transformed
from .adapter_spec import AdapterSpec
from .fused import FusedLoRALayer, check_dense
from .linear import DEFAULT_ADAPTER
from .mixed import mixed_onto
from .quantized_base import linear_on, mixed_linear_on, pool_linear_on
from .row_adapters import RowAdapters
from .updates import Update, added, added_in_turn, dtypes_obstacle, updates_obstacle

_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class LoRAQuantizedLinear(FusedLoRALayer):
    """A frozen, quantised linear layer of another library with low-rank adapters.

        y = base(x) + sum over active adapters of scaling * ((drop(x) lora_a^T) lora_b^T + bias)

    Where the base multiplies by its dequantised weight, base and update are one call of the op on
    it, forward and backward; else the base runs as it is and `lora_update` adds the rest. `path`
    says which, and why. The layers are those of `lora_ext.quantized.layers`.

    `around` and `from_linear` make one. It is of a class of its own that derives from the base's,
    too, such as LoRALinear4bit from bitsandbytes' Linear4bit: what the base keeps stays under its
    names, and its own methods write and read its part of a state dict.

    Shape:
        x ``[..., in_features]`` to y ``[..., out_features]`` in the dtype that the base returns;
        lora_a ``[r, in_features]``, lora_b ``[out_features, r]``, float32 unless an adapter_dtype
        says another.

    `merge` raises RuntimeError: W + B A would have to be quantised again.
    """

    # The class that the layer stands for is the base of its own class, see `class_over`.
    in_features: int
    out_features: int

    @classmethod
    def around(cls, base: nn.Module) -> Any:
        """The layer without an adapter in the place of `base`, whose tensors, mode and hooks it
        shares.

        Raises:
            TypeError: base is not a quantised layer that is known, or its forward is replaced on
                the instance.
        """
        cls._check_base(base)
        if "forward" in base.__dict__:
            raise TypeError(
                f"lora_ext.nn.LoRAQuantizedLinear: expected a plain {type(base).__name__}, but its "
                "forward is replaced on the instance; remove that first (of accelerate's hooks: "
                "accelerate.hooks.remove_hook_from_module(model, recurse=True))"
            )
        return _new(type(base), base)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        r: int = 8,
        alpha: float = 8.0,
        dropout: float = 0.0,
        use_rslora: bool = False,
        init: str = "kaiming",
        lora_bias: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRAQuantizedLinear:
        """The layer around a quantised one, with an adapter unless r is 0.

        Args:
            linear: the base, frozen from now on.
            r, alpha, dropout, use_rslora, init, lora_bias, adapter_dtype: as in `LoRALinear`.

        Raises:
            TypeError: as `around`.
            ValueError: a number is out of its range.
        """
        spec = AdapterSpec(r, alpha, dropout, use_rslora, init, lora_bias) if r != 0 else None
        layer = cls.around(linear)
        if spec is not None:
            layer.add_adapter(DEFAULT_ADAPTER, spec, adapter_dtype)
        return layer

    @classmethod
    def _check_base(cls, base: nn.Module) -> None:
        if isinstance(base, FusedLoRALayer) or not is_quantized(base):
            raise TypeError(
                "lora_ext.nn.LoRAQuantizedLinear: expected a quantised linear layer of "
                "bitsandbytes, torchao, HQQ, transformers or diffusers, exactly of its class, but "
                f"got {type(base).__module__}.{type(base).__qualname__}"
            )

    def _adopt(self, base: nn.Module) -> None:
        """All that the base has, not only a weight and a bias: what its forward reads."""
        self.__dict__.update(base.__dict__)
        for table in _TABLES:
            self.__dict__[table] = base.__dict__[table].copy()
        # torchao puts one on the instance, which would hide ours.
        shown = self.__dict__.pop("extra_repr", None)
        self.base_attributes = {} if shown is None else {"extra_repr": shown}

    def restored(self) -> nn.Module:
        base = self.base_type.__new__(self.base_type)
        nn.Module.__init__(base)
        base.__dict__.update({k: v for k, v in self.__dict__.items() if k not in _OWN_ATTRIBUTES})
        base.__dict__.update(self.base_attributes)
        for table in _TABLES:
            kept = self.__dict__[table]
            if isinstance(kept, set):
                base.__dict__[table] = kept - _OWN_TENSORS
            else:
                own = _OWN_TENSORS | set(self.tables()) | {"pool"}
                base.__dict__[table] = type(kept)((k, v) for k, v in kept.items() if k not in own)
        return base

    def as_base(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        self._refuse_merge()

    # What is there in the place of a dense weight.

    @property
    def stored_weight(self) -> Tensor:
        kept = self._parameters
        found = kept.get("weight")
        if found is None:
            found = kept.get("W_q")  # HQQ's name
        if found is None:
            raise RuntimeError(
                f"lora_ext.nn.{type(self).__name__}: expected a weight that is quantised, but the "
                "layer has none yet; load or quantise it first"
            )
        return found

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def weight_values(self) -> Tensor:
        found = quantized_base(self, None, self.base_type)
        if not isinstance(found, QuantizedBase):
            raise ValueError(
                f"lora_ext.nn.{type(self).__name__}: expected a weight whose values can be had, "
                f"for an init that starts from them, but {found}; choose init 'kaiming'"
            )
        with torch.no_grad():
            return found.weight.dequantize(torch.float32)

    def _check_weight(self, where: str) -> None:
        """Of any dtype."""

    # What a forward does.

    def forward(self, x: Tensor) -> Tensor:
        if self.__dict__.get("row_adapters") is not None:
            rows = self.adapters_of_rows()
            if rows is not None:
                return self.mixed(x, rows)
        return self.base_forward(x) if self.computes_base else self.adapted(x)

    def base_forward(self, x: Tensor) -> Tensor:
        """What the layer computed before it had adapters."""
        return self.base_type.forward(self, x)

    def adapted(self, x: Tensor) -> Tensor:
        """The layer with its active adapters on x ``[..., in]``: ``[..., out]``."""
        if isinstance(x, Proxy):
            return self._traced(x)
        updates = self._updates()
        if _needs_torch(x):
            return added_in_turn(self.base_forward(x), x, updates)
        found = self.base_for(x, updates)
        if isinstance(found, QuantizedBase):
            return linear_on(found, x, updates)
        return added(self.base_forward(x), x, updates)

    def base_for(self, x: Tensor | None, updates: Sequence[Update]) -> QuantizedBase | str:
        """The base as one call of the op has it, or why it has to be called.

        Args:
            x: ``[..., in]``; None for an x in the dtype that the base prefers.
            updates: at least one.
        """
        found = quantized_base(self, x, self.base_type)
        if not isinstance(found, QuantizedBase):
            return found or "its weight is no longer quantised"
        return updates_obstacle(found.dtype, x, updates) or found

    def mixed(self, x: Tensor, rows: RowAdapters) -> Tensor:
        """The layer on x ``[..., in]``, each row with the adapter that a block gives it."""
        if isinstance(x, Proxy):
            return self._traced(x)
        check_dense(x)
        pool = self.pool
        if self._disabled:
            return self.base_forward(x)
        if rows.slots is not None and pool is not None and not pool.needs_lists(self, x):
            index = rows.slots_of(x.shape[:-1], x.device)
            found = quantized_base(self, x, self.base_type)
            if isinstance(found, QuantizedBase):
                return pool_linear_on(found, x, pool, index)
            return pool.added(self.base_forward(x), x, index)
        updates = self._updates_of(self.row_names(rows))
        if not updates:
            return self.base_forward(x)
        found = quantized_base(self, x, self.base_type)
        if isinstance(found, QuantizedBase) and not dtypes_obstacle(found.dtype, x, updates):
            return mixed_linear_on(found, x, updates, rows)
        return mixed_onto(self.base_forward(x), x, updates, rows)

    def _adapted_path(self, rows: int | None) -> tuple[str, str]:
        found = self.base_for(None, self._updates())
        return ("fused", found.note) if isinstance(found, QuantizedBase) else ("added", found)

    def _path_of_rows(self, names: Sequence[str]) -> str:
        found = quantized_base(self, None, self.base_type)
        return "fused" if isinstance(found, QuantizedBase) else "added"

    def workspace_bytes(self) -> int:
        """Of the dequantised weight, in the dtype that the base prefers; 0 if it is called."""
        return workspace_bytes(quantized_base(self, None, self.base_type))

    def pack_weight(self, backward: bool = False) -> PackedWeight:
        """No pack, but one with the reason: the weight is quantised."""
        return PackedWeight(self.stored_weight, None, None, "the weight is quantised")

    # Merging.

    def compute_merged(
        self, names: str | Iterable[str] | None = None
    ) -> tuple[tuple[str, ...], Tensor | None, Tensor | None]:
        names = self._known(self.active_adapters if names is None else names, "merge")
        if names:
            self._refuse_merge()
        return names, None, None

    def _refuse_merge(self) -> NoReturn:
        raise RuntimeError(
            f"lora_ext.nn.{type(self).__name__}.merge: expected a dense weight to merge into, but "
            "it is quantised, and W + B A, quantised again, would be another layer; keep the "
            "adapters beside it, or save_adapter and merge into the model that was quantised"
        )

    # nn.Module's own.

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's, also over a base that writes its own part and nothing beside."""
        if self.base_type.state_dict is nn.Module.state_dict:
            return super().state_dict(*args, **kwargs)
        words = dict(zip(("destination", "prefix", "keep_vars"), args, strict=False)) | kwargs
        if words.get("destination") is None:
            words["destination"] = OrderedDict()
        words = {"prefix": "", "keep_vars": False} | words
        super().state_dict(**words)
        for name, child in self._modules.items():
            if child is not None:
                child.state_dict(**{**words, "prefix": f"{words['prefix']}{name}."})
        return words["destination"]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Its class is made where it is needed, and has no name by which pickle could find it.
        return _new, (self.base_type,), self.__dict__


def _needs_torch(x: Tensor) -> bool:
    """Whether the op cannot take x, or what traces or transforms the call does not know it."""
    return not is_plain(x) or x.is_nested or is_transformed() or is_onnx_export()


def _new(base_type: type[nn.Module], base: nn.Module | None = None) -> LoRAQuantizedLinear:
    """A layer of the class over a base's, around the base; without one, empty."""
    kind = class_over(base_type)
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    if base is not None:
        layer._init_lora(base)
    return layer


_classes: dict[type[nn.Module], type[LoRAQuantizedLinear]] = {}


def class_over(base_type: type[nn.Module]) -> type[LoRAQuantizedLinear]:
    """The class of the layers that stand for this one, one for each."""
    found = _classes.get(base_type)
    if found is None:
        is_plain_linear = base_type is nn.Linear  # whose weight is torchao's
        name = "LoRATorchaoLinear" if is_plain_linear else f"LoRA{base_type.__name__}"
        words = {"__module__": __name__, "__doc__": LoRAQuantizedLinear.__doc__}
        made = type(name, (LoRAQuantizedLinear, base_type), words)
        found = _classes.setdefault(base_type, made)
    return found


# What `_init_lora` and its callers put beside what the base has.
_OWN_ATTRIBUTES = frozenset(
    (
        "base_attributes",
        "base_type",
        "adapters",
        "active_adapters",
        "merged_adapters",
        "_disabled",
        "packed",
        "pool",
        "row_adapters",
        *_TABLES,
    )
)
_OWN_TENSORS = frozenset(("merged_weight", "merged_bias"))
