"""Problems, runs of them by lora_ext, by the reference and in float64, and measures of error."""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import op_calls
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lora_ext
from lora_ext.reference import lora_linear_reference

# In the emulated package (tests/emulated/package), CPU tensors take the kernels of CUDA.
EMULATED = "LORA_EXT_EMULATED_ARCH" in os.environ
EMULATED_ROUTE = os.environ.get("LORA_EXT_EMULATED_ROUTE", "auto")

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
HALVES = (BF16, F16)

# (dtype of x and weight, dtype of the adapters): all that lora_linear accepts.
DTYPE_PAIRS = [(F64, F64), (F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]

# From so many rows on the CPU's own kernels pack the factors at every rank; at ranks up to 32 from
# 17 on in forward and 8 in backward. Below they read them in their original layout.
KERNEL_ROWS = 48


def by_torch_save(thing: Any) -> Any:
    """A copy by torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def packable(dtype: torch.dtype) -> bool:
    supported = torch.backends.mkldnn.is_available()
    return supported and (dtype == F32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "f")


def pair_id(pair: tuple[torch.dtype, torch.dtype]) -> str:
    return f"{short(pair[0])}-{short(pair[1])}"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return F32 if dtype in HALVES else dtype


def made_of_half_pairs(isa, pair, dtype=None) -> bool:
    """Where a float32 product runs as pairs of half terms, bfloat16's exact to 2^-17 each. CUDA's
    tensor cores moreover may cut off their float32 sums, where a processor rounds them."""
    if isa is None and pair in ((BF16, F32), (F16, F32)):
        return True
    # The emulated package leaves to this processor, which may have AMX, what CUDA's library takes.
    return (isa == "amx" or EMULATED) and BF16 in (pair[0], dtype) and pair[1] != BF16


@dataclass(frozen=True)
class Problem:
    """One LoRA linear with the gradient of its output; M rows, K in, N out, rank r."""

    x: Tensor  # [..., K]
    weight: Tensor  # [N, K]
    lora_a: Tensor  # [r, K]
    lora_b: Tensor  # [N, r]
    bias: Tensor | None  # [N]
    grad: Tensor  # [..., N]
    scaling: float

    @property
    def rows(self) -> int:
        return self.x[..., 0].numel() if self.x.shape[-1] else self.x.shape[:-1].numel()

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.weight, self.lora_a, self.lora_b

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        given = (*self.operands, self.bias, self.grad)
        return tuple(tensor for tensor in given if tensor is not None)

    def each(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """With every tensor changed."""
        given = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in given.items()})

    def to(self, where: torch.dtype | str) -> Problem:
        return self.each(lambda tensor: tensor.to(where))


def make_problem(
    lead: int | tuple[int, ...],
    in_features: int,
    out_features: int,
    rank: int,
    pair: tuple[torch.dtype, torch.dtype] = (F32, F32),
    device: str = "cpu",
    *,
    bias: bool = True,
    scaling: float = 0.7,
    seed: int = 0,
    integers: int = 0,
) -> Problem:
    """Normal numbers scaled so that base and update are of order 1, or integers in [-n, n]."""
    generator = torch.Generator().manual_seed(seed)
    lead = (lead,) if isinstance(lead, int) else lead

    def draw(*shape: int, dtype: torch.dtype, spread: float = 1.0) -> Tensor:
        if integers:
            values = torch.randint(-integers, integers + 1, shape, generator=generator)
        else:
            values = torch.randn(shape, generator=generator, dtype=F64) * spread
        return values.to(dtype).to(device)

    half = max(in_features, 1) ** -0.5
    return Problem(
        x=draw(*lead, in_features, dtype=pair[0]),
        weight=draw(out_features, in_features, dtype=pair[0], spread=half),
        lora_a=draw(rank, in_features, dtype=pair[1], spread=half),
        lora_b=draw(out_features, rank, dtype=pair[1], spread=rank**-0.5),
        bias=draw(out_features, dtype=pair[0]) if bias else None,
        grad=draw(*lead, out_features, dtype=pair[0]),
        scaling=scaling,
    )


@dataclass(frozen=True)
class Run:
    y: Tensor
    dx: Tensor
    dlora_a: Tensor
    dlora_b: Tensor
    dbias: Tensor | None

    def items(self) -> list[tuple[str, Tensor]]:
        return [(name, value) for name, value in vars(self).items() if value is not None]


def leaf(tensor: Tensor | None) -> Tensor | None:
    """The same memory, strides and all, as a leaf that wants a gradient."""
    return None if tensor is None else tensor.detach().requires_grad_()


def differentiate(problem: Problem, forward) -> Run:
    """Runs forward(x, lora_a, lora_b, bias) and its backward."""
    leaves = [leaf(t) for t in (problem.x, problem.lora_a, problem.lora_b, problem.bias)]
    y = forward(*leaves)
    y.backward(problem.grad)
    return Run(y.detach(), *(None if t is None else t.grad for t in leaves))


def run_ours(
    problem: Problem,
    dropout_p: float = 0.0,
    seed: int = 1,
    row_offset: int = 0,
    col_offset: int = 0,
    weight: Tensor | lora_ext.functional.PackedWeight | None = None,
) -> Run:
    """lora_ext with the mask of a given seed; `weight` in place of the problem's, e.g. packed."""
    weight = problem.weight if weight is None else weight
    packed = packed_t = None
    if isinstance(weight, lora_ext.functional.PackedWeight):
        weight, packed, packed_t = weight.operands(problem.x)
    seeds = torch.tensor(seed, device=problem.x.device) if dropout_p else None
    tail = (problem.scaling, dropout_p, seeds, row_offset, col_offset, False, packed, packed_t)

    def forward(x, lora_a, lora_b, bias):
        return op_calls.lora_linear(x, weight, lora_a, lora_b, bias, *tail)

    return differentiate(problem, forward)


def keep_scale_of(dropout_p: float) -> float:
    """1 / keep probability, which is a multiple of 1/65536."""
    return 65536 / max(1, int((1 - dropout_p) * 65536 + 0.5))


def mask_of(
    problem: Problem, dropout_p: float, seed: int = 1, row_offset: int = 0, col_offset: int = 0
) -> Tensor | None:
    """[M, K] of bool, None without dropout."""
    if not dropout_p:
        return None
    shape = (problem.rows, problem.in_features)
    return lora_ext.functional.dropout_mask(
        seed, *shape, dropout_p, row_offset, col_offset, device=problem.x.device
    )


def masked(problem: Problem, dropout_p: float, seed: int = 1) -> tuple[Tensor | None, float]:
    """The mask, and what it keeps is multiplied by."""
    return mask_of(problem, dropout_p, seed), keep_scale_of(dropout_p)


def run_reference(problem: Problem, mask: Tensor | None = None, keep_scale: float = 1.0) -> Run:
    """PEFT's order of operations in the problem's dtypes."""

    def forward(x, lora_a, lora_b, bias):
        return lora_linear_reference(
            x, problem.weight, lora_a, lora_b, bias, problem.scaling, mask, keep_scale
        )

    return differentiate(problem, forward)


def run_float64(problem: Problem, mask: Tensor | None = None, keep_scale: float = 1.0) -> Run:
    return run_reference(problem.to(F64), mask, keep_scale)


def product_in_order(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left [m, k] right [k, n] + bias [n], terms added one after the other in at least float32."""
    wide = accumulation_dtype(left.dtype)
    total = left.new_zeros((left.shape[0], right.shape[1]), dtype=wide)
    for column, row in zip(left.to(wide).unbind(1), right.to(wide).unbind(0), strict=True):
        total.addr_(column, row)
    return (total if bias is None else total.add_(bias)).to(left.dtype)


class _LinearInOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias=None):
        ctx.save_for_backward(x, weight)
        return product_in_order(x, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        need_x, need_weight, *need_bias = ctx.needs_input_grad
        ones = grad.new_ones((1, len(grad)))
        return (
            product_in_order(grad, weight) if need_x else None,
            product_in_order(grad.t(), x) if need_weight else None,
            *(product_in_order(ones, grad)[0] if need else None for need in need_bias),
        )


class _InOrder(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        call = _LinearInOrder.apply if func is F.linear else func
        return call(*args, **(kwargs or {}))


def run_in_order(problem: Problem, mask: Tensor | None = None, keep_scale: float = 1.0) -> Run:
    """`run_reference` of 2-D operands with the products of `product_in_order`.

    A library sums in some other order, which errs less, by how much depends on the library and the
    processor. What this errs follows from the dtypes and from the lengths of the sums alone.
    """
    with _InOrder():
        return run_reference(problem, mask, keep_scale)


class Ops(TorchDispatchMode):
    """Notes each op that is called, with its operands."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func, (args, kwargs)))
        return func(*args, **(kwargs or {}))


def max_error(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).abs().max().item()


def rms_error(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).square().mean().sqrt().item()


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Largest error over the largest magnitude."""
    return max_error(value, exact) / exact.abs().max().item()


def base_of(problem: Problem) -> tuple[Tensor, Tensor]:
    """The base layer's y and dx in float64."""
    wide = problem.to(F64)
    return F.linear(wide.x, wide.weight, wide.bias), wide.grad @ wide.weight


def assert_exact(run: Run, problem: Problem, mask: Tensor | None = None, scale: float = 1.0):
    """Every element of an integer problem is the exact one, rounded as its dtype must round it.

    In float32 and float64 nothing rounds. A half result is one sum, rounded once, or the base
    rounded, plus the update, rounded. There is room for the routes: PEFT rounds the update of dx
    before it adds, and on CUDA the base is added to the rounded update, with the bias or without.
    """
    exact = run_float64(problem, mask, scale)
    dtype = problem.x.dtype

    def rounded(value: Tensor) -> Tensor:
        return value.to(dtype).double()

    base_y, base_dx = base_of(problem)
    delta_y, delta_dx = exact.y - base_y, exact.dx - base_dx
    y_ways = [rounded(exact.y), rounded(rounded(base_y) + delta_y)]
    dx_ways = [rounded(rounded(base_dx) + delta) for delta in (delta_dx, rounded(delta_dx))]
    dx_ways.append(rounded(exact.dx))
    if run.y.is_cuda or EMULATED:
        bias = 0 if problem.bias is None else problem.bias.double()
        y_ways.append(rounded(base_y + rounded(delta_y)))
        y_ways.append(rounded(base_y - bias + rounded(delta_y + bias)))
        dx_ways.append(rounded(base_dx + rounded(delta_dx)))
    for name, value, ways in (("y", run.y, y_ways), ("dx", run.dx, dx_ways)):
        assert sum(value == way for way in ways).all(), difference(name, value, ways[0])
    for name in ("dlora_a", "dlora_b", "dbias"):
        value = getattr(run, name)
        if value is not None:
            wanted = getattr(exact, name).to(value.dtype)
            assert torch.equal(value, wanted), difference(name, value, wanted)


def run_integers(problem: Problem, dropout_p: float = 0.0, seed: int = 1, **words) -> Run:
    """`run_ours` of an integer problem, with every element checked."""
    run = run_ours(problem, dropout_p, seed, **words)
    assert_exact(run, problem, *masked(problem, dropout_p, seed))
    return run


def difference(name: str, value: Tensor, wanted: Tensor) -> str:
    """Where two tensors differ, for a failure's message."""
    wrong = (value.double() != wanted.double()).nonzero()
    shown = [
        f"{tuple(at.tolist())}: {value[tuple(at)].item()} for {wanted[tuple(at)].item()}"
        for at in wrong[:4]
    ]
    return f"{name} differs in {len(wrong)} of {value.numel()} elements: {'; '.join(shown)}"


def assert_same_bits(run: Run, other: Run) -> None:
    for (name, value), (_, wanted) in zip(run.items(), other.items(), strict=True):
        assert torch.equal(value, wanted), difference(name, value, wanted)


def smallest_of_each_kind(tiles):
    """Of tiles' names, the last with each first word: plain, wgmma, decode, ..."""
    return list({"" if tile[0].isdigit() else tile.split()[0]: tile for tile in tiles}.values())


@contextmanager
def products_alike_from(width: int | None):
    """torch's products by a library that multiplies odd rows otherwise, unless the number of
    columns is a multiple of `width`."""

    def mm(a, b):
        y = (a[:, :, None] * b).sum(1)
        y[1::2] *= 1 + 1e-12 * (width is None or y.shape[1] % width > 0)
        return y

    def addmm(to, a, b, beta=1, alpha=1, out=None):
        y = alpha * mm(a, b) + (beta * to if beta else 0)
        return y if out is None else out.copy_(y)

    def addmm_(to, *rest, **words):
        return addmm(to, *rest, **words, out=to)

    with warnings.catch_warnings(), torch.library._scoped_library("aten", "IMPL") as library:
        warnings.simplefilter("ignore")
        for name, own in {"mm": mm, "addmm": addmm, "addmm_": addmm_, "addmm.out": addmm}.items():
            library.impl(name, own, "CPU")
        yield
