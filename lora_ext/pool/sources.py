"""Reads the adapters to write into a pool; an adapter is checked completely before any write."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..adapters.errors import AdapterError, some
from ..adapters.load import read_placement
from ..adapters.placement import Placement
from ..adapters.targets import named
from ..models.apply import layers_of
from ..models.config import AnyConfig, LoraConfig, as_config
from ..models.find import find_targets
from ..nn import LoRALayer, LoRAModule, LoRAParameter, initialize
from ..nn.adapter_spec import AdapterSpec

Source: TypeAlias = "AnyConfig | Mapping[str, Tensor] | str | os.PathLike[str]"


@dataclass
class Incoming:
    """An adapter, ready to be written.

    Attributes:
        specs: path of a layer -> the adapter's spec in this layer.
        values: path -> (lora_a ``[r, in]``, lora_b ``[out, r]``), of a `LoRAParameter` in its
            layout.
        is_new: whether it has random values and is to be trained.
    """

    specs: dict[str, AdapterSpec] = field(default_factory=dict)
    values: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    is_new: bool = False


def read(
    model: nn.Module,
    layers: Mapping[str, LoRALayer],
    source: Source,
    config: AnyConfig | None,
) -> Incoming:
    """Reads the adapter of a source; sources are those of `AdapterPool.add_adapter`.

    Raises:
        AdapterError: a ValueError; it does not fit the pool, or its folder cannot be read.
        TypeError: source has another type.
    """
    dtype = next(iter(layers.values())).pool.lora_a.dtype
    if isinstance(source, Mapping):
        incoming = _of_tensors(layers, source, config, dtype)
    elif isinstance(source, str | os.PathLike):
        if config is not None:
            raise TypeError("expected no config beside a folder, which has its own")
        incoming = _of_folder(model, layers, os.fspath(source), dtype)
    else:
        random = as_config(source, others=", a mapping of tensors or a folder")
        if config is not None:
            raise TypeError("expected one LoraConfig, but got two")
        incoming = _random(model, layers, random, dtype)
    for path, spec in incoming.specs.items():
        _check_spec(path, spec, layers[path])
        _check_values(path, spec, layers[path], incoming.values[path])
    return incoming


def layer_name(path: str, layer: LoRALayer) -> str:
    """A layer's path in a pool: that of its module, or of a parameter in it."""
    return f"{path}.{layer.parameter}" if isinstance(layer, LoRAParameter) else path


def _random(
    model: nn.Module, layers: Mapping[str, LoRALayer], config: LoraConfig, dtype: torch.dtype
) -> Incoming:
    """A new adapter with random values in the layers that the config selects."""
    incoming = Incoming(is_new=True)
    for path, module in find_targets(model, config):
        if not isinstance(module, LoRALayer | LoRAModule):
            raise _unknown(path)
        for layer, spec in layers_of(module, path, config):
            name = layer_name(path, layer)
            if layer is not layers.get(name):
                raise _unknown(name)
            if spec.subtracts_init:
                raise AdapterError(
                    "expected init_lora_weights True or 'gaussian', but got "
                    f"{spec.init_lora_weights!r}, which also changes the weight"
                )
            like = {"dtype": dtype, "device": layer.stored_weight.device}
            lora_a, lora_b = (torch.empty(shape, **like) for shape in layer.factor_shapes(spec.r))
            initialize.plain_(spec, lora_a, lora_b)
            incoming.specs[name], incoming.values[name] = spec, (lora_a, lora_b)
    return incoming


def _of_tensors(
    layers: Mapping[str, LoRALayer],
    tensors: Mapping[str, Tensor],
    config: AnyConfig | None,
    dtype: torch.dtype,
) -> Incoming:
    """The adapter in tensors with keys ``<path>.lora_a`` and ``<path>.lora_b``; their shapes give
    the ranks."""
    if config is None:
        raise AdapterError(
            "expected a config beside tensors, a LoraConfig with their lora_alpha, lora_dropout "
            "and use_rslora"
        )
    config, incoming = as_config(config), Incoming()
    paths = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
    wanted = {f"{path}.{part}" for path in paths for part in ("lora_a", "lora_b")}
    if wanted != set(tensors) or not tensors:
        odd = sorted(wanted.symmetric_difference(tensors))[:4]
        raise AdapterError(
            f"expected '<path>.lora_a' and '<path>.lora_b' for each layer, but see {odd}"
        )
    plain, specs = config.spec_for(""), {}
    has_patterns = bool(config.rank_pattern or config.alpha_pattern)
    for path in paths:
        layer = _known(path, layers)
        lora_a, lora_b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
        if not all(isinstance(t, Tensor) and t.dim() == 2 for t in (lora_a, lora_b)):
            raise AdapterError(f"{path!r}: expected two matrices as lora_a and lora_b")
        spec, rank = plain, len(lora_a)
        if isinstance(layer, LoRAParameter):
            spec, rank = _spec_of(path, layer, config), len(lora_a) // layer.count or 1
        elif has_patterns:
            spec = config.spec_for(path)
        if (rank, spec.lora_alpha) not in specs:
            specs[rank, spec.lora_alpha] = AdapterSpec(
                rank, spec.lora_alpha, spec.lora_dropout, spec.use_rslora, lora_bias=spec.lora_bias
            )
        incoming.specs[path] = specs[rank, spec.lora_alpha]
        incoming.values[path] = _fitting(lora_a, dtype), _fitting(lora_b, dtype)
    return incoming


def _spec_of(path: str, layer: LoRAParameter, config: LoraConfig) -> AdapterSpec:
    """The spec that a config gives a parameter, also if it does not select it."""
    found = layers_of(layer.module, path.rpartition(".")[0], config)
    return next((spec for each, spec in found if each is layer), config.spec_for(path))


def _fitting(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The value, or its copy in `dtype` if the conversion may overflow; a wider dtype cannot, so
    the value is then converted when it is written."""
    value = value.detach()
    return value if torch.promote_types(value.dtype, dtype) is dtype else value.to(dtype)


def _of_folder(
    model: nn.Module, layers: Mapping[str, LoRALayer], folder: str, dtype: torch.dtype
) -> Incoming:
    def check(placement: Placement) -> None:
        if any(stored.written for stored in placement.stored.values()):
            raise AdapterError(
                "expected lora_A and lora_B alone, but the adapter has biases or modules_to_save, "
                "which all adapters of a pool share; use lora_ext.load_adapter for it"
            )
        for target in placement.targets:
            if target.spec.subtracts_init:
                raise AdapterError(
                    f"expected plain LoRA, but got init {target.spec.init_lora_weights!r}; "
                    "load_adapter it, and save_adapter writes it as plain LoRA"
                )
            _known(layer_name(target.path, target.layer), layers)
        _check_parameters(placement, layers)

    placement = read_placement(model, folder, dtype, check)
    incoming = Incoming()
    for target in placement.targets:
        name = layer_name(target.path, target.layer)
        incoming.specs[name] = target.spec
        incoming.values[name] = (target.values["lora_a"], target.values["lora_b"])
    return incoming


def _check_parameters(placement: Placement, layers: Mapping[str, LoRALayer]) -> None:
    """Checks that the file has factors of each parameter of the pool that its config names."""
    found = {layer_name(target.path, target.layer) for target in placement.targets}
    parameters = (name for name, layer in layers.items() if isinstance(layer, LoRAParameter))
    wanted = named(parameters, placement.config.target_parameters)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise AdapterError(
            f"expected lora_A and lora_B of all that target_parameters names, but the file lacks "
            f"{some(missing)}; results would differ"
        )


def _known(path: str, layers: Mapping[str, LoRALayer]) -> LoRALayer:
    if path not in layers:
        raise _unknown(path)
    return layers[path]


def _unknown(path: str) -> AdapterError:
    return AdapterError(
        f"expected an adapter of the pool's layers, but it is for {path!r} too; make the pool with "
        "target_modules that choose it"
    )


def _check_spec(path: str, spec: AdapterSpec, layer: LoRALayer) -> None:
    pool = layer.pool
    if spec.r > pool.largest_rank:
        given = "the pool's max_rank"
        if pool.largest_rank > pool.max_rank:
            given = f"of {pool.projections} projections with {given} each"
        raise AdapterError(
            f"{path!r}: expected a rank of at most {pool.largest_rank}, {given}, but got {spec.r}"
        )
    if isinstance(layer, LoRAParameter):
        layer.check_spec(repr(path), spec)
    if spec.lora_bias:
        raise AdapterError(f"{path!r}: expected no lora_bias, for which a pool has no room")


def _check_values(path: str, spec: AdapterSpec, layer: LoRALayer, values: Sequence[Tensor]) -> None:
    shapes = layer.pool.shapes(spec.r)
    for name, value, shape in zip(("lora_a", "lora_b"), values, shapes, strict=True):
        if value.shape != shape:
            raise AdapterError(
                f"{path!r}: expected {name} of shape {list(shape)}, but got {list(value.shape)}"
            )
        # A sum of finite values is finite except for an overflow, and takes a third of the time.
        if not (math.isfinite(value.sum()) or torch.isfinite(value).all()):
            raise AdapterError(
                f"{path!r}: expected finite values in {name}, but got NaN or infinity"
            )


@contextmanager
def naming(method: str, name: str) -> Iterator[None]:
    """Adds the method and the adapter to the beginning of an error's message."""
    try:
        yield
    except ValueError as error:
        raise AdapterError(f"lora_ext.AdapterPool.{method}: {name!r}: {error}") from None
    except TypeError as error:
        raise TypeError(f"lora_ext.AdapterPool.{method}: {name!r}: {error}") from None
