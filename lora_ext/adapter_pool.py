"""AdapterPool: a fixed number of a model's adapters in memory that is allocated once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import load_adapter, save_adapter
from .adapters.load import read_adapter_config
from .models.apply import apply_lora, find_targets, frozen_only_by_success, install
from .models.apply import replacement_for as _replacement_for
from .models.config import LoRAConfig
from .models.model import adapter_names, check_not_peft, delete_adapter, lora_layers, named_modules
from .nn import LoRALayer, LoRALinear
from .nn.adapter_spec import expect
from .nn.slots import Slots

Factors = Mapping[str, tuple[Tensor, Tensor]]


class AdapterPool:
    """Room for so many adapters of a model, each layer's in one piece of memory.

        pool = lora_ext.AdapterPool(model, lora_ext.LoRAConfig("all-linear", r=16), capacity=64)
        pool.load("french", "adapters/french")
        with lora_ext.use_adapters(model, ["french", None]):
            model.generate(**inputs)

    The layers that the config names become LoRA layers, and the model is frozen. Adapters come and
    go without an allocation; they are the model's like any others: `use_adapters` names them,
    `save_adapter`, state dicts and merging know them. Their parameters are views of the pool, so
    that an optimizer of one of them writes it there. Without gradients, a batch's layers call the
    op with the whole pool, whose addresses stay; with gradients, with the parameters of the
    adapters that the batch names.

    Args:
        model: in place; with or without layers of this package.
        config: which linear layers have room, of which rank at most, and in which dtype
            (adapter_dtype); also the defaults of `add`.
        capacity: how many adapters at a time.

    Raises:
        ValueError: capacity is no positive integer; no layer matches, or one that does is no linear
            layer; the model has adapters already. It is then unchanged.
    """

    def __init__(self, model: nn.Module, config: LoRAConfig, capacity: int) -> None:
        where = "AdapterPool"
        is_count = isinstance(capacity, int) and not isinstance(capacity, bool)
        expect(is_count and capacity >= 1, where, "a capacity of 1 or more", capacity)
        _check_apart(config)
        check_not_peft(model, "apply_lora")
        expect(not adapter_names(model), where, "a model without adapters", adapter_names(model))
        self.model, self.config, self.capacity = model, config, capacity
        replaced: dict[int, LoRALayer] = {}
        layers: dict[str, Any] = {}
        with frozen_only_by_success(model):
            for path, module in find_targets(model, config):
                kind = type(module) if isinstance(module, LoRALayer) else _replacement_for(module)
                expect(kind is LoRALinear, where, f"a linear layer at {path!r}", type(module))
                layer = module if isinstance(module, LoRALayer) else LoRALinear.around(module)
                layers[path] = layer
                if layer is not module:
                    replaced[id(module)] = layer
            slots = [
                Slots(layer, capacity, config.spec_for(path).r, _dtype_of(layer, config))
                for path, layer in layers.items()
            ]
            for layer, own in zip(layers.values(), slots, strict=True):
                layer.slots = own
        install(model, dict(replaced))
        model.requires_grad_(False)
        self._free = list(reversed(range(capacity)))
        self._slots: dict[str, int] = {}

    # What is there.

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are there, in the order in which they came."""
        for name in set(self._slots) - set(adapter_names(self.model)):  # deleted past the pool
            self._free.append(self._slots.pop(name))
        return tuple(self._slots)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    @property
    def nbytes(self) -> int:
        """Bytes of the pool's memory."""
        return sum(layer.slots.nbytes for _, layer in self._layers())

    def parameters(self, name: str) -> list[nn.Parameter]:
        """lora_a and lora_b of one adapter in all its layers, for an optimizer of its own.

        Raises:
            KeyError: the pool has no such adapter.
        """
        self._known(name)
        layers = [layer for _, layer in self._layers() if name in layer.adapters]
        return [table[name] for layer in layers for table in (layer.lora_a, layer.lora_b)]

    # What comes and goes.

    def add(self, name: str, config: LoRAConfig | None = None, trainable: bool = True) -> None:
        """A new adapter with the first values of its config's init.

        Args:
            name: as in `apply_lora`.
            config: of at most the pool's ranks, for layers of the pool; None is the pool's own.
            trainable: whether its parameters require grad.

        Raises:
            ValueError: the pool is full, the name is taken, or the config does not fit. Nothing is
                changed then, or by an interrupt.
        """
        config = self.config if config is None else config
        _check_apart(config)
        self._admit(name, trainable, lambda: apply_lora(self.model, config, name))

    def load(self, name: str, folder: str | os.PathLike[str], trainable: bool = False) -> None:
        """An adapter from a folder in PEFT's format (`load_adapter`).

        Raises:
            ValueError: as `add`, and AdapterError of `load_adapter`.
        """
        _check_apart(read_adapter_config(folder))
        self._admit(name, trainable, lambda: load_adapter(self.model, folder, name))

    def save(self, name: str, folder: str | os.PathLike[str], **options: Any) -> None:
        """Writes an adapter to a folder in PEFT's format; options of `save_adapter`.

        Raises:
            KeyError: the pool has no such adapter; else as `save_adapter`.
        """
        self._known(name)
        save_adapter(self.model, folder, name, **options)

    def remove(self, name: str) -> None:
        """Frees an adapter's slot. Its parameters must not be used any more: the next adapter that
        comes has their memory.

        Raises:
            KeyError: the pool has no such adapter.
        """
        self._known(name)
        delete_adapter(self.model, name)  # its layers free their slots
        self._free.append(self._slots.pop(name))

    def replace(self, name: str, factors: Factors | str | os.PathLike[str]) -> None:
        """Writes other values into an adapter's parameters, which stay the same objects.

        Args:
            name: of an adapter of the pool.
            factors: ``{path of a layer: (lora_a [r, in], lora_b [out, r])}`` for all its layers, on
                any device in any floating dtype; or a folder in PEFT's format with the same layers
                and ranks, whose scaling it takes.

        Raises:
            KeyError: the pool has no such adapter.
            ValueError: layers or shapes differ, or the folder is none. Nothing is written then; an
                error or interrupt while it is written puts back what was there.
        """
        self._known(name)
        if isinstance(factors, (str, os.PathLike)):
            self._replace_by_folder(name, factors)
        else:
            self._write(name, factors)

    # Within.

    def _layers(self) -> Iterator[tuple[str, Any]]:
        for path, layer in lora_layers(self.model):
            if getattr(layer, "slots", None) is not None:
                yield path, layer

    def _known(self, name: str) -> None:
        if name not in self.names:
            raise KeyError(
                f"lora_ext.AdapterPool: expected one of {list(self.names)}, but got {name!r}"
            )

    def _admit(self, name: str, trainable: bool, come: Any) -> None:
        if len(self.names) == self.capacity:
            raise ValueError(
                f"lora_ext.AdapterPool: expected room for {name!r}, but all {self.capacity} slots "
                "are taken; remove an adapter first"
            )
        active = [(layer, layer.active_adapters) for _, layer in lora_layers(self.model)]
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        slot = self._free[-1]
        try:
            come()
            self._check_fits(name)
            for _, layer in self._layers():
                if name in layer.adapters:
                    layer.slots.take(layer, name, slot)
        except BaseException:
            self._forget(name)
            raise
        finally:
            for layer, names in active:
                layer.active_adapters = names
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        for _, layer in lora_layers(self.model):
            if name in layer.adapters:
                layer._set_trainable(name, trainable)
        self._slots[name] = self._free.pop()

    def _forget(self, name: str) -> None:
        if name not in self._slots and name in adapter_names(self.model):
            delete_adapter(self.model, name)

    def _check_fits(self, name: str) -> None:
        for path, layer in lora_layers(self.model):
            if name not in layer.adapters:
                continue
            slots = getattr(layer, "slots", None)
            if slots is None:
                raise ValueError(
                    f"lora_ext.AdapterPool: expected an adapter of the pool's layers, but {name!r} "
                    f"is in {path!r}, too; make the pool with a config that names it"
                )
            lora_a = layer.lora_a[name]
            if layer.rank(name) != lora_a.shape[0] or name in layer.lora_bias:
                raise ValueError(
                    f"lora_ext.AdapterPool: expected a plain adapter, but {name!r} at {path!r} has "
                    "a lora_bias, or factors to subtract (init 'pissa' or 'olora')"
                )
            if lora_a.shape[0] > slots.r or lora_a.dtype != slots.lora_a.dtype:
                raise ValueError(
                    f"lora_ext.AdapterPool: expected a rank of at most {slots.r} and "
                    f"{slots.lora_a.dtype}, but {name!r} at {path!r} has {lora_a.shape[0]} and "
                    f"{lora_a.dtype}"
                )

    def _replace_by_folder(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Reads and checks all of it as an adapter of its own, outside the pool."""
        _check_apart(read_adapter_config(folder))
        waiting = f"{name}_as_it_comes"
        active = [(layer, layer.active_adapters) for _, layer in lora_layers(self.model)]
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        try:
            load_adapter(self.model, folder, waiting)
            self._check_fits(waiting)
            found = {
                path: (layer.lora_a[waiting], layer.lora_b[waiting], layer.adapters[waiting])
                for path, layer in lora_layers(self.model)
                if waiting in layer.adapters
            }
            self._write(name, {path: (a, b) for path, (a, b, _) in found.items()})
            for path, layer in self._layers():
                if path in found:
                    layer.adapters[name] = found[path][2]
                    layer.slots.scaling[layer.slots.names[name]] = found[path][2].scaling
        finally:
            if waiting in adapter_names(self.model):
                delete_adapter(self.model, waiting)
            for layer, names in active:
                layer.active_adapters = names
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    @torch.no_grad()
    def _write(self, name: str, factors: Factors) -> None:
        layers = {path: layer for path, layer in self._layers() if name in layer.adapters}
        given = {path for path, _ in named_modules(self.model) if path in factors}
        if set(factors) != set(layers) or given != set(layers):
            raise ValueError(
                f"lora_ext.AdapterPool.replace: expected factors for {len(layers)} layers, those "
                f"that {name!r} has, but got other paths: "
                f"{sorted(set(factors) ^ set(layers))[:3]} differ"
            )
        pairs: list[tuple[Tensor, Tensor]] = []
        for path, layer in layers.items():
            for table, value in zip((layer.lora_a, layer.lora_b), factors[path], strict=True):
                own = table[name]
                if value.shape != own.shape or not value.is_floating_point():
                    raise ValueError(
                        f"lora_ext.AdapterPool.replace: expected a floating tensor of shape "
                        f"{list(own.shape)} for {name!r} at {path!r}, but got {value.dtype} of "
                        f"{list(value.shape)}; another rank needs remove and add"
                    )
                pairs.append((own, value))
        kept: list[tuple[Tensor, Tensor]] = []
        try:
            for own, value in pairs:
                kept.append((own, own.detach().clone()))
                own.copy_(value)
        except BaseException:
            for own, value in kept:
                own.copy_(value)
            raise


def _check_apart(config: Any) -> None:
    """Raises for an adapter that would change what the others rely on."""
    if config.bias != "none" or config.modules_to_save:
        raise ValueError(
            "lora_ext.AdapterPool: expected adapters of low-rank factors alone, but got a config "
            f"with bias={config.bias!r} and modules_to_save={config.modules_to_save!r}, which a "
            "model has once for all adapters"
        )


def _dtype_of(layer: Any, config: LoRAConfig) -> torch.dtype:
    if config.adapter_dtype is not None:
        return config.adapter_dtype
    return torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
