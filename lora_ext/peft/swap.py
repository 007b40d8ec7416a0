"""PEFT's classes and the subclasses that replace them, and switching modules between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layers
from peft.tuners.lora import model as peft_model
from torch import nn

from ..model_layers import peft_layers as layers_of
from ..model_layers import per_row_modules
from ..nn.frozen import take_frozen
from ..packing.layers import packable_layers
from ..quantized.panels import put_back_for_training
from ..rows.row_adapters import BASE_NAME, RowAdapters, entered
from ..torch_state import outside_inference
from . import experts
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
            experts.put_dropout(model)
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
        with _names_of_call(self, names, kwargs.get("num_beams")):
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
    take_frozen(model, back)
    return count


@contextmanager
def _names_of_call(model: Any, names: Any, num_beams: Any) -> Iterator[None]:
    """The adapter_names of one call of a model, checked as PEFT checks them.

    Raises:
        TypeError, ValueError: PEFT's errors, except the one for training.
    """
    fast, others = per_row_modules(model)
    unknown = {name for name in names if name != BASE_NAME}
    for layer in (*fast, *others):
        if unknown and isinstance(layer, peft_layers.LoraLayer):
            unknown -= {*layer.lora_A, *layer.lora_embedding_A}  # a chain's wrappers have the same
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}"
        )
    original = names = list(names) if isinstance(names, tuple) else names
    is_beams = isinstance(num_beams, int) and num_beams > 1
    if is_beams:
        if not isinstance(names, list):
            raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
        names = [name for name in names for _ in range(num_beams)]
    encoder = peft_model._get_encoder(model.model) if is_beams else None
    inside = set() if encoder is None else {id(module) for module in encoder.modules()}
    with ExitStack() as stack:
        for given, is_inside in ((names, False), (original, True)):
            own = [layer for layer in fast if (id(layer) in inside) == is_inside]
            rest = [module for module in others if (id(module) in inside) == is_inside]
            stack.enter_context(entered(_rows_of(given, own, rest)))
        yield


def _rows_of(names: Sequence[str], layers: Sequence[Any], others: Sequence[Any]) -> RowAdapters:
    distinct = list(dict.fromkeys(name for name in names if name != BASE_NAME))
    places = {name: place for place, name in enumerate(distinct)} | {BASE_NAME: -1}
    device = next((p.device for layer in layers[:1] for p in layer.parameters()), None)
    with outside_inference():
        index = torch.tensor([places[name] for name in names], dtype=torch.int32, device=device)
    return RowAdapters(distinct, index, layers, others, is_pefts=True)
