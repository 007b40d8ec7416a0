"""Dropout of adapters on experts, against a layer in float64 that is given the masks."""

import copy
import itertools

import pytest
import torch
from expert_helpers import (
    EXPERTS,
    HIDDEN,
    SEEDS,
    assert_close,
    by_tokens,
    make_experts,
    make_routes,
    sides_of,
)
from helpers import BF16, F16, F32, F64, pair_id
from torch import Tensor

from lora_ext.experts import Experts, ExpertsAdapter, grouped_product, layer, lora_experts
from lora_ext.functional import dropout_mask

P, RANKS, SCALINGS = 0.3, (3, 2), (0.5, -2.0)


@pytest.fixture(autouse=True)
def known_seeds(monkeypatch):
    """The first projection of each call has the first seed, the second the other."""
    drawn = itertools.cycle(SEEDS)
    monkeypatch.setattr(layer, "draw_seed", lambda device: torch.tensor(next(drawn), device=device))


def make_factors(experts: Experts, dtype: torch.dtype = F64, ranks=RANKS) -> list[Tensor]:
    """A and B of each adapter, of the first projection and then of the second."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for (out, within), rank in itertools.product(sides_of(experts), ranks):
        for shape in ((EXPERTS * rank, within), (out, rank * EXPERTS)):
            made.append((0.3 * torch.randn(shape, generator=generator, dtype=F64)).to(dtype))
    return made


def step(function, experts, factors, x, index, weights, p=P) -> dict[str, Tensor]:
    """y and every gradient, by name."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weights, *factors)]
    own_x, own_weights, *own = leaves
    adapters = [
        ExpertsAdapter(*own[2 * i : 2 * i + 2], scaling, p)
        for i, scaling in enumerate(2 * SCALINGS[: len(own) // 4])
    ]
    half = len(adapters) // 2
    y = function(experts, own_x, index, own_weights, adapters[:half], adapters[half:])
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=F64)
    found = torch.autograd.grad(y, leaves, grad.to(y.dtype))
    names = ["y", "dx", "dweights", *(f"d{name}{i}" for i in range(len(adapters)) for name in "AB")]
    return dict(zip(names, [y.detach(), *found], strict=True))


@pytest.mark.parametrize("is_grouped", [False, True], ids=["by expert", "grouped product"])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("pair", [(BF16, BF16), (BF16, F32), (F16, F32), (F32, F32)], ids=pair_id)
def test_other_dtypes_have_the_same_masks(device, pair, tokens, is_grouped, monkeypatch):
    """One token, which without dropout the op of few rows takes; and torch's grouped product, as on
    a GPU."""
    if is_grouped:
        monkeypatch.setattr(grouped_product, "DEVICES", ("cpu", "cuda"))
    module = make_experts("plain").to(device, pair[0])
    experts = Experts.of(module)
    factors = [factor.to(device) for factor in make_factors(experts, pair[1], ranks=(3,))]
    x, index, weights = (each.to(device) for each in make_routes(tokens, 3, dtype=pair[0]))
    found = step(lora_experts, experts, factors, x, index, weights)
    wide = Experts.of(copy.deepcopy(module).double())
    factors = [factor.double() for factor in factors]
    exact = step(by_tokens, wide, factors, x.double(), index, weights.double())
    assert_close(found, exact, 1e-5 if pair[0] == F32 else 3e-2)
    other = step(by_tokens, wide, factors, x.double(), index, weights.double(), p=0.0)
    with pytest.raises(AssertionError):
        assert_close(found, other, 6e-2)


def test_h_is_kept_where_a_trained_gate_computed_it():
    """Masked rows are a copy: the gradients of the router's weights are of h itself."""
    experts = Experts.of(make_experts("plain"))._replace(is_gate_trained=True)
    factors, operands = make_factors(experts), make_routes(9, 3)
    found = step(lora_experts, experts, factors, *operands)
    assert_close(found, step(by_tokens, experts, factors, *operands), 1e-11)


def test_a_gate_that_draws_has_in_backward_what_it_drew():
    """As where autograd keeps h; and the generator goes on as if nothing had been drawn again."""
    experts = Experts.of(make_experts("plain"))
    gate, found = experts.gate, []
    experts = experts._replace(gate=lambda z: torch.nn.functional.dropout(gate(z), 0.5))
    factors, operands = make_factors(experts), make_routes(9, 3)
    for one in (experts, experts._replace(is_gate_trained=True)):
        torch.manual_seed(5)
        found.append(step(lora_experts, one, factors, *operands) | {"next": torch.rand(3)})
    assert_close(*found, 1e-12)


@pytest.mark.parametrize("p", [-0.5, torch.nan, 1.0, torch.inf])
def test_dropout_that_is_no_probability_is_refused(p):
    experts = Experts.of(make_experts("plain"))
    with pytest.raises(ValueError, match=rf"expected dropout in \[0, 1\), but got \[{p}\]"):
        step(lora_experts, experts, make_factors(experts), *make_routes(9, 3), p=p)


@pytest.mark.parametrize("p", [0.05, 1 / 65536, 1 - 2.0**-20])
def test_kept_elements_are_scaled_by_the_rounded_probability(p):
    experts = Experts.of(make_experts("plain"))
    factors, operands = make_factors(experts), make_routes(9, 3)
    found = step(lora_experts, experts, factors, *operands, p=p)
    assert_close(found, step(by_tokens, experts, factors, *operands, p=p), 1e-11)


def permuted(factors, order) -> list[Tensor]:
    """The factors of experts in another order."""
    a_then_b = itertools.cycle((True, False))
    return [
        f.view(EXPERTS, -1, f.shape[1])[order].reshape(f.shape)
        if is_a
        else f.view(len(f), -1, EXPERTS)[:, :, order].reshape(f.shape)
        for f, is_a in zip(factors, a_then_b, strict=False)
    ]


@pytest.mark.parametrize("dtype", [F64, BF16])
def test_the_order_of_experts_does_not_matter(dtype):
    """Rows are sorted in another way then; a token's masks are the same."""
    experts = Experts.of(make_experts("plain").to(dtype))
    factors, (x, index, weights) = make_factors(experts, dtype, (3,)), make_routes(64, 3)
    x, weights = x.to(dtype), weights.to(dtype)
    order = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(1))
    other = experts._replace(up=experts.up[order], down=experts.down[order])
    first = step(lora_experts, experts, factors, x, index, weights)
    own = permuted(factors, order)
    second = step(lora_experts, other, own, x, order.argsort()[index], weights)
    names = [name for name in first if name[1:2] in "AB" and name != "y"]
    back = permuted([second[name] for name in names], order.argsort())
    second |= dict(zip(names, back, strict=True))
    assert_close(second, {n: v.double() for n, v in first.items()}, 1e-12 if dtype == F64 else 2e-2)
    if dtype == BF16:
        assert torch.equal(first["y"], second["y"])


def test_a_token_has_one_mask_of_x_and_a_mask_of_h_for_each_slot(monkeypatch):
    """Twice the same expert: the update of the first projection is the same, of the second not."""
    experts = Experts.of(make_experts("plain"))
    x, *_ = make_routes(5, 2)
    index, ones = torch.full((5, 2), 4), torch.ones(5, 2, dtype=F64)
    a1, b1, a2, b2 = make_factors(experts, ranks=(3,))

    monkeypatch.setattr(layer, "draw_seed", lambda device: torch.tensor(SEEDS[0]))

    def slot(number, **adapters):
        only = torch.zeros_like(ones)
        only[:, number] = 1.0
        return lora_experts(experts, x, index, only, **adapters)

    up = {"up": [ExpertsAdapter(a1, b1, 1.0, P)]}
    torch.testing.assert_close(slot(0, **up), slot(1, **up), rtol=1e-12, atol=1e-12)
    down = {"down": [ExpertsAdapter(a2, b2, 1.0, P)]}
    assert torch.equal(slot(0, **down), slot(0, **down))
    assert float((slot(0, **down) - slot(1, **down)).abs().max()) > 1e-3


def test_adapters_that_differ_in_dropout_are_refused():
    experts = Experts.of(make_experts("plain"))
    a1, b1, *_ = make_factors(experts, ranks=(3,))
    up = [ExpertsAdapter(a1, b1, 1.0, 0.1), ExpertsAdapter(a1, b1, 1.0)]
    message = r"one dropout for all active adapters .* but got \[0.0, 0.1\]; give them the same"
    with pytest.raises(ValueError, match=message):
        lora_experts(experts, *make_routes(5), up)


DROP = torch.ops.lora_ext.drop_rows


@pytest.mark.parametrize("columns", [1, 7, 8, 40, HIDDEN * 40 + 3])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, torch.float16], ids=str)
def test_rows_get_the_masks_of_other_rows(dtype, columns):
    """In place, in a part of wider rows; what is dropped is zero, NaN too, the rest as it was."""
    wide = torch.randn(5, columns + 3).to(dtype)
    x, rows = wide[:, :columns], torch.tensor([2**33, 0, 3, 3, 40])
    kept = torch.cat([dropout_mask(7, 1, columns, P, int(row)) for row in rows])
    x[~kept] = torch.nan
    wanted, beside = torch.where(kept, x, 0), wide[:, columns:].clone()
    DROP(x, rows, torch.tensor(7), P)
    assert torch.equal(x, wanted) and torch.equal(wide[:, columns:], beside)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 8, 1)}, "expected x of shape"),
        ({"x": torch.ones(8, 2).t()}, "contiguous along its columns"),
        ({"x": torch.ones(2, 8, dtype=torch.int16)}, "x"),
        ({"rows": torch.ones(2, dtype=torch.int32)}, "of each of 2 rows, as int64, but got Int"),
        ({"rows": torch.ones(3, dtype=torch.int64)}, r"of each of 2 rows, .* \[3\]"),
        ({"seed": torch.ones(1)}, "expected seed of dtype int64"),
        ({"p": 1.0}, "dropout_p"),
    ],
)
def test_rows_that_do_not_fit_are_refused(change, message):
    given = {"x": torch.ones(2, 8), "rows": torch.arange(2), "seed": torch.tensor(7), "p": P}
    with pytest.raises((RuntimeError, TypeError), match=message):
        DROP(*(given | change).values())
