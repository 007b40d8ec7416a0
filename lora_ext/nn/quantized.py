"""LoRAQuantizedLinear: quantised linear layers of other libraries, with adapters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..call.apply import takes_op
from ..call.updates import Slots, Update, updates_obstacle
from ..packed_weight import PackedWeight
from ..quantized.base import workspace_bytes
from ..quantized.layers import QuantizedBase, is_quantized, quantized_base
from ..torch_state import is_plain
from .from_linear import FromLinear
from .fused import FusedLoRALayer
from .row_adapters import RowAdapters

_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class LoRAQuantizedLinear(FromLinear):
    """A frozen, quantised linear layer of another library with low-rank adapters.

        y = base(x) + sum over active adapters of scaling * ((drop(x) lora_a^T) lora_b^T + bias)

    If the base multiplies by its dequantised weight, base and update are one call of the op with
    this weight, forward and backward; otherwise the base's own forward runs and `lora_update` adds
    the rest. `path` returns which, and why. `lora_ext.quantized.layers` lists the supported layers.

    `around` and `from_linear` make one. Its class is made for the base's class and also derives
    from it, such as LoRALinear4bit from bitsandbytes' Linear4bit: the base's attributes keep their
    names, and its own methods write and read its part of a state dict.

    Shape:
        x ``[..., in_features]`` to y ``[..., out_features]`` in the dtype that the base returns;
        lora_a ``[r, in_features]``, lora_b ``[out_features, r]``, float32 unless adapter_dtype is
        given.

    `merge` raises RuntimeError: W + B A would have to be quantised again.
    """

    # The replaced class is a base of the layer's own class, see `class_over`.
    in_features: int
    out_features: int
    added_path = "added"

    @classmethod
    def around(cls, base: nn.Module) -> Any:
        """The layer that replaces `base`, without an adapter; it shares the tensors, mode and hooks
        of `base`.

        Raises:
            TypeError: base is not a supported quantised layer, or its forward is replaced on the
                instance.
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
    def _check_base(cls, base: nn.Module) -> None:
        if isinstance(base, FusedLoRALayer) or not is_quantized(base):
            raise TypeError(
                "lora_ext.nn.LoRAQuantizedLinear: expected a quantised linear layer of "
                "bitsandbytes, torchao, HQQ, transformers or diffusers, exactly of its class, but "
                f"got {type(base).__module__}.{type(base).__qualname__}"
            )

    def _adopt(self, base: nn.Module) -> None:
        """Takes over all attributes of the base, not only weight and bias: its forward reads
        them."""
        self.__dict__.update(base.__dict__)
        for table in _TABLES:
            self.__dict__[table] = base.__dict__[table].copy()
        # torchao sets one on the instance, which would hide ours.
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

    # Used instead of a dense weight.

    @property
    def stored_weight(self) -> Tensor:
        kept = self._parameters
        found = kept.get("weight")
        if found is None:
            found = kept.get("W_q")  # HQQ's name for it
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
        """Accepts a weight of any dtype."""

    # What a forward computes.

    def base_forward(self, x: Tensor) -> Tensor:
        """The forward of the base layer, without adapters."""
        return self.base_type.forward(self, x)

    def base_for(
        self, x: Tensor | None, updates: Sequence[Update] | Slots, rows: RowAdapters | None
    ) -> QuantizedBase | str:
        if rows is None and x is not None and not (is_plain(x) and takes_op(x)):
            return "a tensor subclass, ONNX or torch.func: added by torch"
        found = quantized_base(self, x, self.base_type)
        if not isinstance(found, QuantizedBase):
            return found or "its weight is no longer quantised"
        return updates_obstacle(found.dtype, x, updates, rows) or found

    def workspace_bytes(self) -> int:
        """Bytes of the dequantised weight in the base's preferred dtype; 0 if the base is called
        itself."""
        return workspace_bytes(quantized_base(self, None, self.base_type))

    def pack_weight(self, backward: bool = False) -> PackedWeight:
        """Returns a `PackedWeight` without a pack, with the reason: the weight is quantised."""
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

    # Methods of nn.Module.

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module.state_dict, also for a base whose own method writes only its own part."""
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
        # The class is made at run time, so pickle cannot find it by name.
        return _new, (self.base_type,), self.__getstate__()


def _new(base_type: type[nn.Module], base: nn.Module | None = None) -> LoRAQuantizedLinear:
    """A layer of the class made for `base_type`, with the contents of `base`, or empty."""
    kind = class_over(base_type)
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    if base is not None:
        layer._init_lora(base)
    return layer


_classes: dict[type[nn.Module], type[LoRAQuantizedLinear]] = {}


def class_over(base_type: type[nn.Module]) -> type[LoRAQuantizedLinear]:
    """The class of the layers that replace this one, made once for each."""
    found = _classes.get(base_type)
    if found is None:
        is_plain_linear = base_type is nn.Linear  # its weight is a torchao tensor
        name = "LoRATorchaoLinear" if is_plain_linear else f"LoRA{base_type.__name__}"
        words = {"__module__": __name__, "__doc__": LoRAQuantizedLinear.__doc__}
        made = type(name, (LoRAQuantizedLinear, base_type), words)
        found = _classes.setdefault(base_type, made)
    return found


# The attributes that `_init_lora` and its callers set besides those of the base.
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
