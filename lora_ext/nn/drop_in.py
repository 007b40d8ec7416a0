"""DropIn: a layer that replaces a module of torch, with its parameters, settings and hooks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_STATE_DICT_HOOK_TABLES = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


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
        self.base_type = self._own_base() if base is None else type(base)
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
        if "forward" in base.__dict__:
            raise TypeError(f"{where} its forward was replaced, as by hooks; remove them first")
        others = [*(set(base._parameters) - {"weight", "bias"}), *base._buffers, *base._modules]
        if others:
            raise TypeError(f"{where} it holds {sorted(others)} too, which would be lost")
        if any(base.__dict__[name] for name in _STATE_DICT_HOOK_TABLES):
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
        for name in _HOOK_TABLES:
            self.__dict__[name] = base.__dict__[name]

    def as_base(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A module of the class that was replaced, with this weight and bias, frozen."""
        base = self.base_type.__new__(self.base_type)
        nn.Module.__init__(base)
        base.__dict__.update(self.base_attributes)
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            if name == "weight" or tensor is not None or "bias" in self._parameters:
                base.register_parameter(name, tensor)
        base.training = self.training
        for name in _HOOK_TABLES:
            base.__dict__[name] = self.__dict__[name]
        return base

    def restored(self) -> nn.Module:
        """A module of the class that was replaced, with the weight and bias that it had."""
        return self.as_base(self.weight, self.bias)
