"""The ways to compute one LoRA linear that are compared, and the two floors below them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .problem import Problem
from .shapes import FORWARD, Cell

ROUTES = ("ours_kernel", "ours_library", "ours_fp32_kernel")
OURS = ("ours", "ours_fp32", "ours_packed", *ROUTES)


class Look(NamedTuple):
    """What a variant is called in reports, and how it is drawn, if it is."""

    label: str
    colour: str = ""
    marker: str = ""


# Ours are red to orange, and PEFT is blue.
LOOKS = {
    "merged": Look("merged", "#777777"),
    "frozen": Look("frozen", "#777777"),
    "merged_packed": Look("merged, packed"),
    "ours": Look("ours", "#c1272d", "o"),
    "ours_packed": Look("ours packed", "#f28e2b", "D"),
    "ours_fp32": Look("ours fp32", "#8c1d40", "s"),
    "ours_kernel": Look("ours, kernel route", "#e0651f", "X"),
    "ours_library": Look("ours, library route", "#d99a9b", "v"),
    "ours_fp32_kernel": Look("ours fp32, kernel route", "#b5541c", "P"),
    "ours_no_dropout": Look("ours, dropout 0"),
    "peft": Look("PEFT", "#1f6fb4", "o"),
    "peft_default": Look("PEFT default", "#7aa6cf", "s"),
    "naive": Look("naive", "#3b4a6b", "^"),
    "loralib": Look("loralib", "#2a9d5c", "v"),
    "unsloth": Look("Unsloth-style", "#7b52ab", "P"),
    "compiled": Look("torch.compile", "#00a3a3", "X"),
}
LABELS = {name: look.label for name, look in LOOKS.items()}


class Unavailable(RuntimeError):
    """This variant does not exist in this cell; the text says why."""


@dataclass
class Variant:
    """y = call(x), inside a `with` block of the variant, and so is backward.

    Attributes:
        adapters: the leaves lora_a [r, K], lora_b [N, r], empty for a floor.
        note: for the report, e.g. the route that was taken.
        route: of lora_ext on CUDA, for the length of the block; "" is the planner's.
        no_graph: why no CUDA graph can be made of a call; "" if one can. A capture that fails may
            leave torch's generator as if it went on.
    """

    call: Callable[[Tensor], Tensor]
    adapters: tuple[Tensor, ...] = ()
    note: str = ""
    route: str = ""
    no_graph: str = ""

    def __enter__(self) -> Variant:
        self._set(self.route)
        return self

    def __exit__(self, *_: object) -> None:
        self._set("auto")

    def _set(self, route: str) -> None:
        if self.route:
            import lora_ext

            lora_ext.kernels.set_cuda_route(route)


def frozen_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An nn.Linear around existing tensors; nothing in it requires grad."""
    n, k = weight.shape
    layer = nn.Linear(k, n, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def merged(problem: Problem, dropout_p: float) -> Variant:
    """The inference floor: the adapter merged into the weight."""
    return Variant(frozen_linear(problem.merged, problem.bias))


def merged_packed(problem: Problem, dropout_p: float) -> Variant:
    """The merged layer on a packed weight: what packing alone gives."""
    from lora_ext import pack_weight
    from lora_ext.packed_weight import packed_linear

    pack = pack_weight(problem.merged)
    packed, _ = pack.copies
    if packed is None:
        raise Unavailable(f"not packed: {pack.reason}")
    return Variant(lambda x: packed_linear(x, packed, problem.bias))


def frozen(problem: Problem, dropout_p: float) -> Variant:
    """The floor of a training step: the base layer alone, forward and gradient of x."""
    return Variant(frozen_linear(problem.weight, problem.bias))


def adapted(
    function: Callable[..., Tensor],
    problem: Problem,
    *more: object,
    weight: object = None,
    dtype: torch.dtype | None = None,
) -> Variant:
    """A variant by function(x, weight, lora_a, lora_b, bias, scaling, *more).

    weight: in place of the problem's; dtype: of the adapters, in place of the base's
    """
    lora_a, lora_b = problem.adapters(dtype or problem.dtype)
    weight = problem.weight if weight is None else weight
    rest = (weight, lora_a, lora_b, problem.bias, problem.scaling, *more)
    return Variant(lambda x: function(x, *rest), (lora_a, lora_b))


def ours(
    problem: Problem, dropout_p: float, dtype: torch.dtype | None = None, route: str = ""
) -> Variant:
    """lora_ext, with adapters in the dtype of x or in another; on CUDA on one of its routes."""
    from lora_ext import lora_linear

    variant = adapted(lora_linear, problem, dropout_p, dtype=dtype)
    variant.route = route
    return variant


def ours_packed(problem: Problem, dropout_p: float) -> Variant:
    """lora_ext with the weight packed beforehand."""
    from lora_ext import lora_linear

    packed = problem.packed
    if not packed.is_packed:
        raise Unavailable(f"not packed: {packed.reason}")
    variant = adapted(lora_linear, problem, dropout_p, weight=packed)
    route, reason = packed.route(problem.inputs[0].shape[:-1].numel())
    variant.note = f"{route} ({reason}); the packed copies take {packed.nbytes / 2**20:.1f} MiB"
    return variant


def _naive(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> Tensor:
    dropped = F.dropout(x, dropout_p) if dropout_p else x
    return F.linear(x, weight, bias) + F.linear(F.linear(dropped, lora_a), lora_b) * scaling


def naive(problem: Problem, dropout_p: float) -> Variant:
    """Plain torch: base, A, B, mul, add."""
    return adapted(_naive, problem, dropout_p)


def compiled(problem: Problem, dropout_p: float) -> Variant:
    """torch.compile of naive; the reset keeps each cell clear of the recompilation limit."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # no worker processes beside the measurement
    torch.compiler.reset()
    return adapted(torch.compile(_naive, fullgraph=True, dynamic=False), problem, dropout_p)


def _peft(problem: Problem, dropout_p: float, autocast_adapter_dtype: bool) -> Variant:
    from peft import LoraConfig, get_peft_model

    rank = problem.lora_a.shape[0]
    config = LoraConfig(
        r=rank,
        lora_alpha=int(problem.scaling * rank),
        lora_dropout=dropout_p,
        target_modules=["layer"],
    )
    base = nn.Module()
    base.layer = frozen_linear(problem.weight, problem.bias)
    get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype)
    layer = base.layer
    adapters = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    with torch.no_grad():
        adapters[0].copy_(problem.lora_a)
        adapters[1].copy_(problem.lora_b)
    return Variant(layer.train(), adapters)


def loralib(problem: Problem, dropout_p: float) -> Variant:
    """Microsoft's loralib, unmerged."""
    import loralib

    (n, k), rank = problem.weight.shape, problem.lora_a.shape[0]
    layer = loralib.Linear(
        k,
        n,
        r=rank,
        lora_alpha=int(problem.scaling * rank),
        lora_dropout=dropout_p,
        merge_weights=False,
        bias=problem.bias is not None,
    )
    base = frozen_linear(problem.weight, problem.bias)
    layer.weight, layer.bias = base.weight, base.bias
    lora_a, lora_b = problem.adapters(problem.dtype)
    layer.lora_A, layer.lora_B = nn.Parameter(lora_a.detach()), nn.Parameter(lora_b.detach())
    return Variant(layer, (layer.lora_A, layer.lora_B))


class AddmmLora(torch.autograd.Function):
    """The hand-fused form over library calls: in-place addmm_, x A^T computed again in backward."""

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, bias, scaling):
        rows = x.reshape(-1, x.shape[-1])
        out = F.linear(rows, weight, bias)
        out.addmm_(rows @ lora_a.t(), lora_b.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, lora_a, lora_b)
        ctx.scaling = scaling
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, weight, lora_a, lora_b = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        grad = grad.reshape(-1, grad.shape[-1])
        grad_rank = grad @ lora_b
        dlora_a = (grad_rank.t() @ rows).mul_(ctx.scaling)
        dlora_b = (grad.t() @ (rows @ lora_a.t())).mul_(ctx.scaling)
        dx = (grad @ weight).addmm_(grad_rank, lora_a, alpha=ctx.scaling)
        return dx.view(x.shape), None, dlora_a, dlora_b, None, None


def unsloth(problem: Problem, dropout_p: float) -> Variant:
    """Unsloth's form, in our own writing; its fused path takes no dropout."""
    if dropout_p:
        raise Unavailable("its fused path has no dropout and falls back to PEFT")
    return adapted(AddmmLora.apply, problem)


Builder = Callable[[Problem, float], Variant]

BUILDERS: dict[str, Builder] = {
    "merged": merged,
    "frozen": frozen,
    "merged_packed": merged_packed,
    "ours": ours,
    "ours_fp32": partial(ours, dtype=torch.float32),
    "ours_kernel": partial(ours, route="kernel"),
    "ours_library": partial(ours, route="library"),
    "ours_fp32_kernel": partial(ours, dtype=torch.float32, route="kernel"),
    "ours_packed": ours_packed,
    "ours_no_dropout": lambda problem, dropout_p: ours(problem, 0.0),  # what dropout costs
    "naive": naive,
    # PEFT's default: float32 adapters, x upcast in each call; else adapters like the base's weight.
    "peft": partial(_peft, autocast_adapter_dtype=False),
    "peft_default": partial(_peft, autocast_adapter_dtype=True),
    "loralib": loralib,
    "unsloth": unsloth,
    "compiled": compiled,
}


def floor_of(mode: str) -> str:
    """The variant that the ratios of this mode refer to."""
    return "merged" if mode == FORWARD else "frozen"


def names_for(cell: Cell) -> list[str]:
    """The variants measured in a cell, in the order of the tables."""
    half = cell.dtype in ("bfloat16", "float16")
    routes = dict.fromkeys(ROUTES, half and cell.device == "cuda")
    chosen = {
        "merged_packed": cell.device == "cpu" and cell.mode == FORWARD,
        "ours": True,
        **routes,
        "ours_packed": cell.device == "cpu",
        "ours_fp32": half,
        "ours_no_dropout": cell.dropout_p > 0,
        "peft": True,
        "peft_default": half,
        "naive": cell.all_peers,
        "loralib": cell.all_peers,
        "unsloth": cell.all_peers and not cell.dropout_p,
        "compiled": cell.compiled,
    }
    return [floor_of(cell.mode), *(name for name, wanted in chosen.items() if wanted)]
