"""What an adapter's tensors and config require of a model: which layers get which adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..models.model import adapter_names, named_modules
from ..nn import LoRAEmbedding, LoRALayer, LoRAQuantizedLinear
from ..nn.adapter_spec import AdapterSpec
from ..nn.parameter import LoRAParameter
from .adaptable import can_subtract, example_path, is_linear, layer_for, module_for
from .alphas import find_alphas
from .errors import AdapterError, some
from .layout import PREFIX, Slot, bias_key, features, path_of_factor, slots
from .owners import bias_of, check_real
from .parameters import (
    FactorOrder,
    check_wrappers,
    in_file,
    named_parameters,
    order_of,
    parameter_of,
    parameter_slots,
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
        order: the layout of a parameter's factors in the file.
        values: the tensors by the layer's attribute, after they are read.
    """

    path: str
    module: nn.Module
    name: str
    layer: LoRALayer
    spec: AdapterSpec
    slots: list[Slot]
    order: FactorOrder | None = None
    values: dict[str, Tensor] = field(default_factory=dict)

    @property
    def in_place(self) -> nn.Module:
        """The module that the model has at this path with the adapter."""
        return self.layer.module if isinstance(self.layer, LoRAParameter) else self.layer


@dataclass
class Stored:
    """A tensor of the base in the file.

    Attributes:
        key: its name in the file.
        tensor: of the model.
        holder: the module that it is a parameter or buffer of.
        written: False if the tensor is optional in the file and must have the model's values.
        is_copied: whether PEFT copies the holder, so that modules tied to it do not change.
        value: the value to write, after it is read.
        untied: whether the holder gets a separate parameter instead.
    """

    key: str
    tensor: Tensor
    holder: nn.Module
    written: bool
    is_copied: bool = False
    value: Tensor | None = None
    untied: bool = False

    @property
    def name(self) -> str:
        """Its name in the holder."""
        return self.key.rpartition(".")[2]


class Placement:
    """Everything that an adapter requires of a model.

    Args:
        model: the base, with or without adapters.
        config: the adapter's.
        entries: the tensors of its file; their keys determine the layers, their shapes the rank.

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
            raise AdapterError(
                f"expected tensors such as '{PREFIX}{example_path(self.modules)}.lora_A.weight', "
                f"of layers of the {type(self.model).__name__}, but none matches; got "
                f"{some(entries, 2) or 'no tensor'}; is it the adapter's base?"
            )
        named = {p: self._named(p) for p in paths}
        names = {p: [f"{p}.{each}" for each in named[p]] or [p] for p in paths}
        alphas = find_alphas([name for p in paths for name in names[p]], self.config)
        found = []
        for path in paths:
            if not named[path] or is_linear(self.modules[path]):
                found.append(self._target(path, names[path][0], alphas[names[path][0]], entries))
            else:
                check_wrappers(path, named[path], wanted[path], self.config)
                found += self._parameters(path, named[path], alphas, entries)
        layers = [(t.layer, t.spec.r) for t in found if isinstance(t.layer, LoRAParameter)]
        warn_of_unsloth(self.config, layers)
        return found

    def _named(self, path: str) -> list[str]:
        """The parameters of a module that get the adapter; [] if the module itself gets it."""
        return named_parameters(path, self.modules[path], self.config.target_parameters)

    def _parameters(
        self,
        path: str,
        names: list[str],
        alphas: Mapping[str, float],
        entries: Mapping[str, Entry],
    ) -> Iterator[Target]:
        """The targets of a module that PEFT wraps for parameters, the innermost first."""
        module = self.modules[path]
        around = module_for(path, module)
        layers = {each: parameter_of(path, each, around.layers()) for each in names}
        names = in_file(path, layers, entries)
        for depth, parameter in zip(reversed(range(len(names))), names, strict=True):
            name, layer = f"{path}.{parameter}", layers[parameter]
            check_real(repr(name), layer.weight)
            entry = entries.get(parameter_slots(path, depth, ((0, 0), (0, 0)))[0].key)
            order = order_of(layer, entry, self.config)
            rank = entry.shape[0] // order.count if entry and entry.shape else 0
            spec = self._spec(name, rank, alphas[name], self.config.init)
            shapes = order.shapes(spec.r, features(layer))
            slots = parameter_slots(path, depth, shapes)
            yield Target(path, module, name, layer, spec, slots, order)

    def _spec(self, name: str, rank: int, alpha: float, init: str) -> AdapterSpec:
        config = self.config
        return AdapterSpec(
            r=rank if rank in config.rank_pattern.values() else config.r,
            alpha=alpha,
            dropout=config.dropout,
            use_rslora=config.use_rslora,
            init=init,
            lora_bias=config.lora_bias,
        )

    def _target(self, path: str, name: str, alpha: float, entries: Mapping[str, Entry]) -> Target:
        config, module = self.config, self.modules[path]
        layer = layer_for(path, module)
        lora_a = entries.get(slots(path, layer, config.r, False)[0].key)
        rank = lora_a.shape[0] if lora_a and lora_a.shape else 0
        # PEFT initializes embeddings in the default way for any value of init_lora_weights.
        init = "kaiming" if isinstance(layer, LoRAEmbedding) else config.init
        spec = self._spec(path, rank, alpha, init)
        if spec.lora_bias and isinstance(layer, LoRAEmbedding):
            raise AdapterError(f"expected lora_bias false for the embedding {path!r}, but got true")
        if spec.subtracts_init and isinstance(layer, LoRAQuantizedLinear):
            raise AdapterError(
                f"expected plain LoRA for {path!r}, which is quantised, but got init_lora_weights "
                f"{spec.init!r}: its factors are taken out of the weight as it was before; load it "
                "into that model, and save_adapter writes it as plain LoRA"
            )
        if spec.subtracts_init and not can_subtract(spec, layer, module):
            raise AdapterError(
                f"expected init_lora_weights {spec.init!r} for linear layers with a positive "
                f"lora_alpha, but got alpha {spec.alpha} for {path!r}, a {type(module).__name__}"
            )
        return Target(path, module, name, layer, spec, slots(path, layer, spec.r, spec.lora_bias))

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
        for path in self._embedding_paths():
            module = self.modules[path]
            weight = module._parameters.get("weight")
            if weight is not None:
                inside = "base_layer." if path in adapted else ""
                yield Stored(f"{PREFIX}{path}.{inside}weight", weight, module, written=False)
        for path, module in {"": self.model, **self.every}.items():
            bias = bias_of(module)
            if bias is not None and (
                self.config.bias == "all" or (self.config.bias == "lora_only" and path in adapted)
            ):
                yield Stored(bias_key(path, path in adapted), bias, module, written=True)
        for path, root in self.saved.items():
            holders = dict(named_modules(root))
            for name, tensor in root.state_dict(keep_vars=True).items():
                holder = holders[name.rpartition(".")[0]]
                key = f"{PREFIX}{path}.{name}"
                yield Stored(key, tensor, holder, written=True, is_copied=True)

    def _embedding_paths(self) -> list[str]:
        """The paths at which PEFT stores an untrained weight, since it may have been resized."""
        found = []
        for name in ("get_input_embeddings", "get_output_embeddings"):
            get = getattr(self.model, name, None)
            try:
                found.append(get() if callable(get) else None)
            except (AttributeError, NotImplementedError):  # transformers' answers for "none"
                continue
        return [path for path, m in self.modules.items() if any(m is one for one in found)]
