"""What PEFT's format stores for one adapter of a model: the config, derived from the layers, and
the tensors."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models.config import BIASES
from ..models.model import BIAS_SAVED_BY, adapter_names, lora_layers, saved_modules
from ..nn import LoRAEmbedding, LoRALayer, LoRALinear
from ..nn.adapter_spec import AdapterSpec
from ..nn.experts import is_experts
from ..nn.parameter import LoRAParameter
from .errors import AdapterError, telling
from .layout import Slot, bias_of, slots, stored_tensors, tensors_of
from .peft_config import PEFT_VERSION, AdapterConfig
from .targets import anchored, base_modules, module_names, parameter_names, saved_paths

# Names of the linear layers in a mixture's experts before transformers 5, which had one layer for
# each expert.
_NAMES_OF_EXPERTS = frozenset(("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"))
_PEFT_PARTS = (
    "base_layer",
    "lora_dropout",
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "default",
)


class Content:
    """One adapter of a model as PEFT stores it; bias is "none", "all" or "lora_only", None derives
    it from the model. AdapterError if there is no such adapter, or the format cannot express it."""

    def __init__(self, model: nn.Module, adapter: str, bias: str | None) -> None:
        self.model = model
        self.adapter = adapter
        self.every = base_modules(model, remove_duplicate=False)
        found = [(p, m) for p, m in lora_layers(model) if m.spec_of(adapter) is not None]
        self.parameters = {m.name_at(p): m for p, m in found if isinstance(m, LoRAParameter)}
        self.layers = {p: m for p, m in found if not isinstance(m, LoRAParameter)}
        self.by_name: dict[str, LoRALayer] = {**self.layers, **self.parameters}
        if not found:
            raise AdapterError(
                f"expected one of the adapters {adapter_names(model)}, but got {adapter!r}"
            )
        if "" in self.layers or any("." not in name for name in self.parameters):
            raise AdapterError("expected a model with LoRA layers inside, but got a single layer")
        if bias not in (None, *BIASES):
            raise AdapterError(f"expected bias to be None or one of {BIASES}, but got {bias!r}")
        self.specs = {path: self._plain_spec(path, layer) for path, layer in self.by_name.items()}
        self.saved = self._find_saved()
        self.bias = bias or self._find_bias()
        self.lora_bias = any(spec.lora_bias for spec in self.specs.values())
        embeddings = [p for p, layer in self.layers.items() if isinstance(layer, LoRAEmbedding)]
        if self.lora_bias and embeddings:
            raise AdapterError(
                "expected no lora_bias beside embeddings, which have none in PEFT, but got both: "
                f"{embeddings[0]!r} is an embedding"
            )

    @property
    def has_conv1d(self) -> bool:
        return any(getattr(layer, "fan_in_fan_out", False) for layer in self.layers.values())

    def _plain_spec(self, path: str, layer: LoRALayer) -> AdapterSpec:
        """That of a plain LoRA with the same scaling."""
        spec, rank = layer.spec_of(self.adapter), layer.rank(self.adapter)
        assert spec is not None
        if rank == spec.r and not spec.subtracts_init:
            return spec
        alpha = spec.lora_alpha * (rank / spec.r) ** (0.5 if spec.use_rslora else 1)
        with telling(f"{path!r} as a plain LoRA: "):
            return replace(spec, r=rank, lora_alpha=alpha, init_lora_weights=True)

    # ---- tensors ----

    def tensors(self) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
        """(name in the file, tensor, shape in the file), in the order of the layers."""
        for name, layer in self.by_name.items():
            lora_a, lora_b = layer.factors(self.adapter)
            values = {"lora_a": lora_a, "lora_b": lora_b}
            if self.adapter in layer.lora_bias:
                values["lora_bias"] = layer.lora_bias[self.adapter]
            for slot in self.slots(name):
                value = values.get(slot.table)
                yield slot.key, torch.zeros(slot.shape) if value is None else value, slot.shape
        adapted = {*self.layers, *(name.rpartition(".")[0] for name in self.parameters)}
        for stored in stored_tensors(self.model, self.every, self.bias, adapted, self.saved):
            yield stored.key, stored.tensor, tuple(stored.tensor.shape)

    def slots(self, name: str) -> list[Slot]:
        """The tensors of a layer, or of a parameter, as PEFT stores them."""
        layer, rank, depth = self.by_name[name], self.specs[name].r, 0
        if isinstance(layer, LoRAParameter):
            around = [one for one in layer.module.layers() if one.spec_of(self.adapter)]
            name, depth = name.rpartition(".")[0], len(around) - 1 - around.index(layer)
        return slots(name, layer, rank, self.lora_bias, depth)

    # ---- config ----

    def config(self, information: Mapping[str, Any]) -> AdapterConfig:
        """The config that selects these layers, and no others, in PEFT, with further fields."""
        use_rslora = most_common(spec.use_rslora for spec in self.specs.values())
        as_parameters = self._layers_as_parameters()
        # The names that PEFT matches with the patterns.
        names = {path: f"{path}.weight" if path in as_parameters else path for path in self.specs}
        ranks = {names[path]: spec.r for path, spec in self.specs.items()}
        alphas = {names[path]: _alpha(spec, use_rslora) for path, spec in self.specs.items()}
        dropouts = [spec.lora_dropout for spec in self.specs.values()]
        parameters = [*self.parameters, *(names[path] for path in as_parameters)]
        if parameters and any(dropouts):
            warnings.warn(
                "lora_ext.save_adapter: lora_dropout 0 is stored, since PEFT refuses a folder with "
                "another for the experts of a mixture; to train on with dropout, put "
                f'"lora_dropout": {max(dropouts)} into adapter_config.json before '
                "lora_ext.load_adapter",
                stacklevel=4,
            )
            dropouts = [0.0]
        if len(set(dropouts)) > 1:
            warnings.warn(
                "lora_ext.save_adapter: PEFT's format has one dropout for all layers; of "
                f"{sorted(set(dropouts))} the most common is stored",
                stacklevel=4,
            )
        r, alpha = most_common(ranks.values()), most_common(alphas.values())
        modules = [path for path in self.layers if path not in as_parameters]
        target_modules, exclude_modules = module_names(self.model, modules, self.saved_names)
        return AdapterConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=most_common(dropouts),
            use_rslora=use_rslora,
            lora_bias=self.lora_bias,
            bias=self.bias,
            target_modules=target_modules,
            target_parameters=parameter_names(self.model, parameters),
            peft_version=PEFT_VERSION if parameters else None,
            exclude_modules=exclude_modules,
            modules_to_save=self.saved_names,
            rank_pattern={anchored(path): n for path, n in ranks.items() if n != r},
            alpha_pattern={anchored(path): a for path, a in alphas.items() if a != alpha},
            **information,
        )

    def _layers_as_parameters(self) -> set[str]:
        """The layers that target_parameters has to name: in a mixture PEFT interprets some names in
        target_modules as names of the experts' parameters."""
        if not any(is_experts(module) for module in self.every.values()):
            return set()
        found = set()
        for path, layer in self.layers.items():
            spec = self.specs[path]
            is_plain = type(layer) is LoRALinear and not layer.fan_in_fan_out and not spec.lora_bias
            has_dropout = spec.lora_dropout and not self.parameters  # beside parameters 0 is stored
            if path.rpartition(".")[2] in _NAMES_OF_EXPERTS and is_plain and not has_dropout:
                found.add(path)
        return found

    # ---- what is stored whole ----

    def _find_saved(self) -> dict[str, nn.Module]:
        """Path -> module to save, including modules that PEFT's names cannot exclude: PEFT copies
        each of them, so tied tensors are stored for every module that holds them."""
        modules = self.every
        paths = {path for path, _ in saved_modules(self.model, self.adapter)}
        while True:
            if "" in paths:
                raise AdapterError("expected modules to save inside the model, but got all of it")
            states = [modules[path].state_dict(keep_vars=True) for path in paths]
            held = {id(tensor) for state in states for tensor in state.values()}
            tied = {p for p, m in modules.items() if any(id(t) in held for _, t in tensors_of(m))}
            more = {p for p in tied if not any(f"{p}.".startswith(f"{r}.") for r in paths)}
            self.saved_names = self._saved_names(paths | more)
            found = set(saved_paths(self.model, self.saved_names)) | paths | more
            if found == paths:
                break
            paths = found
        for path in paths:
            inside = [p for p in paths if p.startswith(f"{path}.")]
            parts = self.every[path].modules()
            if inside or any(isinstance(part, LoRALayer) for part in parts):
                what = f"{inside[0]!r}, which is one too" if inside else "layers with adapters"
                raise AdapterError(
                    f"expected modules to save that PEFT can copy one by one, but {path!r} holds "
                    f"{what}"
                )
        return {path: self.every[path] for path in sorted(paths)}

    def _saved_names(self, paths: set[str]) -> tuple[str, ...]:
        short = tuple(sorted({path.rpartition(".")[2] for path in paths}))
        if set(saved_paths(self.model, short)) == paths and not _clashes(short):
            return short
        names = tuple(sorted(paths))
        for name, part in _clashes(names):
            raise AdapterError(
                f"expected modules to save that PEFT can name, but got {name!r}, with which PEFT's "
                f"{part!r} ends"
            )
        return names

    def _find_bias(self) -> str:
        """The mode that covers the biases that are trained or that came with the adapter."""
        inside = {id(part) for module in self.saved.values() for part in module.modules()}
        owned = set()
        for module in (self.model, *base_modules(self.model).values()):
            bias, by = bias_of(module), getattr(module, BIAS_SAVED_BY, ())
            if bias is not None and (bias.requires_grad or self.adapter in by):
                owned.add(id(module))
        owned -= inside
        if not owned:
            return "none"
        return "lora_only" if owned <= {id(layer) for layer in self.layers.values()} else "all"


def _clashes(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """The (name, part) pairs in which a name in modules_to_save is the end of the name of a part of
    PEFT's own layers: PEFT would try to copy that part too."""
    return [(name, part) for name in names for part in _PEFT_PARTS if part.endswith(name)]


def most_common(values):
    return Counter(values).most_common(1)[0][0]


def _alpha(spec: AdapterSpec, use_rslora: bool) -> float:
    """The alpha that gives the spec's scaling with this convention; an int if it is integral."""
    if spec.use_rslora == use_rslora:
        return (
            int(spec.lora_alpha) if float(spec.lora_alpha).is_integer() else float(spec.lora_alpha)
        )
    return alpha_of(spec.scaling, spec.r, use_rslora)


def alpha_of(scaling: float, rank: int, use_rslora: bool) -> float:
    """The alpha of a scaling, without the noise of its roots; an int if it is integral."""
    alpha = float(f"{scaling * (math.sqrt(rank) if use_rslora else rank):.15g}")
    return int(alpha) if alpha.is_integer() else alpha
