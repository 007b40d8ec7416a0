"""Frozen quantised modules without adapters of their own that are computed here.

    experts      one dequantised at a time, as `LoRAExperts` has them; bitsandbytes would dequantise
                 all of a stack in each forward, and keep it for its length
    FP8Linear    on a CPU, for which transformers has no kernel: x times the dequantised weight

In a model with adapters elsewhere, such a module gets a subclass of its class with another forward,
and nothing else about it changes.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..call import Decision, Path
from ..experts import Experts
from ..experts.decorated import is_decorated, obstacle
from ..model_layers import wrapped_modules
from ..quantized.layers import QuantizedBase, is_without_kernel, own_type, quantized_base
from ..quantized.of_fp8 import is_scale
from ..quantized.stacks import parametrized, stacks_of
from .experts import AdaptedExperts, is_experts
from .module import LoRAModule
from .quantized import LoRAQuantizedLinear, base_forward


def take_frozen(model: nn.Module, back: bool = False) -> None:
    """Gives each such module of a model the class that computes it here, or all of them their own.

    Modules around which PEFT has a wrapper of parameters keep theirs: the wrapper computes them.
    """
    if not back:
        _warn_of_dense_experts(model)
    wrapped = wrapped_modules(model)
    for module in model.modules():
        own = own_type(type(module))
        forward = None if back or id(module) in wrapped else _forward_of(module)
        if forward is None and own is not type(module):
            module.__class__ = own
        elif forward is not None and own is type(module):
            module.__class__ = _class_over(own, forward, is_kept=not parametrized(module))


def frozen_decision(module: nn.Module) -> Decision | None:
    """How a module's next forward is computed here; None if it is not."""
    if own_type(type(module)) is type(module):
        return None
    if is_experts(module):
        return _experts_decision(module)
    base = quantized_base(module, None)
    if not isinstance(base, QuantizedBase):
        return None
    return Decision(module.forward, Path.FUSED, base.note, None, base)


def _forward_of(module: nn.Module) -> Any:
    """The forward that computes a module here; None for a module that keeps its own."""
    if isinstance(module, (LoRAModule, LoRAQuantizedLinear)):
        return None
    if is_experts(module):
        return _of_experts if stacks_of(module) else None
    return _of_linear if is_without_kernel(module, own_type(type(module))) else None


def _warn_of_dense_experts(model: nn.Module) -> None:
    if getattr(model, "quantization_method", None) != "bitsandbytes":
        return
    own = (
        parameter for each in model.modules() if is_experts(each) for parameter in each.parameters()
    )
    size = sum(each.nbytes for each in own if each.dim() == 3 and each.is_floating_point())
    if size:
        warnings.warn(
            f"lora_ext: this model is quantised but for its experts, {size / 2**30:.3g} GiB: "
            "transformers' BitsAndBytesConfig takes linear layers alone; load it with "
            "quantization_config=lora_ext.pretrained.four_bit_config()",
            stacklevel=4,
        )


def _of_experts(self: Any, *args: Any, **kwargs: Any) -> Any:
    decision = _experts_decision(self)
    run = partial(own_type(type(self)).forward, self) if decision is None else decision.run
    return run(*args, **kwargs)


def _experts_decision(module: Any) -> Decision | None:
    if _quantises_x(module) or obstacle(module) or not stacks_of(module):
        return None
    own = own_type(type(module))
    adapted = lambda: (Experts.of(module), {}, {})  # noqa: E731
    return AdaptedExperts(module, own, (), None, adapted, partial(own.forward, module)).decision()


def _quantises_x(module: nn.Module) -> bool:
    """Whether its own forward has kernels for codes and a quantised x: transformers' FP8 on GPUs,
    where it gives other numbers, and faster."""
    found = module._parameters
    return any(is_scale(found, name) and found[name].device.type != "cpu" for name in found)  # type: ignore[union-attr]


def _of_linear(self: Any, x: Tensor) -> Tensor:
    return base_forward(self, x, own_type(type(self)))


def _reduced(self: Any, protocol: Any) -> Any:
    return _empty, (own_type(type(self)),), self.__getstate__()


def _empty(own: type[nn.Module]) -> nn.Module:
    """A module of a class that was made over another one, as pickle makes it."""
    kind: Any = _class_over(own, _of_experts if is_decorated(own) else _of_linear)
    return kind.__new__(kind)


_classes: dict[type, type] = {}


def _class_over(own: type, forward: Any, is_kept: bool = True) -> type:
    """The class with this forward, one for each; of a module with parametrizations, to which torch
    gives a class of its own, a new one that lives as long as the module."""
    found = _classes.get(own)
    if found is None:
        words = {"__module__": __name__, "__doc__": own.__doc__, "frozen_type": own}
        words |= {"forward": forward, "__reduce_ex__": _reduced}
        found = type(own.__name__, (own,), words)
        if is_kept:
            _classes[own] = found
    return found
