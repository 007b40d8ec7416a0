"""Problems with an adapter for each row, runs of them by the op and by a loop over the adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import op_calls
import torch
from helpers import F32, F64, accumulation_dtype, keep_scale_of, leaf, make_problem, max_error
from torch import Tensor

import lora_ext
from lora_ext.reference import lora_linear_reference, lora_update_reference

RANKS = (1, 16, 8, 33)
KINDS = ["ranges", "mixed", "in turn", "one", "none"]  # of index_of
GRADIENTS = ("x", "y", "bias", "lora_a", "lora_b")
TENSORS = (*GRADIENTS, "weight", "grad")


@dataclass(frozen=True)
class Many:
    """One call of many adapters with the gradient of its output."""

    x: Tensor  # [..., K]
    weight: Tensor | None  # [N, K]; None: y is given
    y: Tensor | None  # [..., N]
    lora_a: list[Tensor]  # [r_g, K]
    lora_b: list[Tensor]  # [N, r_g]
    bias: Tensor | None  # [N]
    grad: Tensor  # [..., N]
    scaling: Tensor  # [G]
    index: Tensor  # [...]

    def each(self, change: Callable[[Tensor], Tensor], names: Iterable[str] = TENSORS) -> Many:
        """With these tensors changed."""

        def changed(value):
            return [change(t) for t in value] if isinstance(value, list) else change(value)

        given = {name: getattr(self, name) for name in names}
        return replace(self, **{n: changed(v) for n, v in given.items() if v is not None})

    def each_factor(self, change: Callable[[Tensor], Tensor]) -> Many:
        return self.each(change, ("lora_a", "lora_b"))

    def to(self, dtype: torch.dtype) -> Many:
        return self.each(lambda tensor: tensor.to(dtype))

    @property
    def arguments(self) -> dict[str, Any]:
        """Of lora_linear, or of lora_update where y is given."""
        base = {"y": self.y} if self.weight is None else {"weight": self.weight, "bias": self.bias}
        names = ("x", "lora_a", "lora_b", "scaling", "index")
        return base | {name: getattr(self, name) for name in names}

    @property
    def rows(self) -> int:
        return self.index.numel()


def index_of(rows: int, adapters: int, kind: str, seed: int = 0) -> Tensor:
    """int32 [rows] with -1s among them: rows of an adapter together ("ranges"), in turn, mixed, all
    of the second ("one"), or none of any."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "none":
        return torch.full((rows,), -1, dtype=torch.int32)
    if kind == "one":
        return torch.full((rows,), min(1, adapters - 1), dtype=torch.int32)
    if kind == "in turn":
        return (torch.arange(rows) % (adapters + 1) - 1).int()
    mixed = torch.randint(-1, adapters, (rows,), generator=generator, dtype=torch.int32)
    return mixed.sort().values if kind == "ranges" else mixed


def make_many(
    lead,
    in_features,
    out_features,
    ranks=RANKS,
    pair=(F32, F32),
    device="cpu",
    *,
    kind="mixed",
    given=None,
    bias=True,
    integers=0,
    seed=0,
) -> Many:
    """given: the dtype of a y in the place of a weight."""
    lead = (lead,) if isinstance(lead, int) else lead
    options = {"integers": integers, "device": device}
    parts = [
        make_problem(
            lead, in_features, out_features, rank, pair, bias=bias, seed=seed + i, **options
        )
        for i, rank in enumerate(ranks)
    ]
    first = parts[0]
    scalings = [0.5, 2.0, 1.0] if integers else [0.7, 1.3, 0.05]
    scaling = torch.tensor([scalings[i % 3] for i in range(len(ranks))], device=device)
    rows = first.rows
    return Many(
        x=first.x,
        weight=None if given else first.weight,
        y=parts[-1].grad.to(given) if given else None,
        lora_a=[part.lora_a for part in parts],
        lora_b=[part.lora_b for part in parts],
        bias=None if given else first.bias,
        grad=first.grad.to(given) if given else first.grad,
        scaling=scaling,
        index=index_of(rows, len(ranks), kind, seed).view(lead).to(device),
    )


def differentiated(many: Many, forward, wanted=GRADIENTS, frozen=()) -> dict[str, Tensor]:
    """y and gradients of forward(base, x, lora_a, lora_b, bias), which writes none of them; frozen:
    numbers of adapters without."""

    def own(name, tensor):
        return leaf(tensor) if name in wanted else tensor

    base = own("y", many.y) if many.weight is None else many.weight
    x, bias = own("x", many.x), own("bias", many.bias)
    lora_a, lora_b = (
        [t if g in frozen else own(n, t) for g, t in enumerate(getattr(many, n))]
        for n in ("lora_a", "lora_b")
    )
    inputs = [t for t in (base, x, bias, *lora_a, *lora_b, many.grad, many.index) if t is not None]
    before = [t.detach().clone() for t in inputs]
    y = forward(base, x, lora_a, lora_b, bias)
    if y.requires_grad:
        y.backward(many.grad)
    for tensor, value in zip(inputs, before, strict=True):
        torch.testing.assert_close(tensor.detach(), value, rtol=0, atol=0, equal_nan=True)
    out = {"y": y.detach(), "dx": x.grad, "dy": base.grad, "dbias": getattr(bias, "grad", None)}
    for g, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        out[f"dlora_a[{g}]"], out[f"dlora_b[{g}]"] = a.grad, b.grad
    return {name: value for name, value in out.items() if value is not None}


def run(
    many: Many,
    dropout_p=0.0,
    seed=1,
    row_offset=0,
    col_offset=0,
    offs=None,
    wanted=GRADIENTS,
    frozen=(),
) -> dict[str, Tensor]:
    seeds = torch.tensor(seed, device=many.x.device) if dropout_p else None
    groups = (many.scaling, None if offs is not None else many.index, offs, None)
    tail = (dropout_p, seeds, row_offset, col_offset)

    def forward(base, x, lora_a, lora_b, bias):
        if many.weight is None:
            return op_calls.lora_update_grouped(base, x, lora_a, lora_b, groups, *tail)
        return op_calls.lora_linear_grouped(x, base, lora_a, lora_b, groups, bias, *tail)

    return differentiated(many, forward, wanted, frozen)


def run_loop(many: Many, dropout_p=0.0, seed=1, dtype=None) -> dict[str, Tensor]:
    """Torch's own products, one adapter after the other, in the tensors' dtypes or in one."""
    mask, scale = None, 1.0
    if dropout_p:
        width = many.x.shape[-1]
        mask = lora_ext.functional.dropout_mask(
            seed, many.rows, width, dropout_p, device=many.x.device
        )
        scale = keep_scale_of(dropout_p)
    if dtype is not None:
        many = many.to(dtype)
    tail = (many.scaling.to(many.lora_a[0].dtype), mask, scale, many.index)

    def forward(base, x, lora_a, lora_b, bias):
        if many.weight is None:
            return lora_update_reference(base, x, lora_a, lora_b, *tail)
        return lora_linear_reference(x, base, lora_a, lora_b, bias, *tail)

    return differentiated(many, forward)


def assert_at_most_twice(ours, theirs, exact, pair, half_pairs=False):
    """Errors at most twice torch's, plus a floor: a share of the largest value.

    Both of all adapters together, lora_a's or lora_b's. One row's dY B may nearly cancel out, and
    what remains of an adapter's gradient is then as large as the rounding of what went.
    """
    share = 1e-5 if half_pairs else 8 * torch.finfo(accumulation_dtype(pair[0])).eps
    bounds: dict[str, list[float]] = {}
    for name, wanted in exact.items():
        if wanted.numel():
            error, largest = max_error(theirs[name], wanted), wanted.abs().max().item()
            kind = bounds.setdefault(name.split("[")[0], [0.0, 0.0])
            kind[:] = max(kind[0], error), max(kind[1], largest)
    for name, wanted in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        assert ours[name].shape == wanted.shape, name
        if wanted.numel():
            error, largest = bounds[name.split("[")[0]]
            assert max_error(ours[name], wanted) <= 2 * error + share * largest, name


def sliced(tensor: Tensor) -> Tensor:
    """The same values with another element between neighbours in every direction."""
    for dim in range(tensor.dim()):
        tensor = tensor.repeat_interleave(2, dim)
    return tensor[(slice(None, None, 2),) * tensor.dim()]


def assert_equal(ours, wanted):
    for name, value in wanted.items():
        assert torch.equal(ours[name].to(F64), value.to(F64)), name
