"""PEFT's adapter_names of a call of a model, as a block of `lora_ext.use_adapters`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import model as peft_model

from ..model_layers import per_row_modules
from ..nn.row_adapters import BASE_NAME, RowAdapters, entered
from ..torch_state import outside_inference


@contextmanager
def of_call(model: Any, names: Any, num_beams: Any) -> Iterator[None]:
    """The adapter_names of one call of a model, checked as PEFT checks them.

    Raises:
        TypeError, ValueError: PEFT's errors, except the one for training.
    """
    fast, others = per_row_modules(model)
    unknown = {name for name in names if name != BASE_NAME}
    for layer in (*fast, *others):
        if unknown and isinstance(layer, LoraLayer):
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
