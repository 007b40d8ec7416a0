"""Why one forward of a PEFT layer takes its path: used by each forward and by `explain`.

A faster path is taken only if it is known to give PEFT's result; otherwise, for example with a hook
on a part that would not be called, the next one is taken. Reasons are constants, so that this is
cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..call import Path
from ..call.apply import Update
from ..dtypes import FLOATS
from ..nn.linear import is_conv1d
from ..quantized.layers import QuantizedBase, quantized_base
from ..quantized.panels import has_others
from ..torch_state import has_any_global_hook, is_onnx_export, is_plain, is_transformed

HOOKED = "lora_A, lora_B or lora_dropout has hooks"
_DEVICES = ("cpu", "cuda", "meta")
# Attribute of a layer: the forward that replaced PEFT's on the instance before `accelerate`.
REPLACED = "replaced_forward"


def adapters_state(layer: Any) -> tuple[Path, str] | None:
    """(path, reason) for a layer that adds nothing, None for one that adds its active adapters.

    A forward on the instance is not a reason: if the layer's own forward runs, the one on the
    instance has called it.
    """
    if layer._disable_adapters:
        return Path.BASE, "adapters are disabled"
    if layer.merged_adapters:
        return Path.BASE, "merged into the base weight by PEFT"
    if has_any_global_hook():
        return Path.PEFT, "a global module hook is registered, as by a profiler"
    if is_onnx_export():
        return Path.PEFT, "ONNX has no operator for the fused call; PEFT's forward is exported"
    return None


def is_passed_over(layer: Any) -> bool:
    """Whether the forward on the instance calls PEFT's forward instead of the layer's."""
    forward = layer.__dict__.get("forward")
    if forward is None:
        return False
    method, bases = getattr(forward, "__func__", None), type(layer).__mro__[1:]
    is_pefts = any(method is vars(base).get("forward", forward) for base in bases)
    return is_pefts or forward is layer.__dict__.get(REPLACED)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks observe or change the module's inputs, outputs or gradients."""
    return bool(
        module._forward_hooks
        or (module._forward_pre_hooks and has_others(module._forward_pre_hooks))
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_replaced(module: nn.Module) -> bool:
    """Whether a forward on the instance does more than move x to the module's device.

    Moving x is what accelerate's hooks for models on several devices do; the hook on the layer has
    already moved x.
    """
    state = module.__dict__
    if "forward" not in state:
        return False
    hook: Any = state.get("_hf_hook")
    own = state.get("_old_forward")
    kind = (type(hook).__module__, type(hook).__name__)
    if kind != ("accelerate.hooks", "AlignDevicesHook") or hook.offload or hook.no_grad:
        return True
    is_hooks = getattr(state["forward"], "__wrapped__", None) is own
    return not (is_hooks and getattr(own, "__func__", None) is type(module).forward)


def update_of(layer: Any, name: str) -> Update | str:
    """The update of one adapter of a linear layer, or why it needs PEFT's own forward."""
    tables = layer._modules
    lora_a, lora_b = tables["lora_A"]._modules[name], tables["lora_B"]._modules[name]
    dropout = tables["lora_dropout"]._modules[name]
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        return "lora_A or lora_B is not a plain nn.Linear"
    if has_hooks(lora_a) or has_hooks(lora_b) or has_hooks(dropout):
        return HOOKED
    first, second = _held(lora_a, "weight"), _held(lora_b, "weight")
    are_plain = is_plain(first) and is_plain(second)
    if is_replaced(lora_a) or is_replaced(lora_b):
        if not are_plain:
            return "the adapters are sharded for tensor parallelism"
        return "lora_A's or lora_B's forward was replaced, as by an offload hook"
    if _held(lora_a, "bias") is not None:
        return "lora_A has a bias"
    p = 0.0
    if type(dropout) is nn.Dropout:
        if dropout.p >= 1.0:
            return "lora_dropout is 1, which drops everything"
        p = dropout.p if dropout.training else 0.0
    elif type(dropout) is not nn.Identity:
        return "lora_dropout is not nn.Dropout"
    if not are_plain:
        return "lora_A's or lora_B's weight is a tensor subclass, as a sharded one"
    if first.dtype != second.dtype or first.dtype not in FLOATS:
        return "lora_A and lora_B do not have the same floating dtype"
    return Update(name, first, second, _held(lora_b, "bias"), layer.scaling[name], p)


def _held(module: nn.Module, name: str) -> Any:
    """A parameter, faster than by its attribute, which it is alone in the forwards of FSDP1."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def embedding_reason(layer: Any, ids: Tensor | None, names: Sequence[str]) -> str:
    """Why an embedding layer needs PEFT's own forward, or ""."""
    base = layer._modules["base_layer"]
    if type(base) is not nn.Embedding:
        return "the base layer is not exactly nn.Embedding"
    if base.max_norm is not None or base.sparse:
        return "the embedding has max_norm, which changes its weight, or sparse gradients"
    if any(name in layer.input_fns or name in layer.output_fns for name in names):
        return "the adapters are sharded for tensor parallelism"
    weight = base._parameters.get("weight")
    if weight is None or not (is_plain(weight) and weight.is_floating_point()):
        return "the base weight is parametrized, quantised or sharded"
    if ids is not None and not is_plain(ids):
        return "the token ids are a tensor subclass"
    return ""


def input_reason(layer: Any, x: Tensor, names: Sequence[str]) -> str:
    """Why this x needs PEFT's own forward for adapters that the layer has, or ""."""
    if not is_plain(x) or x.is_nested or x.dim() == 0:
        return "x is a tensor subclass, nested or a scalar"
    if x.dtype not in FLOATS:
        return "x is not of a floating dtype"
    if x.device.type not in _DEVICES:
        return "x is on a device other than CPU and CUDA"
    if is_transformed():
        return "a transform of torch.func or forward-mode AD is active"
    if not layer.cast_input_dtype_enabled:
        table = layer._modules["lora_A"]._modules
        if any(getattr(table[name], "weight", x).dtype != x.dtype for name in names):
            return "x has another dtype than the adapter, and cast_input_dtype_enabled is off"
    return ""


def base_obstacle(base: nn.Module) -> str:
    """Why the base module's own forward has to be called, or ""."""
    if type(base) is not nn.Linear and not is_conv1d(base):
        return "the base layer is not exactly nn.Linear or transformers' Conv1D"
    if has_hooks(base):
        return "the base layer has hooks"
    if is_replaced(base):
        return "the base layer's forward was replaced, as by an offload hook"
    weight = base._parameters.get("weight")
    if weight is None or not is_plain(weight):
        return "the base weight is parametrized, quantised or sharded"
    if weight.dtype not in FLOATS:
        return "the base weight is not of a floating dtype"
    return ""


def dequantized_base(base: nn.Module, x: Tensor | None) -> QuantizedBase | str | None:
    """A base other than a plain weight, in the form for the op; or why the op does not support it;
    or None if the form of the base is unknown."""
    found = quantized_base(base, x)
    if found is not None and (has_hooks(base) or is_replaced(base)):
        return "the base layer has hooks, or its forward was replaced"
    return found
