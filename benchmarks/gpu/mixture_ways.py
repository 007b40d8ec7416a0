"""The ways to compute a layer of experts, and whether each computes it.

`frozen` is transformers' module without adapters, by its grouped products; of weights in NF4 also
all experts are dequantised, once a direction. PEFT's layers are on the same module.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.experts import Experts, ExpertsAdapter, lora_experts
from lora_ext.quantized.codes import FourBits
from lora_ext.quantized.of_bitsandbytes import codes_of
from lora_ext.quantized.stack import QuantizedStack

from .. import runner
from ..adapters.measure import Tensors, checked, conclude
from ..results import Row
from ..shapes import FORWARD, STEP
from ..timing import Plan
from ..variants import Unavailable, Variant
from . import quantized
from .mixtures import NF4, Mixture

SCALING = 2.0
OURS = ("ours", "ours_fp32")
_UP, _DOWN = "gate_up_proj", "down_proj"
_NAMES = ("dlora_a of up", "dlora_b of up", "dlora_a of down", "dlora_b of down")


@dataclass
class Problem:
    """Operands of a layer, at random.

    Attributes:
        module: transformers', with the dense weights.
        codes: of up and down, if they are in NF4.
        index, weights: ``[T, k]``.
        factors: A and B of up, then of down, float32: ``[E, r, in]`` and ``[E, out, r]``.
    """

    mixture: Mixture
    module: Any
    codes: list[FourBits]
    index: Tensor
    weights: Tensor
    factors: list[Tensor]
    inputs: list[Tensor]
    grads: list[Tensor]

    @cached_property
    def dense(self) -> list[Tensor]:
        """Up and down, ``[E, out, in]``."""
        found = [getattr(self.module, name).detach() for name in (_UP, _DOWN)]
        return [each.transpose(1, 2) for each in found] if self.module.is_transposed else found

    @cached_property
    def biases(self) -> list[Tensor | None]:
        names = (f"{_UP}_bias", f"{_DOWN}_bias")
        return [
            getattr(self.module, name).detach() if self.module.has_bias else None for name in names
        ]

    def leaves(self, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        """Fresh factors as PEFT has them, and weights of slots; without a dtype, these alone."""
        made = [] if dtype is None else in_layout_of_peft(self.factors, dtype)
        wanted = self.mixture.mode == STEP
        return tuple(each.clone().requires_grad_(wanted) for each in (*made, self.weights))

    def rotation(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield self.inputs[0], self.grads[0]


def in_layout_of_peft(factors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """A and B of up, then of down: ``[E r, in]`` and ``[out, r E]``."""
    a, b, c, d = (each.to(dtype) for each in factors)
    of_b = [each.permute(1, 2, 0).flatten(1) for each in (b, d)]
    return [a.flatten(0, 1), of_b[0], c.flatten(0, 1), of_b[1]]


def make_problem(mixture: Mixture) -> Problem:
    """One x, which cuda_timing evicts from the cache.

    Raises:
        ImportError: there is no transformers that has the module.
    """
    device, dtype, shape = mixture.device, getattr(torch, mixture.dtype), mixture.shape
    folder, name = shape.module
    models = importlib.import_module(f"transformers.models.{folder}")
    parts = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    widths = {"intermediate_size": shape.inner, "moe_intermediate_size": shape.inner}
    counts = {"num_experts": shape.experts, "num_local_experts": shape.experts}
    config = getattr(models, f"{name}Config")(hidden_size=shape.hidden, **widths, **counts)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = getattr(parts, f"{name}Experts")(config)
    module = module.to(dtype).to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*sizes: int, std: float = 1.0) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device).mul_(std)

    codes, factors = [], []
    for stack, (out, within) in {
        _UP: (2 * shape.inner, shape.hidden),
        _DOWN: (shape.hidden, shape.inner),
    }.items():
        weight = getattr(module, stack)
        for each in weight:  # one at a time: they are as large as the card may be
            each.copy_(normal(*each.shape, std=within**-0.5))
        if module.has_bias:
            getattr(module, f"{stack}_bias").normal_(generator=generator)
        if mixture.base == NF4:
            drawn = quantized.in_four_bits(tuple(weight.shape), within, generator)
            codes.append(codes_of(*drawn))
            codes[-1].dequantize(dtype, weight)
        factors.append(normal(shape.experts, mixture.rank, within, std=within**-0.5))
        factors.append(normal(shape.experts, out, mixture.rank, std=0.25 * mixture.rank**-0.5))
    chosen = torch.rand(mixture.tokens, shape.experts, generator=generator, device=device)
    weights, index = chosen.topk(shape.slots)
    step = mixture.mode == STEP
    x, grad = (normal(mixture.tokens, shape.hidden).to(dtype) for _ in range(2))
    given = index, weights.softmax(-1).to(dtype), factors, [x.requires_grad_(step)], [grad]
    return Problem(mixture, module, codes, *given)


def expected(problem: Problem, with_factors: bool) -> Tensors:
    """The layer and its gradients in float64, one expert after the other, rounded once.

    with_factors: else the layer without adapters
    """
    dtype, step = getattr(torch, problem.mixture.dtype), problem.mixture.mode == STEP
    gate = problem.module._apply_gate
    x, grad = problem.inputs[0].detach(), problem.grads[0]
    out, dx = (torch.zeros(x.shape, dtype=torch.float64, device=x.device) for _ in range(2))
    dweights = torch.zeros(problem.weights.shape, dtype=torch.float64, device=x.device)
    gradients = [torch.zeros_like(each, dtype=torch.float64) for each in problem.factors]

    def product(rows: Tensor, number: int, expert: int, factors: list[Tensor]) -> Tensor:
        y = rows @ problem.dense[number][expert].double().t()
        if with_factors:
            a, b = factors[2 * number : 2 * number + 2]
            y = y + SCALING * (rows @ a.t()) @ b.t()
        bias = problem.biases[number]
        return y if bias is None else y + bias[expert].double()

    for expert in range(len(problem.factors[0])):
        tokens, slots = (problem.index == expert).nonzero().unbind(1)
        if not len(tokens):
            continue
        given = (x[tokens], problem.weights[tokens, slots], *(f[expert] for f in problem.factors))
        leaves = [each.double().requires_grad_(step) for each in given]
        rows, weights, *factors = leaves
        y = product(gate(product(rows, 0, expert, factors)), 1, expert, factors) * weights[:, None]
        out.index_add_(0, tokens, y.detach())
        if step:
            wanted = leaves if with_factors else leaves[:2]
            of_rows, of_weights, *own = torch.autograd.grad(y, wanted, grad[tokens].double())
            dx.index_add_(0, tokens, of_rows)
            dweights[tokens, slots] = of_weights
            for gradient, found in zip(gradients, own, strict=False):
                gradient[expert] = found
    found = {"out": out}
    if step:
        found |= {"dx": dx, "dweights": dweights}
        gradients = in_layout_of_peft(gradients, dtype)
        found |= dict(zip(_NAMES, gradients, strict=True)) if with_factors else {}
    return {name: each.to(dtype) for name, each in found.items()}


def outputs(problem: Problem, way: Variant) -> Tensors:
    """The same of a way."""
    x = problem.inputs[0]
    if problem.mixture.mode == FORWARD:
        with torch.no_grad():
            return {"out": way.call(x)}
    y = way.call(x)
    dx, *gradients, dweights = torch.autograd.grad(y, (x, *way.adapters), problem.grads[0])
    found = dict(zip(_NAMES, gradients, strict=False))
    return {"out": y, "dx": dx, "dweights": dweights, **found}


def _frozen(problem: Problem) -> Variant:
    weights, *_ = leaves = problem.leaves(None)
    module, dtype = problem.module, getattr(torch, problem.mixture.dtype)
    # Of each direction, into its own memory: the same values.
    memory = [
        [torch.empty(each.shape, dtype=dtype, device=each.device) for each in problem.codes]
        for _ in range(2)
    ]

    def dequantise(direction: int) -> list[Tensor]:
        pairs = zip(problem.codes, memory[direction], strict=True)
        return [codes.dequantize(dtype, out) for codes, out in pairs]

    def call(x: Tensor) -> Tensor:
        if not problem.codes:
            return module(x, problem.index, weights)
        dense = dict(zip((_UP, _DOWN), dequantise(0), strict=True))
        y = torch.func.functional_call(module, dense, (x, problem.index, weights))
        if y.requires_grad:
            y.register_hook(lambda grad: dequantise(1) and None)
        return y

    return Variant(call, leaves)


def _ours(problem: Problem, float_factors: bool) -> Variant:
    dtype = torch.float32 if float_factors else getattr(torch, problem.mixture.dtype)
    *factors, weights = leaves = problem.leaves(dtype)
    module = problem.module
    layer = Experts.of(module)
    if problem.codes:
        layer = layer._replace(
            up=QuantizedStack(problem.codes[0]), down=QuantizedStack(problem.codes[1])
        )
    up, down = (ExpertsAdapter(*factors[place : place + 2], SCALING) for place in (0, 2))
    given = problem.index, weights, [up], [down]
    return Variant(lambda x: lora_experts(layer, x, *given), leaves)


class _Layer(nn.Module):
    """What PEFT is given: a child with experts."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts


def _peft(problem: Problem, float_factors: bool) -> Variant:
    if problem.codes:
        raise Unavailable("PEFT 0.21 adds an update to such weights once more in each forward")
    from peft import LoraConfig, inject_adapter_in_model

    dtype = torch.float32 if float_factors else getattr(torch, problem.mixture.dtype)
    *factors, weights = leaves = problem.leaves(dtype)
    parameters = {id(each): each for each in problem.module.parameters()}
    experts = copy.deepcopy(problem.module, parameters)
    names = [f"experts.{name}" for name in (_UP, _DOWN)]
    rank = problem.mixture.rank
    words = {"target_parameters": names, "target_modules": []}
    model = _Layer(experts)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=int(SCALING * rank), **words), model)
    for wrapper in model.modules():
        place = {_UP: 0, _DOWN: 2}.get(getattr(wrapper, "parameter_name", ""))
        if place is None:
            continue
        for matrix, factor in zip((wrapper.lora_A, wrapper.lora_B), factors[place:], strict=False):
            if matrix["default"].weight.shape != factor.shape:
                raise Unavailable("this PEFT has the transposed weight's shapes")
            del matrix["default"].weight
            matrix["default"].weight = factor  # a leaf of ours: no parameter
    return Variant(lambda x: model.experts(x, problem.index, weights), leaves)


BUILDERS: dict[str, Callable[[Problem], Variant]] = {
    "frozen": _frozen,
    "ours": partial(_ours, float_factors=False),
    "ours_fp32": partial(_ours, float_factors=True),
    "peft": partial(_peft, float_factors=False),
    "peft_default": partial(_peft, float_factors=True),
}


def measure(mixture: Mixture, plan: Plan, announce: runner.Announce = lambda what: None) -> Row:
    """As adapters.measure.measure; what disagrees with float64 is not timed."""
    row: Row = {"case": mixture.as_dict(), "status": "ok"}
    row |= {"errors": {}, "notes": {}, "disagreements": {}}
    announce("float64")
    problem = make_problem(mixture)
    right = {with_factors: expected(problem, with_factors) for with_factors in (False, True)}

    def made(name: str) -> tuple[Variant, Tensors, Tensors]:
        way = BUILDERS[name](problem)
        return way, outputs(problem, way), right[name != "frozen"]

    ways = checked(list(BUILDERS), made, row, announce)
    for name in row["disagreements"]:
        row["notes"][name] = "not timed: it is wrong"
    ways = {name: way for name, way in ways.items() if name not in row["disagreements"]}
    means = runner.means_for(mixture.device)
    runner.time_in_turn(mixture.mode, problem, ways, means, plan, row, announce)
    return conclude(row, ("frozen", *OURS), "frozen")
