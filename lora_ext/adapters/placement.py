"""What an adapter's tensors and config require of a model: which layers get which adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..models.find import replacement_for
from ..models.model import adapter_names
from ..nn import (
    LoRAConv2d,
    LoRAEmbedding,
    LoRALayer,
    LoRALinear,
    LoRAMergedLinear,
    LoRAQuantizedLinear,
)
from ..nn.adapter_spec import AdapterSpec
from ..nn.experts import LoRAExperts, is_experts
from ..nn.linear import is_conv1d
from ..nn.module import LoRAModule, adaptable_parameters
from ..nn.parameter import LoRAParameter
from .alphas import find_alphas
from .errors import AdapterError, some
from .layout import (
    PREFIX,
    WRAPPED,
    Slot,
    Stored,
    check_real,
    path_of_factor,
    slots,
    stored_tensors,
)
from .parameters import (
    FactorOrder,
    check_wrappers,
    layers_of,
    named_parameters,
    order_of,
    warn_of_unsloth,
    without_wrappers,
)
from .peft_config import AdapterConfig
from .targets import base_modules, saved_paths
from .tensors import Entry


@dataclass
class Target:
    """A module that gets the adapter.

    Attributes:
        path, module: the module and its path in the model.
        name: the path, or that of the parameter.
        layer: the module itself if it has adapters, else a new layer around it without adapters;
            for a parameter, the part of such a module.
        spec: of the adapter there.
        slots: the tensors that the adapter needs.
        order: the layout of the factors in the file.
        values: the tensors by the layer's attribute, after they are read.
    """

    path: str
    module: nn.Module
    name: str
    layer: LoRALayer
    spec: AdapterSpec
    slots: list[Slot]
    order: FactorOrder
    values: dict[str, Tensor] = field(default_factory=dict)

    @property
    def in_place(self) -> nn.Module:
        """The module that the model has at this path with the adapter."""
        return self.layer.module if isinstance(self.layer, LoRAParameter) else self.layer


class Placement:
    """Everything that an adapter requires of a model, with or without other adapters: the keys of
    the tensors in its file determine the layers, their shapes the rank.

    Attributes:
        modules: path -> module of the model, each once.
        every: path -> module of the model, at each of its paths.
        targets: modules that get the adapter.
        saved: path -> module that is stored whole.
        stored: key -> tensor of the base in the file.

    Raises:
        AdapterError: it requires something that the model does not have or that cannot be adapted.
    """

    def __init__(
        self, model: nn.Module, config: AdapterConfig, entries: Mapping[str, Entry]
    ) -> None:
        self.model = model
        self.config = config
        self.modules = base_modules(model)
        self.targets = self._find_targets(entries)
        self.every = base_modules(model, remove_duplicate=False)
        paths = saved_paths(model, config.modules_to_save)
        self.saved = {path: self._saved_module(path) for path in paths}
        self._saved_names = {path: set(root.state_dict()) for path, root in self.saved.items()}
        self.stored = {entry.key: entry for entry in self._find_stored()}

    def written(self) -> Iterator[tuple[Stored, Tensor]]:
        """The base's tensors that the file changes, each with its value, after they are read."""
        for stored in self.stored.values():
            if stored.value is not None:
                yield stored, stored.value

    def may_hold(self, key: str) -> bool:
        """Whether a file may have this tensor, although it is not applied."""
        if key in self.stored:
            return True
        # With bias "all" PEFT also stores copies of the biases of the modules to save.
        for part in (".original_module.", ".modules_to_save."):
            path, _, name = key.removeprefix(PREFIX).partition(part)
            if {name, name.partition(".")[2]} & self._saved_names.get(path, set()):
                return True
        return False

    def _find_targets(self, entries: Mapping[str, Entry]) -> list[Target]:
        wanted: dict[str, int] = {}
        for path in filter(None, map(path_of_factor, entries)):
            path, depth = without_wrappers(path)
            wanted[path] = max(depth, wanted.get(path, 0))
        paths = [path for path in self.modules if path in wanted]
        if not paths:
            adaptable = (p for p, module in self.modules.items() if replacement_for(module))
            example = next(adaptable, "<path>")
            raise AdapterError(
                f"expected tensors such as '{PREFIX}{example}.lora_A.weight', "
                f"of layers of the {type(self.model).__name__}, but none matches; got "
                f"{some(entries, 2) or 'no tensor'}; was the adapter trained on this model?"
            )
        own = self.config.target_parameters
        named = {p: named_parameters(p, self.modules[p], own) for p in paths}
        names = {p: [f"{p}.{each}" for each in named[p]] or [p] for p in paths}
        alphas = find_alphas([name for p in paths for name in names[p]], self.config)
        found: list[Target] = []
        for path in paths:
            module = self.modules[path]
            if named[path] and not _is_linear(module):
                check_wrappers(path, named[path], wanted[path], self.config)
                # The innermost of the wrappers that PEFT has for them first.
                wrapped = layers_of(path, named[path], _module_for(path, module), entries)
                layers = [*enumerate(reversed(wrapped))][::-1]
            else:
                layers = [(0, _layer_for(path, module))]
            for depth, layer in layers:
                name = names[path][0]
                if isinstance(layer, LoRAParameter):
                    name = f"{path}.{layer.parameter}"
                    check_real(repr(name), layer.weight)
                found.append(self._target(path, name, layer, depth, alphas[name], entries))
        warn_of_unsloth(self.config, [(target.layer, target.spec.r) for target in found])
        return found

    def _target(
        self,
        path: str,
        name: str,
        layer: LoRALayer,
        depth: int,
        alpha: float,
        entries: Mapping[str, Entry],
    ) -> Target:
        config, module = self.config, self.modules[path]
        lora_a = entries.get(slots(path, layer, 0, depth=depth)[0].key)
        order = order_of(layer, lora_a, config)
        rank = lora_a.shape[0] // order.count if lora_a and lora_a.shape else 0
        # PEFT initializes embeddings in the default way for any value of init_lora_weights.
        init = True if isinstance(layer, LoRAEmbedding) else config.init_lora_weights
        spec = AdapterSpec(
            r=rank if rank in config.rank_pattern.values() else config.r,
            lora_alpha=alpha,
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            init_lora_weights=init,
            lora_bias=config.lora_bias,
        )
        if spec.lora_bias and isinstance(layer, LoRAEmbedding):
            raise AdapterError(f"expected lora_bias false for the embedding {path!r}, but got true")
        if spec.subtracts_init and isinstance(layer, LoRAQuantizedLinear):
            raise AdapterError(
                f"expected plain LoRA for {path!r}, which is quantised, but got init_lora_weights "
                f"{spec.init_lora_weights!r}: its start values were subtracted from the weight "
                "before quantising; load it into that model, and save_adapter writes plain LoRA"
            )
        if spec.subtracts_init and not _can_subtract(spec, layer, module):
            raise AdapterError(
                f"expected init_lora_weights {spec.init_lora_weights!r} for linear layers with a "
                f"positive lora_alpha, but got alpha {spec.lora_alpha} for {path!r}, a "
                f"{type(module).__name__}"
            )
        own = slots(path, layer, spec.r, spec.lora_bias, depth, order.is_swapped)
        return Target(path, module, name, layer, spec, own, order)

    def _saved_module(self, path: str) -> nn.Module:
        module = self.every[path]
        if any(isinstance(part, LoRALayer) for part in module.modules()):
            raise AdapterError(
                f"expected modules_to_save without adapters, but {path!r} has some of "
                f"{adapter_names(self.model)}; unload them first"
            )
        return module

    def _find_stored(self) -> Iterator[Stored]:
        adapted = {target.path for target in self.targets}
        embeddings = []
        for name in ("get_input_embeddings", "get_output_embeddings"):
            # AttributeError and NotImplementedError are transformers' answers for "none".
            with suppress(AttributeError, NotImplementedError):
                get = getattr(self.model, name, None)
                embeddings.append(get() if callable(get) else None)
        for path, module in self.modules.items():
            weight = module._parameters.get("weight")
            if weight is not None and any(module is one for one in embeddings):
                # PEFT stores such a weight untrained, since it may have been resized.
                key = f"{PREFIX}{path}{WRAPPED if path in adapted else ''}.weight"
                yield Stored(key, weight, module, written=False)
        bias = self.config.bias
        yield from stored_tensors(self.model, self.every, bias, adapted, self.saved)


def _is_linear(module: nn.Module) -> bool:
    """Whether an adapter of the weight is an adapter of the module: W is ``[out, in]``."""
    if isinstance(module, LoRALinear):
        return not module.fan_in_fan_out
    return (
        type(module) is nn.Linear
        or isinstance(module, LoRAQuantizedLinear)
        or (replacement_for(module) is LoRAQuantizedLinear)
    )


def _layer_for(path: str, module: nn.Module) -> LoRALayer:
    """The layer that replaces a module which gets an adapter; AdapterError if it cannot."""
    if isinstance(module, LoRAMergedLinear):
        raise AdapterError(
            f"expected a layer with one lora_a and lora_b at {path!r}, but it is a "
            "LoRAMergedLinear, which has them for each of its groups"
        )
    if isinstance(module, LoRALayer):
        layer = module
    else:
        kind = replacement_for(module)
        if kind is not None and issubclass(kind, LoRAModule):
            raise AdapterError(
                f"expected target_parameters of adapter_config.json to name weights of {path!r} "
                f"({some(adaptable_parameters(module))}), for which the file has tensors, but it "
                "names none"
            )
        if kind is None:
            raise AdapterError(
                "expected nn.Linear, nn.Embedding, Conv1D, a 1x1 nn.Conv2d or a quantised linear "
                f"layer that lora_ext supports at {path!r}, but the adapter is for a "
                f"{type(module).__module__}.{type(module).__qualname__}"
            )
        layer = _around(kind, path, module)
    check_real(f"the weight of {path!r}", layer.stored_weight)
    return layer


def _module_for(path: str, module: nn.Module) -> LoRAModule:
    """The module that replaces one whose parameters get an adapter; AdapterError if they cannot."""
    if isinstance(module, LoRAModule):
        return module
    if isinstance(module, LoRALayer):
        raise AdapterError(
            f"expected {path!r} to have no adapter, since target_parameters names a parameter of "
            f"it, but it is a {type(module).__name__}; unload it first"
        )
    return _around(LoRAExperts if is_experts(module) else LoRAModule, path, module)


def _around(kind: Any, path: str, module: nn.Module) -> Any:
    try:
        return kind.around(module)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{path!r} cannot be adapted: {error}") from None


def _can_subtract(spec: AdapterSpec, layer: LoRALayer, module: nn.Module) -> bool:
    """Whether PEFT's init and this library's subtract the same product. PEFT's OLoRA decomposes a
    Conv1D's weight in its stored layout, and its convolutions have neither init."""
    if isinstance(layer, LoRAConv2d) or spec.scaling <= 0:
        return False
    return spec.init_lora_weights == "pissa" or not getattr(
        layer, "fan_in_fan_out", is_conv1d(module)
    )
