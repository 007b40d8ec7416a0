"""Layouts of an adapter's file for other programs than PEFT 0.21; `separate_experts.py` reads them,
and what is written is read and compared with the layers.

"per-expert" has a linear layer for each expert's projection, as files from before transformers 5,
"stacked" one tensor for all experts of a projection. Modules have their names in checkpoints, which
engines use. Some of these take rank and scaling from r and lora_alpha alone: so B is multiplied to
have one scaling, and ranks below that of the experts are filled up with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..experts.decorated import is_concatenated
from ..experts.factors import a_by_expert, b_by_expert
from ..nn.experts import is_experts
from ..nn.parameter import LoRAParameter
from .alphas import find_alphas
from .content import Content, alpha_of, most_common
from .errors import AdapterError, some
from .layout import PREFIX
from .peft_config import AdapterConfig, parse_config
from .separate_experts import TODAY, with_stacks
from .targets import anchored, module_names, named
from .tensors import open_tensors

LAYOUTS = ("peft", "per-expert", "stacked")
_OUTER = (".w1.lora_A.weight", ".w3.lora_A.weight", ".w2.lora_B.weight")
_SHORT = {today: short for short, today in TODAY.items()}


def laid_out(
    layout: str, content: Content, config: AdapterConfig, whole: Mapping[str, Tensor]
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """(config, tensors by their keys) in one of LAYOUTS, from those in PEFT's. AdapterError if the
    layout has no place for a part of the adapter."""
    if layout == "peft":
        return config, dict(whole)
    block, names = _in_checkpoints(content)
    tensors, parts = dict(whole), list[tuple[float, str, Tensor]]()  # (scaling, key, factor)
    ranks, dense = set[int](), dict[str, int]()
    for name, spec in content.specs.items():
        own = {slot.key: tensors.pop(slot.key) for slot in content.slots(name)}
        layer, path = content.parameters.get(name), name
        if layer is not None and is_experts(layer.module):
            path = PREFIX + name.rpartition(".")[0].replace(*block)
            for part, *pair in _projections(layer, *own.values()):
                ranks.add(pair[0].shape[1])
                for letter, factor in zip("AB", pair, strict=True):
                    at = {_SHORT[part]: factor}
                    if layout == "per-expert":
                        at = {f"{e}.{names[part]}": each for e, each in enumerate(factor)}
                    end = f"lora_{letter}.weight"
                    parts += [(spec.scaling, f"{path}.{k}.{end}", each) for k, each in at.items()]
            continue
        if layer is not None:
            path = name.removesuffix(".weight")
            if f"{PREFIX}{path}.lora_A.weight" not in own:
                raise AdapterError(
                    f"expected layers, routers and experts for layout {layout!r}, but {name!r} is "
                    "another parameter; save with layout='peft'"
                )
        dense[path] = spec.r
        parts += [(spec.scaling, key.replace(*block), value) for key, value in own.items()]
    r = max(ranks or dense.values())
    scaling = most_common([each for each, _, _ in parts if each] or [1.0])
    larger = {anchored(p.replace(*block)): rank for p, rank in dense.items() if rank > r}
    targets, excluded = module_names(content.model, [*dense], content.saved_names)
    targets = dense if isinstance(targets, str) else targets
    config = replace(
        config,
        r=r,
        lora_alpha=alpha_of(scaling, r, False),
        use_rslora=False,
        rank_pattern=larger,
        alpha_pattern={path: alpha_of(scaling, rank, False) for path, rank in larger.items()},
        target_modules=(*(t.replace(*block) for t in targets), *(names.values() if ranks else ())),
        exclude_modules=excluded,
        target_parameters=(),
    )
    for own_scaling, key, value in parts:
        is_a = ".lora_A." in key or ".lora_embedding_A" in key
        value = value if is_a else _times(value, own_scaling / scaling)
        if not key.endswith(".bias"):
            shape = list(value.shape)
            dim = (0 if is_a else 1) + (value.dim() == 3)
            shape[dim] = max(r - shape[dim], 0)
            value = torch.cat([value, value.new_zeros(shape)], dim)
        tensors[key] = value.contiguous()
    return config, _shared(tensors) if layout == "stacked" else tensors


def _in_checkpoints(content: Content) -> tuple[tuple[str, str], dict[str, str]]:
    """((a part of paths today, in checkpoints), today's name of a projection -> that in them)."""
    experts: list[Any] = [module for module in content.every.values() if is_experts(module)]
    rules = ""
    if experts:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        found = get_checkpoint_conversion_mapping(experts[0].config.model_type)
        rules = str([rule.source_patterns for rule in found or ()])
    block = (".mlp.", ".block_sparse_moe." if "'.block_sparse_moe.'" in rules else ".mlp.")
    return block, _SHORT if "experts.*.w1." in rules else {name: name for name in _SHORT}


def _projections(
    layer: LoRAParameter, lora_a: Tensor, lora_b: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(today's name, A ``[E, r, in]``, B ``[E, out, r]``) of each projection in a stack. If B is
    block-diagonal, each has its own rows of A; else each has all of them."""
    a, b = a_by_expert(lora_a, layer.count), b_by_expert(lora_b, layer.count)
    if layer.parameter != "gate_up_proj":
        yield layer.parameter, a, b
        return
    half, rest = divmod(a.shape[1], 2)
    gate, up = b.chunk(2, 1) if is_concatenated(layer.module) else (b[:, 0::2], b[:, 1::2])
    if rest or gate[..., half:].any() or up[..., :half].any():
        half = 0
    yield "gate_proj", a[:, : half or None], gate[..., : half or None]
    yield "up_proj", a[:, half:], up[..., half:]


def _shared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With one factor for the experts of a module that share the outer ones: A of gate and up, B of
    down."""
    outer: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        if tensor.dim() == 3 and key.endswith(_OUTER):
            outer.setdefault(key.rpartition(".w")[0].rpartition(".w")[0], []).append(key)
    keys = [ks for ks in outer.values() if all((tensors[k] == tensors[k][:1]).all() for k in ks)]
    return tensors | {key: tensors[key][:1] for each in keys for key in each}


def _times(value: Tensor, ratio: float) -> Tensor:
    """The product; a half that it would round becomes a float."""
    if math.isclose(ratio, 1, rel_tol=1e-12):
        return value
    keeps = abs(math.frexp(ratio)[0]) == 0.5 or value.dtype == torch.float64
    return (value.double() * ratio).to(value.dtype if keeps else torch.float32)


# ---- what is written, read as its readers do ----


def check_written(
    path: str, data: bytes, layout: str, content: Content, whole: Mapping[str, Tensor]
) -> None:
    """Raises AdapterError if the safetensors file at `path` with the config `data` is not the
    model's adapter: for random x, in float64, W x + s B A x has to be that of each layer (W x is
    left out), and all else what `whole` has, the tensors in PEFT's layout. In other layouts r and
    lora_alpha alone have to give the scaling, too: some engines read nothing else.
    """
    name, rest, own = "", dict(whole), parse_config(data)
    try:
        with open(path, "rb") as opened, open_tensors(opened.fileno()) as stored:
            file, config = with_stacks(stored, own, content.model)
            found = dict(file.entries)
            by_rank = replace(config, lora_alpha=config.r, alpha_pattern=config.rank_pattern)
            for name, spec in content.specs.items():
                keys = [slot.key for slot in content.slots(name)]
                count = getattr(content.by_name[name], "count", 1)
                weight = f"{name}.weight"
                at = weight if named([weight], config.target_parameters) else name
                rank, alpha = int(find_alphas([at], by_rank)[at]), find_alphas([at], config)[at]
                scaling = alpha / (rank**0.5 if config.use_rslora else rank)
                if layout != "peft" and not math.isclose(scaling, own.lora_alpha / own.r):
                    raise ValueError(f"scaling {scaling}, but another by r and lora_alpha alone")
                lora_a, lora_b, *bias = (file.read(found.pop(key)) for key in keys)
                expected_a, expected_b, *expected_bias = map(rest.pop, keys)
                random = torch.Generator().manual_seed(1)
                x = torch.randn(expected_a[0].numel(), 4, dtype=torch.float64, generator=random)
                expected = spec.scaling * _product(expected_a, expected_b, x, count)
                _compare(scaling * _product(lora_a, lora_b, x, count), expected)
                for each, expected in zip(bias, expected_bias, strict=True):
                    _compare(each * scaling, expected * spec.scaling)
            for name, expected in rest.items():
                if not torch.equal(file.read(found.pop(name)), expected):
                    raise ValueError("other values")
        if found:
            raise ValueError(f"tensors that nothing reads: {some(found)}")
    except (KeyError, RuntimeError, ValueError) as error:
        raise AdapterError(
            f"expected a file that reads back as the model's {name!r}, but got {error}; the folder "
            "is unchanged; try another layout, and please report this"
        ) from None


def _product(a: Tensor, b: Tensor, x: Tensor, count: int) -> Tensor:
    """B A x ``[E, out, 4]`` of factors as PEFT stores them."""
    return b_by_expert(b.double(), count) @ (a_by_expert(a.double().flatten(1), count) @ x)


def _compare(found: Tensor, expected: Tensor) -> None:
    """Up to the rounding of a B in float32 that was multiplied."""
    error = (found.double() - expected.double()).abs().max()
    if found.shape != expected.shape or not error <= 1e-6 * expected.double().abs().max():
        raise ValueError(f"other values, with an error of {error:.1e}")
