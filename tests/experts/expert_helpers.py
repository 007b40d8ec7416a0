"""Small experts of transformers' classes in PEFT's models, routes, and a step of them."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import torch
from helpers import F64, keep_scale_of
from peft import LoraConfig, get_peft_model
from peft_helpers import randomize
from torch import Tensor, nn

from lora_ext.experts import Experts
from lora_ext.experts.decorated import up_name
from lora_ext.functional import dropout_mask

EXPERTS, HIDDEN, INNER = 6, 16, 24
# How float64 is computed, as `explain` says it.
BY_PRODUCTS = "a product for each expert, then the update"
# Of the masks of both projections.
SEEDS = (11, 12)

# A kind of each layout: transformers' model and class.
KINDS = {
    "plain": ("qwen3_moe", "Qwen3MoeExperts"),
    "own gate": ("deepseek_v4", "DeepseekV4Experts"),
    "float32 gate": ("beam", "BeamExperts"),
    "transposed": ("aria", "AriaExperts"),
    "transposed, biases, interleaved": ("gpt_oss", "GptOssExperts"),
    "no gate": ("nemotron_h", "NemotronHExperts"),
    "norm": ("muse_spark", "MuseSparkExperts"),
}
DECORATED = re.compile(r"^@use_experts_implementation(?:\(.*?\))?\nclass (\w+)", re.M)
# A base of the class that models have, with a forward for rows of one slot.
NO_MODULES = {"ErgoExpertProjections"}


class SmallConfig:
    """What a class of experts asks of its config, by what is in the names."""

    _experts_implementation = "eager"
    num_experts_per_tok = 2

    def __init__(self, experts: int = EXPERTS, sizes: tuple[int, int] = (HIDDEN, INNER)) -> None:
        self.experts, self.sizes = experts, sizes

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        known = {"act": "silu", "latent": None, "eps": 1e-6, "alpha": 1.7, "softcap": 2.0}
        known |= {"limits": [1.5], "limit": 1.5, "norm": True}
        known |= {"inter": self.sizes[1], "hidden": self.sizes[0]}
        return next((each for part, each in known.items() if part in name), self.experts)


def decorated_types() -> list[tuple[str, str]]:
    """(model, class) of each that transformers decorates."""
    import transformers.models

    sources = Path(transformers.models.__file__).parent.glob("*/modeling_*.py")
    return sorted(
        (path.parent.name, kind)
        for path in sources
        for kind in DECORATED.findall(path.read_text(encoding="utf-8"))
        if kind not in NO_MODULES
    )


@torch.no_grad()
def make_experts(
    kind: str | tuple[str, str], experts: int = EXPERTS, sizes: tuple[int, int] = (HIDDEN, INNER)
) -> nn.Module:
    """Frozen experts with random numbers in float64, their biases included."""
    model, name = KINDS[kind] if isinstance(kind, str) else kind
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    kind = getattr(module, name)
    of_layer = {"layer_idx": 0} if "layer_idx" in inspect.signature(kind).parameters else {}
    made = kind(SmallConfig(experts, sizes), **of_layer).double()
    for parameter in made.parameters():
        parameter.normal_(std=0.3).requires_grad_(False)
    return made


class Mixture(nn.Module):
    """Experts in a module, as PEFT needs it; takes their arguments."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


def both(experts: nn.Module) -> list[str]:
    return [up_name(experts), "down_proj"]


def mixture(
    kind: str | tuple[str, str] = "plain",
    adapters: dict[str, dict[str, Any]] | None = None,
    names: list[str] | None = None,
    dtype: torch.dtype = F64,
    adapter_dtype: torch.dtype | None = None,
    experts: int = EXPERTS,
    base: nn.Module | None = None,
) -> nn.Module:
    """PEFT's model of a mixture; all adapters active, random.

    Args:
        names: the parameters that have adapters.
        adapter_dtype: None for dtype.
        base: the experts; None for some of the kind.
    """
    base = make_experts(kind, experts).to(dtype) if base is None else base
    targets = [f"experts.{name}" for name in (both(base) if names is None else names)]
    given = adapters or {"x": {"r": 3, "lora_alpha": 5}}
    configs = {
        name: LoraConfig(target_parameters=targets, target_modules=[], **words)
        for name, words in given.items()
    }
    first, *others = configs
    model = get_peft_model(Mixture(base), configs[first], first, autocast_adapter_dtype=False)
    for name in others:
        model.add_adapter(name, configs[name], autocast_adapter_dtype=False)
    model.base_model.set_adapter(list(configs))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype or dtype)
    return randomize(model)


def make_routes(
    tokens: int,
    slots: int = 2,
    experts: int = EXPERTS,
    dtype: torch.dtype = F64,
    seed: int = 0,
    hidden: int = HIDDEN,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, index, weights); a token's experts are different ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator, dtype=F64).to(dtype)
    order = torch.rand(tokens, experts, generator=generator).argsort(1)
    weights = torch.rand(tokens, slots, generator=generator, dtype=F64).to(dtype)
    return x, order[:, :slots], weights


def run(model: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """y and every gradient by name, for a dy that does not depend on y."""
    model.zero_grad()
    x, weights = (t.detach().clone().requires_grad_() for t in (x, weights))
    y = model(x, index, weights)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=F64)
    y.backward(grad.to(y.dtype))
    found = {"y": y.detach(), "dx": x.grad, "dweights": weights.grad}
    found |= {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: value for name, value in found.items() if value is not None}


def assert_close(
    found: dict[str, Tensor],
    exact: dict[str, Tensor],
    tolerance: float,
    terms: dict[str, float] | None = None,
) -> None:
    """Each within a fraction of the exact one's largest number, or of its terms, by name."""
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        error = float((found[name].double() - value).abs().max()) if value.numel() else 0.0
        most = float(value.abs().max()) if value.numel() else 0.0
        most = max(most, 1e-3, (terms or {}).get(name, 0.0))
        assert error <= tolerance * most, (name, error, most)


def sides_of(experts: Experts) -> list[tuple[int, int]]:
    """(out, in) of each projection."""
    sides = [tuple(weight.shape[1:]) for weight in (experts.up, experts.down)]
    return [side[::-1] if experts.is_transposed else side for side in sides]


def by_tokens(experts: Experts, x, index, weights, up, down, own=None) -> Tensor:
    """`lora_experts` for one row after the other, with W and the update apart; masks are those of
    `SEEDS`."""
    (count, *_), k = experts.up.shape, index.shape[1]

    def mask_of(adapters, seed, rows, within):
        p = next((adapter.dropout for adapter in adapters if adapter), 0.0)
        ones = torch.ones(rows, within, dtype=x.dtype, device=x.device)
        return keep_scale_of(p) * dropout_mask(seed, rows, within, p).to(ones) if p else ones

    def project(row, e, token, mask, weight, bias, adapters):
        matrix = weight[e].t() if experts.is_transposed else weight[e]
        y = matrix @ row + (0 if bias is None else bias[e])
        for i, adapter in enumerate(adapters):
            if adapter is not None and (own is None or int(own[token]) == i):
                a = adapter.lora_a.reshape(count, -1, len(row))[e].to(row)
                b = adapter.lora_b.reshape(len(y), -1, count)[:, :, e].to(row)
                y = y + adapter.scaling * (b @ (a @ (row * mask)))
        return y

    masks = [
        mask_of(adapters, seed, rows, within)
        for adapters, seed, rows, (_, within) in zip(
            (up, down), SEEDS, (len(x), index.numel()), sides_of(experts), strict=True
        )
    ]
    out = []
    for t in range(len(x)):
        total = torch.zeros_like(x[t])
        for slot, e in enumerate(index[t].tolist()):
            if not 0 <= e < count:
                continue
            z = project(x[t], e, t, masks[0][t], experts.up, experts.up_bias, up)
            h, mask = experts.gate(z[None])[0], masks[1][t * k + slot]
            y = project(h, e, t, mask, experts.down, experts.down_bias, down)
            y = y if experts.norm is None else experts.norm(y[None])[0]
            total = total + weights[t, slot] * y
        out.append(total)
    return torch.stack(out) if out else 0 * x
