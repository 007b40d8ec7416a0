"""What PEFT's format stores for one adapter of a model: the config, derived from the layers, and
the tensors."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..models.config import BIASES
from ..models.model import BIAS_SAVED_BY, adapter_names, lora_layers, saved_modules
from ..nn import LoRAEmbedding, LoRALayer, LoRALinear
from ..nn.adapter_spec import AdapterSpec
from ..nn.experts import is_experts
from ..nn.parameter import LoRAParameter
from .errors import AdapterError
from .layout import PREFIX, Slot, bias_key, features, plain_spec, slots
from .names import escaped, module_names, parameter_names
from .owners import bias_of, tensors_of
from .parameters import FactorOrder, parameter_slots
from .peft_config import PEFT_VERSION, AdapterConfig
from .targets import base_modules, saved_paths

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
    """One adapter as PEFT stores it.

    Args:
        model: has the adapter.
        adapter: its name.
        bias: "none", "all" or "lora_only"; None derives it from the model.

    Raises:
        AdapterError: the model has no such adapter, or the format cannot express it.
    """

    def __init__(self, model: nn.Module, adapter: str, bias: str | None) -> None:
        self.model = model
        self.adapter = adapter
        self.every = base_modules(model, remove_duplicate=False)
        self.layers: dict[str, LoRALayer] = {}
        self.parameters: dict[str, LoRAParameter] = {}
        for path, layer in lora_layers(model):
            if layer.spec_of(adapter) is not None:
                if isinstance(layer, LoRAParameter):
                    self.parameters[layer.name_at(path)] = layer
                else:
                    self.layers[path] = layer
        every = {**self.layers, **self.parameters}
        if not every:
            raise AdapterError(
                f"expected one of the adapters {adapter_names(model)}, but got {adapter!r}"
            )
        if "" in self.layers or any("." not in name for name in self.parameters):
            raise AdapterError("expected a model that holds layers, but got the layer itself")
        if bias not in (None, *BIASES):
            raise AdapterError(f"expected bias to be None or one of {BIASES}, but got {bias!r}")
        self.specs = {path: self._plain_spec(path, layer) for path, layer in every.items()}
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
        try:
            spec = layer.spec_of(self.adapter)
            assert spec is not None
            return plain_spec(spec, layer.rank(self.adapter))
        except ValueError as error:
            raise AdapterError(f"{path!r} as a plain LoRA: {error}") from None

    # ---- tensors ----

    def tensors(self) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
        """(name in the file, tensor, shape in the file), in the order of the layers."""
        for name, layer in {**self.layers, **self.parameters}.items():
            lora_a, lora_b = layer.factors(self.adapter)
            values = {"lora_a": lora_a, "lora_b": lora_b}
            if self.adapter in layer.lora_bias:
                values["lora_bias"] = layer.lora_bias[self.adapter]
            for slot in self.slots(name):
                value = values.get(slot.table)
                yield slot.key, torch.zeros(slot.shape) if value is None else value, slot.shape
        stored = {f"{PREFIX}{p}.{n}": t for p, m in self.saved.items() for n, t in _state(m)}
        if self.bias != "none":
            wrapped = {*self.layers, *(name.rpartition(".")[0] for name in self.parameters)}
            for path, module in {"": self.model, **self.every}.items():
                bias = bias_of(module)
                if bias is not None and (self.bias == "all" or path in self.layers):
                    stored[bias_key(path, path in wrapped)] = bias
        for key, tensor in stored.items():
            yield key, tensor, tuple(tensor.shape)

    def slots(self, name: str) -> list[Slot]:
        """The tensors of a layer, or of a parameter, as PEFT stores them."""
        rank, layer = self.specs[name].r, self.parameters.get(name)
        if layer is None:
            return slots(name, self.layers[name], rank, self.lora_bias)
        around = [one for one in layer.module.layers() if one.spec_of(self.adapter)]
        depth = len(around) - 1 - around.index(layer)
        shapes = FactorOrder(layer.count).shapes(rank, features(layer))
        return parameter_slots(name.rpartition(".")[0], depth, shapes)

    # ---- config ----

    def config(
        self, base_model_name_or_path: str | None, revision: str | None, task_type: str | None
    ) -> AdapterConfig:
        """The config that selects these layers, and no others, in PEFT."""
        use_rslora = most_common(spec.use_rslora for spec in self.specs.values())
        as_parameters = self._layers_as_parameters()
        # The names that PEFT matches with the patterns.
        names = {path: f"{path}.weight" if path in as_parameters else path for path in self.specs}
        ranks = {names[path]: spec.r for path, spec in self.specs.items()}
        alphas = {names[path]: _alpha(spec, use_rslora) for path, spec in self.specs.items()}
        dropouts = [spec.dropout for spec in self.specs.values()]
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
            alpha=alpha,
            dropout=most_common(dropouts),
            use_rslora=use_rslora,
            lora_bias=self.lora_bias,
            bias=self.bias,
            target_modules=target_modules,
            target_parameters=parameter_names(self.model, parameters),
            peft_version=PEFT_VERSION if parameters else None,
            exclude_modules=exclude_modules,
            modules_to_save=self.saved_names,
            rank_pattern={_anchored(path): n for path, n in ranks.items() if n != r},
            alpha_pattern={_anchored(path): a for path, a in alphas.items() if a != alpha},
            base_model_name_or_path=base_model_name_or_path,
            revision=revision,
            task_type=task_type,
        )

    def _layers_as_parameters(self) -> set[str]:
        """The layers that target_parameters has to name: in a mixture PEFT interprets some names in
        target_modules as names of the experts' parameters."""
        if not any(is_experts(module) for module in self.every.values()):
            return set()
        return {
            path
            for path, layer in self.layers.items()
            if path.rpartition(".")[2] in _NAMES_OF_EXPERTS and self._can_be_parameter(path, layer)
        }

    def _can_be_parameter(self, path: str, layer: LoRALayer) -> bool:
        spec = self.specs[path]
        is_plain = type(layer) is LoRALinear and not layer.fan_in_fan_out
        has_dropout = spec.dropout and not self.parameters  # beside parameters 0 is stored
        return is_plain and not has_dropout and not spec.lora_bias

    # ---- what is stored whole ----

    def _find_saved(self) -> dict[str, nn.Module]:
        """Path -> module to save, including modules that PEFT's names cannot exclude: PEFT copies
        each of them, so tied tensors are stored for every module that holds them."""
        modules = self.every
        paths = {path for path, _ in saved_modules(self.model, self.adapter)}
        while True:
            if "" in paths:
                raise AdapterError("expected modules to save inside the model, but got all of it")
            held = {id(t) for path in paths for _, t in _state(self.every[path])}
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
        owners = [
            module
            for module in (self.model, *base_modules(self.model).values())
            if id(module) not in inside and self._owns_bias(module)
        ]
        adapted = {id(layer) for layer in self.layers.values()}
        if not owners:
            return "none"
        return "lora_only" if all(id(module) in adapted for module in owners) else "all"

    def _owns_bias(self, module: nn.Module) -> bool:
        bias = bias_of(module)
        return bias is not None and (
            bias.requires_grad or self.adapter in getattr(module, BIAS_SAVED_BY, ())
        )


def _clashes(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """The (name, part) pairs in which a name in modules_to_save is the end of the name of a part of
    PEFT's own layers: PEFT would try to copy that part too."""
    return [(name, part) for name in names for part in _PEFT_PARTS if part.endswith(name)]


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.state_dict(keep_vars=True).items())


def most_common(values):
    return Counter(values).most_common(1)[0][0]


def _alpha(spec: AdapterSpec, use_rslora: bool) -> float:
    """The alpha that gives the spec's scaling with this convention; an int if it is integral."""
    if spec.use_rslora == use_rslora:
        return int(spec.alpha) if float(spec.alpha).is_integer() else float(spec.alpha)
    return alpha_of(spec.scaling, spec.r, use_rslora)


def alpha_of(scaling: float, rank: int, use_rslora: bool) -> float:
    """The alpha of a scaling, without the noise of its roots; an int if it is integral."""
    alpha = float(f"{scaling * (math.sqrt(rank) if use_rslora else rank):.15g}")
    return int(alpha) if alpha.is_integer() else alpha


def _anchored(path: str) -> str:
    """A key of rank_pattern that matches this path alone."""
    return f"^{escaped(path)}"
