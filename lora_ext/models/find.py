"""Which modules of a model a config selects, and which classes replace them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import nn

from ..nn import LoRAConv2d, LoRAEmbedding, LoRALayer, LoRALinear, LoRAQuantizedLinear
from ..nn.conv import unsupported_reason
from ..nn.experts import LoRAExperts, is_experts
from ..nn.linear import is_conv1d
from ..nn.module import LoRAModule
from ..quantized.layers import is_quantized, unread_codes
from .config import ALL_LINEAR, LoraConfig
from .mixtures import names_parameter, routers
from .model import adapter_modules
from .patterns import is_pattern, matches

_LINEAR = (LoRALinear, LoRAQuantizedLinear)
# Modules whose weight the kernels of these model types read without calling them, which would leave
# out an adapter: those that PEFT refuses. Said here, since asking PEFT would import it, and the
# layers of a model would depend on what is installed.
MAMBA_TYPES = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
READ_DIRECTLY = {"conv1d", "out_proj"}
# Characters of regular expressions, which PEFT reads from a string, that names and globs lack.
_EXPRESSION = re.compile(r"[\\()|^$]")


def replacement_for(module: nn.Module) -> type[LoRALayer] | type[LoRAModule] | None:
    """The class that replaces the module, None if LoRA is not supported on it."""
    if is_experts(module):
        return LoRAExperts
    if is_conv1d(module):
        return LoRALinear
    if not isinstance(module, LoRALayer) and is_quantized(module):
        return LoRAQuantizedLinear
    if type(module) is nn.Conv2d and unsupported_reason(module):
        return None
    table = {nn.Linear: LoRALinear, nn.Embedding: LoRAEmbedding, nn.Conv2d: LoRAConv2d}
    return table.get(type(module))


def find_targets(model: nn.Module, config: LoraConfig) -> list[tuple[str, nn.Module]]:
    """The (path, module) pairs that get the adapter, each module once. ValueError if a pattern
    matches nothing, or only modules that cannot be adapted."""
    modules = _modules_of(model)
    inside_saved = [path for path, _ in modules if _matches_any(config.modules_to_save, path)]

    def excluded(path: str) -> bool:
        return _matches_any(config.exclude_modules, path) or any(
            path == root or path.startswith(f"{root}.") for root in inside_saved
        )

    candidates = [
        (path, module)
        for path, module in modules
        if config.is_in_layers(path) and not excluded(path)
    ]
    of_mixtures = routers(modules) | {id(module) for _, module in modules if is_experts(module)}
    found = []
    for pattern in config.target_modules:
        if pattern == ALL_LINEAR:
            found += _all_linear(model, candidates)
        else:
            matched = _matched(pattern, candidates, modules, of_mixtures)
            skipped = next((path for path, _ in matched if is_read_directly(model, path)), None)
            if skipped is not None:
                raise ValueError(
                    f"lora_ext.apply_lora: target_modules {pattern!r} names {skipped!r}, whose "
                    "weight Mamba's kernels read without its adapter; leave it out, as PEFT does, "
                    f"by exclude_modules=[{skipped.rpartition('.')[2]!r}]"
                )
            found += matched
    unique = {id(module): (path, module) for path, module in reversed(found)}
    order = {id(module): place for place, (_, module) in reversed(list(enumerate(modules)))}
    return [unique[key] for key in sorted(unique, key=order.__getitem__)]


def is_read_directly(model: nn.Module, path: str) -> bool:
    """Whether a forward of the model may read the module's weight without calling the module."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return kind in MAMBA_TYPES and path.rpartition(".")[2] in READ_DIRECTLY


def find_saved(model: nn.Module, config: LoraConfig) -> list[nn.Module]:
    """The modules that config.modules_to_save names. ValueError if a pattern matches nothing."""
    modules = _modules_of(model)
    found: dict[int, nn.Module] = {}
    for pattern in config.modules_to_save:
        hits = {id(module): module for path, module in modules if matches(pattern, path)}
        if not hits:
            raise ValueError(_nothing("modules_to_save", pattern, [path for path, _ in modules]))
        found |= hits
    return list(found.values())


def _modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of all modules except the model itself and the parts of our own layers."""
    own = adapter_modules(model)
    named = model.named_modules(remove_duplicate=False)
    return [(path, module) for path, module in named if path and id(module) not in own]


def _matches_any(patterns: Iterable[str], path: str) -> bool:
    return any(matches(pattern, path) for pattern in patterns)


def is_adaptable(module: nn.Module) -> bool:
    """Whether it may have adapters, or has some."""
    return isinstance(module, LoRALayer) or replacement_for(module) is not None


def _all_linear(
    model: nn.Module, candidates: list[tuple[str, nn.Module]]
) -> list[tuple[str, nn.Module]]:
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    offered = [
        (path, module)
        for path, module in candidates
        if module is not output and not is_read_directly(model, path)
    ]
    found = [
        (path, module)
        for path, module in offered
        if isinstance(module, _LINEAR) or replacement_for(module) in (*_LINEAR, LoRAExperts)
    ]
    for path, module in offered:
        if not is_adaptable(module) and (why := unread_codes(module)):
            raise ValueError(
                f"lora_ext.apply_lora: expected linear layers that 'all-linear' can adapt, but of "
                f"{path!r}, a {type(module).__name__}, {why}. exclude_modules leaves it out; PEFT "
                "may adapt it, beside layers of ours: "
                "lora_ext.accelerate(peft.get_peft_model(model, config))"
            )
    if not found:
        raise ValueError(
            "lora_ext.apply_lora: expected linear layers for target_modules 'all-linear', but the "
            f"{type(model).__name__} has none left (nn.Linear, transformers' Conv1D or a quantised "
            "one, without exclude_modules, modules_to_save and the output embedding)"
        )
    return found


def _matched(
    pattern: str, candidates: list, modules: list, of_mixtures: set[int]
) -> list[tuple[str, nn.Module]]:
    """The modules that a pattern selects; of_mixtures: the ids of experts and routers."""
    hits = [(path, module) for path, module in candidates if matches(pattern, path)]
    if not hits:
        hits = [
            (path, module)
            for path, module in candidates
            if id(module) in of_mixtures and names_parameter(pattern, path, module)
        ]
    is_name = not is_pattern(pattern)
    found = [
        (path, module)
        for path, module in hits
        if is_adaptable(module) or (is_name and id(module) in of_mixtures)
    ]
    if found and (not is_name or len(found) == len(hits)):
        return found
    if hits:
        path, module = next((p, m) for p, m in hits if not is_adaptable(m))
        raise ValueError(
            f"lora_ext.apply_lora: target_modules {pattern!r} names {path!r}, a "
            f"{type(module).__module__}.{type(module).__qualname__}; expected nn.Linear, "
            "nn.Embedding, transformers' Conv1D, a 1x1 nn.Conv2d without groups and padding or a "
            "quantised linear layer that lora_ext supports (subclasses are not), or experts or a "
            "router of transformers"
        )
    if any(matches(pattern, path) for path, _ in modules):
        raise ValueError(
            f"lora_ext.apply_lora: expected target_modules {pattern!r} to match a layer, but "
            "exclude_modules, modules_to_save or layers_to_transform leave out all that it matches"
        )
    adaptable = [path for path, module in modules if is_adaptable(module)]
    raise ValueError(_nothing("target_modules", pattern, adaptable))


def _nothing(field: str, pattern: str, paths: list[str]) -> str:
    """The message for a pattern that matches none of the paths, with the nearest names."""
    ends = {".".join(path.split(".")[-n:]) for path in paths for n in (1, 2)} | set(paths)
    near = difflib.get_close_matches(pattern, sorted(ends), n=3, cutoff=0.5)
    hint = f"similar names: {', '.join(map(repr, near))}" if near else f"layers are: {_some(paths)}"
    if not pattern.startswith("re:") and _EXPRESSION.search(pattern):
        hint = f"a regular expression begins with 're:', as in {'re:' + pattern!r}; {hint}"
    return (
        f"lora_ext.apply_lora: expected {field} {pattern!r} to match a module, but it matches none "
        f"of {len(paths)}; {hint}"
    )


def _some(paths: list[str]) -> str:
    names = sorted({path.split(".")[-1] for path in paths if not path.split(".")[-1].isdigit()})
    return ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
