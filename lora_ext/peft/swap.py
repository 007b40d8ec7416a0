"""PEFT's classes and the subclasses that replace them, and switching modules between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

from peft.tuners.lora import layer as peft_layers
from peft.tuners.lora import model as peft_model
from torch import nn

from ..model_layers import peft_layers as layers_of
from ..packing.layers import packable_layers
from ..quantized.panels import put_back_for_training
from . import expert_dropout, mixed_batch
from .embedding import Embedding
from .linear import Linear
from .param_wrapper import ParamWrapper
from .quantized import CLASSES
from .reasons import REPLACED


class LoraModel(peft_model.LoraModel):
    """`peft.tuners.lora.LoraModel` in which later adapters are also accelerated, and mixed batches
    (adapter_names) use `lora_ext.use_adapters`.

    A further adapter may target modules that had none: PEFT wraps those in new layers of its own
    classes.
    """

    @wraps(peft_model.LoraModel.inject_adapter)
    def inject_adapter(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        peft_model.LoraModel.inject_adapter(self, model, *args, **kwargs)
        if isinstance(self, LoraModel):  # false in a bound method that outlived `decelerate`
            swap(model)
            expert_dropout.put_on_new(model)
            for layer in packable_layers(model):  # an initialization may write to the weight's data
                if layer.packed is not None:
                    layer.packed.drop_if_written()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Applies the adapter_names of a call; here also in training."""
        names = kwargs.get("adapter_names")
        is_ours = names is not None and kwargs.get("alora_offsets") is None
        if not (is_ours and isinstance(self, LoraModel)):
            with peft_model.LoraModel._enable_peft_forward_hooks(self, *args, **kwargs):
                yield
            return
        with mixed_batch.of_call(self, names, kwargs.get("num_beams")):
            yield


@cache
def classes() -> dict[type, type]:
    """PEFT's class -> ours, a subclass of it with another forward or `inject_adapter`."""
    layers = {
        peft_layers.Linear: Linear,
        peft_layers.Embedding: Embedding,
        peft_layers.ParamWrapper: ParamWrapper,
    }
    return {**layers, **CLASSES, peft_model.LoraModel: LoraModel}


def swap(model: nn.Module, back: bool = False) -> int:
    """Switches each module of exactly a known class to the other class; returns the number of
    layers that changed.

    Of nested wrappers of parameters only the outermost is switched; it computes all of them. A
    forward that was set on a layer's instance continues to call PEFT's; `explain` reports this.
    """
    backward = {ours: theirs for theirs, ours in classes().items()}
    table = backward if back else classes()
    forwards = {kind.forward for pair in classes().items() for kind in pair}
    outermost = {id(layer) for _, layer in layers_of(model)}
    count = 0
    for module in model.modules():
        state = module.__dict__
        is_layer = isinstance(module, peft_layers.LoraLayer)
        is_inner = is_layer and id(module) not in outermost
        other = (backward if is_inner else table).get(type(module))
        if getattr(state.get("forward"), "__func__", None) in forwards:
            del state["forward"]  # accelerate's remove_hook_from_module leaves the bound method
        if other is not None:
            module.__class__ = other
            for name in ("row_adapters", "packed", REPLACED):
                state.pop(name, None)
            if "forward" in state and not back:
                state[REPLACED] = state["forward"]
            count += is_layer
    put_back_for_training(model, remove=back)
    return count
