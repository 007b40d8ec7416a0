"""Reads the adapters to write into a pool; an adapter is checked completely before any write."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..adapters.errors import AdapterError
from ..adapters.load import read_placement
from ..adapters.placement import Placement
from ..models import LoRAConfig
from ..models.config import not_a_config
from ..models.find import find_targets
from ..nn import LoRALayer, initialize
from ..nn.adapter_spec import AdapterSpec

Source = LoRAConfig | Mapping[str, Tensor] | str | os.PathLike[str]


@dataclass
class Incoming:
    """An adapter, ready to be written.

    Attributes:
        specs: path of a layer -> the adapter's spec in this layer.
        values: path -> (lora_a ``[r, in]``, lora_b ``[out, r]``).
        is_new: whether it has random values and is to be trained.
    """

    specs: dict[str, AdapterSpec] = field(default_factory=dict)
    values: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    is_new: bool = False


def read(
    model: nn.Module,
    layers: Mapping[str, LoRALayer],
    max_rank: int,
    source: Source,
    config: LoRAConfig | None,
) -> Incoming:
    """Reads the adapter of a source; sources are those of `AdapterPool.add`.

    Raises:
        AdapterError: a ValueError; it does not fit the pool, or its folder cannot be read.
        TypeError: source has another type.
    """
    dtype = next(iter(layers.values())).pool.lora_a.dtype
    if isinstance(source, LoRAConfig):
        if config is not None:
            raise TypeError("expected one LoRAConfig, but got two")
        incoming = _random(model, layers, source, dtype)
    elif isinstance(source, Mapping):
        incoming = _of_tensors(layers, source, config, dtype)
    elif isinstance(source, str | os.PathLike):
        if config is not None:
            raise TypeError("expected no config beside a folder, which has its own")
        incoming = _of_folder(model, layers, os.fspath(source), dtype)
    else:
        raise TypeError(
            "expected a LoRAConfig, a mapping of tensors or a folder, but got "
            + not_a_config(source)
        )
    for path, spec in incoming.specs.items():
        _check_spec(path, spec, max_rank)
        _check_values(path, spec, layers[path], incoming.values[path])
    return incoming


def _random(
    model: nn.Module, layers: Mapping[str, LoRALayer], config: LoRAConfig, dtype: torch.dtype
) -> Incoming:
    """A new adapter with random values in the layers that the config selects."""
    incoming = Incoming(is_new=True)
    for path, module in find_targets(model, config):
        layer = _known(path, layers) if module is layers.get(path) else _known(path, {})
        spec = config.spec_for(path)
        if spec.init not in ("kaiming", "gaussian"):
            raise AdapterError(
                f"expected init 'kaiming' or 'gaussian', but got {spec.init!r}, which subtracts "
                "factors of the weight"
            )
        like = {"dtype": dtype, "device": layer.stored_weight.device}
        shape_a, shape_b = layer.factor_shapes(spec.r)
        lora_a, lora_b = torch.empty(shape_a, **like), torch.empty(shape_b, **like)
        if spec.init == "kaiming":
            initialize.kaiming_(lora_a, lora_b)
        else:
            initialize.gaussian_(lora_a, lora_b, spec.r)
        incoming.specs[path], incoming.values[path] = spec, (lora_a, lora_b)
    return incoming


def _of_tensors(
    layers: Mapping[str, LoRALayer],
    tensors: Mapping[str, Tensor],
    config: LoRAConfig | None,
    dtype: torch.dtype,
) -> Incoming:
    """The adapter in tensors with keys ``<path>.lora_a`` and ``<path>.lora_b``; their shapes give
    the ranks."""
    if config is None:
        raise AdapterError(
            "expected a config beside tensors, a LoRAConfig with their alpha, dropout and "
            "use_rslora"
        )
    incoming = Incoming()
    paths = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
    wanted = {f"{path}.{part}" for path in paths for part in ("lora_a", "lora_b")}
    if wanted != set(tensors) or not tensors:
        odd = sorted(wanted.symmetric_difference(tensors))[:4]
        raise AdapterError(
            f"expected pairs of keys '<path>.lora_a' and '<path>.lora_b', but see {odd}"
        )
    plain, specs = config.spec_for(""), {}
    has_patterns = bool(config.rank_pattern or config.alpha_pattern)
    for path in paths:
        _known(path, layers)
        lora_a, lora_b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
        if not all(isinstance(t, Tensor) and t.dim() == 2 for t in (lora_a, lora_b)):
            raise AdapterError(f"{path!r}: expected two matrices as lora_a and lora_b")
        spec = config.spec_for(path) if has_patterns else plain
        rank = lora_a.shape[0]
        if rank not in specs or has_patterns:
            specs[rank] = AdapterSpec(
                rank, spec.alpha, spec.dropout, spec.use_rslora, lora_bias=spec.lora_bias
            )
        incoming.specs[path] = specs[rank]
        incoming.values[path] = _fitting(lora_a, dtype), _fitting(lora_b, dtype)
    return incoming


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
                "expected factors alone, but the adapter stores biases or modules to save, which "
                "the model has once for all adapters of a pool; load_adapter takes it"
            )
        for target in placement.targets:
            if target.spec.subtracts_init:
                raise AdapterError(
                    f"expected plain LoRA, but got init {target.spec.init!r}; save_adapter after "
                    "load_adapter writes it as such"
                )
            if target.order is not None:
                raise AdapterError(
                    f"expected adapters of linear layers, but it is on {target.name!r}, too, a "
                    "parameter, for which a pool has no room; load_adapter takes it"
                )
            _known(target.path, layers)

    placement = read_placement(model, folder, dtype, check)
    incoming = Incoming()
    for target in placement.targets:
        incoming.specs[target.path] = target.spec
        incoming.values[target.path] = (target.values["lora_a"], target.values["lora_b"])
    return incoming


def _known(path: str, layers: Mapping[str, LoRALayer]) -> LoRALayer:
    if path not in layers:
        raise AdapterError(
            f"expected an adapter of the pool's layers, but it is for {path!r} too; make the pool "
            "with target_modules that choose it"
        )
    return layers[path]


def _check_spec(path: str, spec: AdapterSpec, max_rank: int) -> None:
    if spec.r > max_rank:
        raise AdapterError(
            f"{path!r}: expected a rank of at most {max_rank}, the pool's max_rank, but got "
            f"{spec.r}"
        )
    if spec.lora_bias:
        raise AdapterError(f"{path!r}: expected no lora_bias, for which a pool has no room")


def _check_values(path: str, spec: AdapterSpec, layer: LoRALayer, values: Sequence[Tensor]) -> None:
    out_features, in_features = layer.pool.lora_b.shape[1], layer.pool.lora_a.shape[2]
    shapes = ((spec.r, in_features), (out_features, spec.r))
    for name, value, shape in zip(("lora_a", "lora_b"), values, shapes, strict=True):
        if value.shape != shape:
            raise AdapterError(
                f"{path!r}: expected {name} of shape {list(shape)}, but got {list(value.shape)}"
            )
        # A sum of finite values is finite except for an overflow, and takes a third of the time.
        if not (math.isfinite(value.sum()) or torch.isfinite(value).all()):
            raise AdapterError(f"{path!r}: expected finite values in {name}, but got others")


@contextmanager
def naming(method: str, name: str) -> Iterator[None]:
    """Adds the method and the adapter to the beginning of an error's message."""
    try:
        yield
    except ValueError as error:
        raise AdapterError(f"lora_ext.AdapterPool.{method}: {name!r}: {error}") from None
    except TypeError as error:
        raise TypeError(f"lora_ext.AdapterPool.{method}: {name!r}: {error}") from None
