"""AdapterPool: a fixed number of slots for adapters of one model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..adapters import AdapterError, save_adapter
from ..models.apply import in_place_of, install, layers_of
from ..models.config import ALL_LINEAR, AnyConfig, LoraConfig
from ..models.find import find_targets
from ..models.mixtures import warn_of_other_experts
from ..models.model import adapter_names, check_not_peft, lora_layers
from ..nn import LoRALayer, LoRALinear, LoRAParameter
from ..nn.adapter_spec import AdapterSpec, check_rank, expect, is_integer
from ..nn.fused import FusedLoRALayer
from ..rows.row_adapters import forget
from .layer_pool import LayerPool, ParameterPool, detach_from_pool
from .sources import Incoming, Source, layer_name, naming, read


class AdapterPool:
    """A fixed number of slots for adapters, in each of a model's layers.

        y[m] = x[m] W^T + bias + scaling[s] (drop(x)[m] lora_a[s]^T) lora_b[s]^T   s = slot of m

    `lora_ext.use_adapters` selects the adapter of each sample; outside of its blocks the pool adds
    nothing. Adapters can be added, replaced and removed while the model is serving: they are
    written into tensors that keep their addresses, and the next forward reads them. Nothing else of
    an adapter is stored.

        pool = lora_ext.AdapterPool(model, capacity=64, max_rank=16, target_modules="all-linear")
        pool.add_adapter("fr", "folder-of-peft")                      # checked as by load_adapter
        pool.add_adapter("new", LoraConfig("all-linear", r=8))        # random, to be trained
        optimizer = torch.optim.AdamW(pool.parameters("new"), lr=1e-3)
        with lora_ext.use_adapters(model, ["fr", "new", None]):
            ...

    Each adapter has its own parameters, which share the memory of its slot, so each can have its
    own optimizer, learning rate and clipping. They are not in ``model.parameters()``, and the pool
    is not in ``model.state_dict()``: use `save_adapter` to store an adapter. The pool follows
    ``model.to(...)``; copies and pickles of the model have their own pool, which `AdapterPool.of`
    returns.

    Args:
        model: any nn.Module, with or without adapters of this package; changed in place, its
            parameters frozen if it has no adapters.
        capacity: number of slots.
        max_rank: of each slot, 1 to 512.
        target_modules, exclude_modules: as in `LoraConfig`: nn.Linear, Conv1D, 1x1 nn.Conv2d,
            quantised linear layers, the experts of mixtures and, by their names, routers. Where
            LoraConfig gives a stack of two projections 2 r (`gate_up_proj`, by "all-linear"), its
            slots have 2 max_rank.
        adapter_dtype: of the factors; None is float32 on a half base, else the base's.

    Raises:
        ValueError: a number is out of its range, the model already has a pool, no layer matches, a
            layer that matches cannot have a pool, or the layers are PEFT's.
    """

    def __init__(
        self,
        model: nn.Module,
        capacity: int,
        max_rank: int,
        target_modules: str | Sequence[str] = "all-linear",
        *,
        exclude_modules: str | Sequence[str] = (),
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        where = "AdapterPool"
        expect(is_integer(capacity) and capacity >= 1, where, "a capacity of 1 or more", capacity)
        check_rank(max_rank, f"{where} (max_rank)")
        check_not_peft(model, "AdapterPool")
        if any(layer.pool is not None for _, layer in lora_layers(model)):
            raise ValueError(
                f"lora_ext.{where}: expected a model without a pool, but it has one; "
                "AdapterPool.of(model) finds it"
            )
        # Of rank 1, so that a layer's rank is how many projections it has.
        config = LoraConfig(target_modules, r=1, exclude_modules=exclude_modules)
        self.model = model
        self.capacity, self.max_rank = capacity, max_rank
        self._names: dict[str, int] = {}
        self.layers: dict[str, LoRALayer] = {}
        pools: list[LayerPool] = []
        replaced: dict[int, nn.Module] = {}
        targets = find_targets(model, config)
        if ALL_LINEAR in config.target_modules:
            warn_of_other_experts(model, where, config)
        for path, module in targets:
            in_place = in_place_of(path, module)
            for layer, spec in layers_of(in_place, path, config):
                _check_layer(path, layer)
                self.layers[layer_name(path, layer)] = layer
                pools.append(self._pool_for(layer, spec.r, adapter_dtype))
            if in_place is not module:
                replaced[id(module)] = in_place
        expect(bool(pools), where, "a layer that exclude_modules leaves", config.exclude_modules)
        if not adapter_names(model):
            model.requires_grad_(False)
        for layer, pool in zip(self.layers.values(), pools, strict=True):
            layer.stored_weight.requires_grad_(False)
            layer.pool = pool
        install(model, replaced)

    def _pool_for(self, layer: LoRALayer, projections: int, dtype: torch.dtype | None) -> LayerPool:
        place = (layer.factor_dtype(dtype), layer.stored_weight.device)
        words = (layer.matrix_shape, self.capacity, self.max_rank, self._names, *place)
        if isinstance(layer, LoRAParameter):
            return ParameterPool(*words, count=layer.count, projections=projections)
        return LayerPool(*words)

    @classmethod
    def of(cls, model: nn.Module) -> AdapterPool:
        """The pool of a model that has one, such as a copied or unpickled model.

        Raises:
            ValueError: the model has no pool.
        """
        layers = {
            layer.name_at(path) if isinstance(layer, LoRAParameter) else path: layer
            for path, layer in lora_layers(model)
            if layer.pool is not None
        }
        if not layers:
            raise ValueError(
                f"lora_ext.AdapterPool.of: expected a model with a pool, but the "
                f"{type(model).__name__} has none; make one by AdapterPool(model, ...)"
            )
        found = cls.__new__(cls)
        found.model, found.layers = model, layers
        pool = next(iter(layers.values())).pool
        found.capacity, found.max_rank = len(pool.ranks), pool.max_rank
        found._names = pool.names
        return found

    # Queries.

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order in which they were added."""
        return list(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._names))

    def __repr__(self) -> str:
        return (
            f"AdapterPool({len(self)} of {self.capacity} slots used, max_rank={self.max_rank}, "
            f"{len(self.layers)} layers: {self.names})"
        )

    def slot(self, adapter_name: str) -> int:
        """The adapter's index in each layer's tensors, fixed until `delete_adapter`."""
        return self._names[self._known(adapter_name, "slot")]

    def specs(self, adapter_name: str) -> dict[str, AdapterSpec]:
        """Path of each layer that has the adapter -> its rank, alpha and dropout in the layer. That
        of a mixture's experts is their parameter's, such as ``...experts.down_proj``."""
        self._known(adapter_name, "specs")
        return {
            p: layer.pool.specs[adapter_name]
            for p, layer in self.layers.items()
            if adapter_name in layer.pool
        }

    def tensors(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters, ``<path>.lora_a`` ``[r, in]`` and ``<path>.lora_b`` ``[out,
        r]``, of E experts ``[E r, in]`` and ``[out, r E]`` as in `LoRAParameter`: leaf tensors that
        share the slot's memory. `add_adapter` and `replace_adapter` take the same keys."""
        self._known(adapter_name, "tensors")
        found = {}
        for path, layer in self.layers.items():
            held = layer.pool.slots.get(adapter_name)
            if held is not None:
                found[f"{path}.lora_a"], found[f"{path}.lora_b"] = held
        return found

    def parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """The adapter's parameters, for its own optimizer. They stay the same until the adapter is
        removed, or replaced by one with other ranks."""
        return list(self.tensors(adapter_name).values())

    # Changes.

    def add_adapter(
        self,
        adapter_name: str,
        source: Source,
        config: AnyConfig | None = None,
        *,
        trainable: bool | None = None,
    ) -> list[nn.Parameter]:
        """Writes an adapter into a free slot: completely or, after an error, not at all.

        Args:
            adapter_name: a name that is not in use.
            source: a `LoraConfig`, for random first values; a folder in PEFT's format; or tensors
                with the keys of `tensors`, of any floating dtype and device.
            config: for tensors: their lora_alpha, lora_dropout and use_rslora; where its
                target_modules give `gate_up_proj` 2 alpha, that has it here, too.
            trainable: whether the parameters require gradients; None: those of a new adapter with
                random values do.

        Returns:
            `parameters` of the adapter.

        Raises:
            AdapterError: a ValueError: the name is taken, the pool is full, a rank is above
                max_rank, shapes do not fit, values are not finite, a layer is not in the pool, or
                the adapter is not plain LoRA.
            TypeError: source has another type.
        """
        with naming("add_adapter", adapter_name):
            if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
                raise AdapterError("expected a name as a string, not empty and without dots")
            if adapter_name in self._names or adapter_name in adapter_names(self.model):
                raise AdapterError(
                    "expected a new name, but an adapter has it; replace or remove that one"
                )
            taken = set(self._names.values())
            if len(taken) == self.capacity:
                raise AdapterError(
                    f"expected a free slot, but all {self.capacity} are used; remove an adapter, "
                    "or make a pool of larger capacity"
                )
            incoming = read(self.model, self.layers, source, config)
            slot = next(slot for slot in range(self.capacity) if slot not in taken)
            wants = incoming.is_new if trainable is None else trainable
            self._write(adapter_name, slot, incoming, wants)
            self._names[adapter_name] = slot
        return self.parameters(adapter_name)

    def replace_adapter(
        self, adapter_name: str, source: Source, config: AnyConfig | None = None
    ) -> list[nn.Parameter]:
        """Replaces the adapter in a slot. After an error or an interrupt, the slot is unchanged.
        Layers in which the rank stays the same keep their parameters; the others get new ones, and
        the previous parameters become empty.

        Args:
            adapter_name: of the adapter.
            source, config: as in `add_adapter`.

        Returns:
            `parameters` of the adapter.

        Raises:
            AdapterError, TypeError: as `add_adapter`; or no adapter has the name.
        """
        self._known(adapter_name, "replace_adapter")
        with naming("replace_adapter", adapter_name):
            incoming = read(self.model, self.layers, source, config)
            wants = next(iter(self.parameters(adapter_name))).requires_grad
            self._write(adapter_name, self._names[adapter_name], incoming, wants)
        return self.parameters(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Frees the adapter's slot. Its parameters become empty. In open blocks of `use_adapters`
        that use it, a forward raises an error.

        Raises:
            AdapterError: no adapter has the name.
        """
        self._known(adapter_name, "delete_adapter")
        for layer in self.layers.values():
            forget(layer, adapter_name)
        held = [layer.pool.slots.get(adapter_name) for layer in self.layers.values()]
        slot = self._names.pop(adapter_name)
        for layer in self.layers.values():
            layer.pool.write(adapter_name, slot, None, None, False)
        for parameters in held:
            detach_from_pool(parameters)

    def save_adapter(
        self, adapter_name: str, folder: str | os.PathLike[str], **information: Any
    ) -> None:
        """Writes an adapter as a folder in PEFT's format, as `save_adapter` does.

        Args:
            adapter_name: of the adapter.
            folder: a local path.
            information: base_model_name_or_path, revision, task_type and layout for `save_adapter`.

        Raises:
            AdapterError: no adapter has the name, or a value is not finite.
            OSError: the folder cannot be written.
        """
        self._known(adapter_name, "save_adapter")
        save_adapter(self.model, folder, adapter_name, bias="none", **information)

    def _write(self, name: str, slot: int, incoming: Incoming, trainable: bool) -> None:
        """Writes all layers or none; the previous content is kept until everything is written."""
        held: list[tuple[LayerPool, Any]] = []
        try:
            for path, layer in self.layers.items():
                pool = layer.pool
                held.append((pool, pool.held(name)))
                spec, values = incoming.specs.get(path), incoming.values.get(path)
                pool.write(name, slot, spec, values, trainable)
        except BaseException:
            for pool, content in held:
                pool.put_back(name, slot, content)
            raise
        for pool, content in held:
            if content.parameters is not None and pool.slots.get(name) is not content.parameters:
                detach_from_pool(content.parameters)

    def _known(self, name: str, method: str) -> str:
        if name not in self._names:
            raise AdapterError(
                f"lora_ext.AdapterPool.{method}: expected one of the adapters {self.names}, but "
                f"got {name!r}"
            )
        return name


def _check_layer(path: str, layer: LoRALayer) -> None:
    """Raises ValueError for a layer that cannot have a pool."""
    is_other = isinstance(layer, FusedLoRALayer) and not isinstance(layer, LoRALinear)
    if not (is_other or type(layer) in (LoRALinear, LoRAParameter)):
        raise ValueError(
            "lora_ext.AdapterPool: expected linear layers, 1x1 convolutions, experts and routers, "
            f"but target_modules chooses {path!r}, a {type(layer).__name__}"
        )
    layer.check_whole("AdapterPool")
