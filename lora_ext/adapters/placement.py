"""What an adapter's tensors and config ask of a model: which layers, and what for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..models.find import replacement_for
from ..models.model import adapter_names, named_modules
from ..nn import (
    LoRAConv2d,
    LoRAEmbedding,
    LoRALayer,
    LoRAMergedLinear,
    LoRAQuantizedLinear,
)
from ..nn.adapter_spec import AdapterSpec
from ..nn.linear import is_conv1d
from .alphas import find_alphas
from .errors import AdapterError, some
from .layout import PREFIX, Slot, bias_key, path_of_factor, slots
from .owners import bias_of, check_real
from .peft_config import AdapterConfig
from .targets import base_modules, saved_paths
from .tensors import Entry


@dataclass
class Target:
    """A module that gets the adapter.

    Attributes:
        path, module: in the model.
        layer: the module itself if it has adapters, else a layer without one around it.
        spec: of the adapter there.
        slots: the tensors that it needs.
        values: those tensors by the layer's attribute, once they are read.
    """

    path: str
    module: nn.Module
    layer: LoRALayer
    spec: AdapterSpec
    slots: list[Slot]
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Stored:
    """A tensor of the base in the file.

    Attributes:
        key: its name in the file.
        tensor: of the model.
        holder: the module that it is a parameter or buffer of.
        written: False if the file may have it, and then with the model's values.
        is_copied: whether PEFT copies the holder, so that what is tied to it stays as it is.
        value: what is to be written, once it is read.
        untied: whether the holder gets a parameter of its own instead.
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
    """All that an adapter asks of a model.

    Args:
        model: the base, with or without adapters.
        config: the adapter's.
        entries: the tensors of its file; their keys say which layers have it, their shapes its
            rank.

    Attributes:
        modules: path -> module of the model, each once.
        every: path -> module of the model, at each of its paths.
        targets: modules that get the adapter.
        saved: path -> module that is stored whole.
        stored: key -> tensor of the base in the file.

    Raises:
        AdapterError: it asks for what the model does not have, or for what cannot be adapted.
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
        # Copies that PEFT stores beside the modules to save, of their biases with bias "all".
        for part in (".original_module.", ".modules_to_save."):
            path, _, name = key.removeprefix(PREFIX).partition(part)
            if {name, name.partition(".")[2]} & self._saved_names.get(path, set()):
                return True
        return False

    def _find_targets(self, entries: Mapping[str, Entry]) -> list[Target]:
        wanted = {path_of_factor(key) for key in entries}
        paths = [path for path in self.modules if path in wanted]
        if not paths:
            raise AdapterError(
                f"expected tensors such as '{PREFIX}{_example(self.modules)}.lora_A.weight', of "
                f"layers of the {type(self.model).__name__}, but none matches; got "
                f"{some(entries, 2) or 'no tensor'}; is it the adapter's base?"
            )
        alphas = find_alphas(paths, self.config)
        return [self._target(path, alphas[path], entries) for path in paths]

    def _target(self, path: str, alpha: float, entries: Mapping[str, Entry]) -> Target:
        config, module = self.config, self.modules[path]
        layer = _layer_for(path, module)
        lora_a = entries.get(slots(path, layer, config.r, False)[0].key)
        rank = lora_a.shape[0] if lora_a and lora_a.shape else 0
        spec = AdapterSpec(
            r=rank if rank in config.rank_pattern.values() else config.r,
            alpha=alpha,
            dropout=config.dropout,
            use_rslora=config.use_rslora,
            # PEFT initializes embeddings in the plain way whatever init_lora_weights says.
            init="kaiming" if isinstance(layer, LoRAEmbedding) else config.init,
            lora_bias=config.lora_bias,
        )
        if spec.lora_bias and isinstance(layer, LoRAEmbedding):
            raise AdapterError(f"expected lora_bias false for the embedding {path!r}, but got true")
        if spec.subtracts_init and isinstance(layer, LoRAQuantizedLinear):
            raise AdapterError(
                f"expected plain LoRA for {path!r}, which is quantised, but got init_lora_weights "
                f"{spec.init!r}: its factors are taken out of the weight as it was before; load it "
                "into that model, and save_adapter writes it as plain LoRA"
            )
        if spec.subtracts_init and not _can_subtract(spec, layer, module):
            raise AdapterError(
                f"expected init_lora_weights {spec.init!r} for linear layers with a positive "
                f"lora_alpha, but got alpha {spec.alpha} for {path!r}, a {type(module).__name__}"
            )
        return Target(path, module, layer, spec, slots(path, layer, spec.r, spec.lora_bias))

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
        """Where PEFT stores a weight that is not trained, since it may have been resized."""
        found = []
        for name in ("get_input_embeddings", "get_output_embeddings"):
            get = getattr(self.model, name, None)
            try:
                found.append(get() if callable(get) else None)
            except (AttributeError, NotImplementedError):  # transformers' answers for "none"
                continue
        return [path for path, m in self.modules.items() if any(m is one for one in found)]


def _example(modules: Mapping[str, nn.Module]) -> str:
    adaptable = (path for path, m in modules.items() if replacement_for(m) is not None)
    return next(adaptable, "<path>")


def _layer_for(path: str, module: nn.Module) -> LoRALayer:
    if isinstance(module, LoRAMergedLinear):
        raise AdapterError(
            f"expected a layer with plain factors at {path!r}, but it is a LoRAMergedLinear, which "
            "keeps them by groups"
        )
    if isinstance(module, LoRALayer):
        layer = module
    else:
        kind = replacement_for(module)
        if kind is None:
            raise AdapterError(
                "expected nn.Linear, nn.Embedding, Conv1D, a 1x1 nn.Conv2d or a quantised linear "
                f"layer that is known at {path!r}, but the adapter is for a "
                f"{type(module).__module__}.{type(module).__qualname__}"
            )
        try:
            layer = kind.around(module)
        except (TypeError, ValueError) as error:
            raise AdapterError(f"{path!r} cannot be adapted: {error}") from None
    check_real(f"the weight of {path!r}", layer.stored_weight)
    return layer


def _can_subtract(spec: AdapterSpec, layer: LoRALayer, module: nn.Module) -> bool:
    """Whether PEFT's init and this library's subtract the same product. PEFT's OLoRA decomposes a
    Conv1D's weight in its stored layout, and its convolutions have neither init."""
    if isinstance(layer, LoRAConv2d) or spec.scaling <= 0:
        return False
    return spec.init == "pissa" or not getattr(layer, "fan_in_fan_out", is_conv1d(module))
