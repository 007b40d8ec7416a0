"""Layers that replace a module, with its parameters, settings and hooks.

DropIn    a module of torch
Over      a module of any class, for which its own class is made
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ..quantized.layers import own_type

_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_HOOKS = [name for name in nn.Module().__dict__ if "hook" in name]
_STATE_DICT_HOOKS = [name for name in _HOOKS if "state_dict" in name]
_HOOKS_OF_CALLS = [name for name in _HOOKS if name not in _STATE_DICT_HOOKS]


class DropIn(nn.Module):
    """Base class of a layer that also derives from the nn.Module that it replaces.

    Attributes:
        base_type: the class that was replaced, or the nn.Module that the layer derives from.
        base_attributes: the attributes of that module other than nn.Module's own.
    """

    weight: Any  # a Parameter, as the base declares it
    bias: Any

    def _init_lora(self, base: nn.Module | None = None) -> None:
        """Call it after the base's own constructor, or with the module that is replaced."""
        kept = self.__dict__ if base is None else base.__dict__
        self.base_attributes = {k: v for k, v in kept.items() if k not in nn.Module().__dict__}
        self.base_type = self._own_base() if base is None else own_type(type(base))
        if base is not None:
            self._adopt(base)

    @classmethod
    def around(cls, base: nn.Module) -> Any:
        """The layer that replaces `base`, without an adapter.

        It shares the parameters (no copy), the mode and the dictionaries of hooks, so that handles
        held elsewhere still remove their hooks.

        Raises:
            TypeError: base is of another class (a subclass may compute something else), or it was
                modified: weight_norm, a forward on the instance (accelerate), additional
                parameters, buffers or modules, hooks on its state dict.
            ValueError: base has a setting that the layer does not support.
        """
        cls._check_base(base)
        where = f"lora_ext.nn.{cls.__name__}: expected a plain {type(base).__name__}, but"
        if "weight" not in base._parameters:
            raise TypeError(f"{where} its weight is computed, as by pruning; remove that first")
        check_own_forward(f"lora_ext.nn.{cls.__name__}", base)
        others = [*(set(base._parameters) - {"weight", "bias"}), *base._buffers, *base._modules]
        if others:
            raise TypeError(f"{where} it holds {sorted(others)} too, which would be lost")
        if any(base.__dict__[name] for name in _STATE_DICT_HOOKS):
            raise TypeError(f"{where} it has hooks on its state dict, which would be lost")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._init_lora(base)
        return layer

    @classmethod
    def _check_base(cls, base: nn.Module) -> None:
        """Raises TypeError or ValueError for a module that `around` cannot replace."""
        if type(base) is not cls._own_base():
            raise TypeError(
                f"lora_ext.nn.{cls.__name__}: expected exactly {cls._own_base().__name__}, but got "
                f"{type(base).__module__}.{type(base).__qualname__}"
            )

    @classmethod
    def _own_base(cls) -> type[nn.Module]:
        """The nn.Module that the class is a drop-in for."""
        return next(kind for kind in cls.__mro__ if kind.__module__.startswith("torch.nn."))

    def _adopt(self, base: nn.Module) -> None:
        self.__dict__.update(self.base_attributes)
        self.register_parameter("weight", base._parameters["weight"])
        if "bias" in base._parameters:
            self.register_parameter("bias", base._parameters["bias"])
        self.training = base.training
        for name in _HOOKS_OF_CALLS:
            self.__dict__[name] = base.__dict__[name]

    def as_base(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A module of the class that was replaced, with this weight and bias, frozen."""
        kind: Any = self.base_type
        base: nn.Module = kind.__new__(kind)
        nn.Module.__init__(base)
        base.__dict__.update(self.base_attributes)
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            if name == "weight" or tensor is not None or "bias" in self._parameters:
                base.register_parameter(name, tensor)
        base.training = self.training
        for name in _HOOKS_OF_CALLS:
            base.__dict__[name] = self.__dict__[name]
        return base

    def restored(self) -> nn.Module:
        """A module of the class that was replaced, with the weight and bias that it had."""
        return self.as_base(self.weight, self.bias)


class Over(nn.Module):
    """Base class of a module that takes over all that another one is, not only weight and bias.

    Its class is made at run time and also derives from the other's, whose methods so find what
    they read; it shares the other's tensors, mode and hooks.

    Attributes:
        kind: the class of this package from which the module's class derives.
        base_type: the class of the module that it replaces.
    """

    kind: type[Any]
    base_type: type[nn.Module]
    # Names of what the module has besides what the base has.
    own_names: ClassVar[frozenset[str]] = frozenset(("base_type",))

    @classmethod
    def class_over(cls, base_type: type[nn.Module]) -> type[Any]:
        """The class of the modules that replace this one, made once for each."""
        found = _classes.get((cls, base_type))
        if found is None:
            words = {"__module__": cls.__module__, "__doc__": cls.__doc__, "kind": cls}
            made = type(cls._name_over(base_type), (cls, base_type), words)
            found = _classes.setdefault((cls, base_type), made)
        return found

    @classmethod
    def _name_over(cls, base_type: type[nn.Module]) -> str:
        return f"LoRA{base_type.__name__}"

    def _adopt(self, base: nn.Module) -> None:
        self.__dict__.update(base.__dict__)
        for table in _TABLES:
            self.__dict__[table] = base.__dict__[table].copy()

    def restored(self, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A module of the class that was replaced, with its parameters or merged ones.

        Args:
            weights: parameter's name -> the tensor to use instead.
        """
        base = self.base_type.__new__(self.base_type)
        nn.Module.__init__(base)
        own = self.own_names
        base.__dict__.update({k: v for k, v in self.__dict__.items() if k not in own})
        for table in _TABLES:
            kept = base.__dict__[table] = self.__dict__[table].copy()
            for name in own.intersection(kept):
                kept.discard(name) if isinstance(kept, set) else kept.pop(name)
        for name, weight in (weights or {}).items():
            base._parameters[name] = nn.Parameter(weight, requires_grad=False)
        return base

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle cannot find it by name.
        return empty_over, (self.kind, self.base_type), self.__getstate__()


_classes: dict[tuple[type, type], type[Any]] = {}


def empty_over(kind: type[Any], base_type: type[nn.Module]) -> Any:
    """An empty module of the class made for the base's class."""
    found = kind.class_over(base_type)
    module = found.__new__(found)
    nn.Module.__init__(module)
    module.base_type = base_type
    return module


def check_own_forward(where: str, base: nn.Module) -> None:
    """Raises TypeError for a module whose forward is replaced on the instance."""
    if "forward" in base.__dict__:
        raise TypeError(
            f"{where}: expected a plain {type(base).__name__}, but its forward was replaced, as "
            "by hooks; remove them first (those of Hugging Face's accelerate: "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True))"
        )
