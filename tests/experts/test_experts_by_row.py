"""Experts whose tokens have adapters of their own, against each adapter alone on all tokens, of
which its own are taken."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from expert_helpers import EXPERTS, KINDS, assert_close, make_experts, make_routes
from helpers import BF16, F16, F32, F64, pair_id
from torch import Tensor

from lora_ext import _C
from lora_ext.experts import (
    Experts,
    ExpertsAdapter,
    expert_groups,
    factors,
    few_rows,
    lora_experts,
    routing,
)
from lora_ext.experts.operands import Projection

RANKS, SCALINGS = (3, 1, 2, 2), (0.5, -2.0, 1.5, 1.0)
UP, DOWN = (0, 1, 3), (0, 2, 3)  # the adapters of each projection; 3 has no rows


class Layer(NamedTuple):
    """Experts and adapters of them, and what they are called with."""

    experts: Experts
    up: list
    down: list
    operands: tuple[Tensor, Tensor, Tensor]
    adapters: Tensor  # [T]

    def leaves(self) -> dict[str, Tensor]:
        x, _, weights = self.operands
        found = {"x": x, "weights": weights}
        for side, adapters in (("up", self.up), ("down", self.down)):
            for i, adapter in enumerate(adapters):
                if adapter is not None:
                    found |= {f"{side}{i}a": adapter.lora_a, f"{side}{i}b": adapter.lora_b}
        return found

    def call(self, adapter: int | None, grad: Tensor) -> dict[str, Tensor]:
        """y and gradients of a forward with the adapter of each token, or one alone, -1: none."""
        for leaf in self.leaves().values():
            leaf.grad = None
        torch.manual_seed(3)  # of dropout's seeds
        x, index, weights = self.operands
        if adapter is None:
            y = lora_experts(self.experts, x, index, weights, self.up, self.down, self.adapters)
        else:
            up, down = (_alone(each, adapter) for each in (self.up, self.down))
            y = lora_experts(self.experts, x, index, weights, up, down)
        y.backward(grad.to(y.dtype))
        grads = {name: leaf.grad for name, leaf in self.leaves().items()}
        found = {name: grad.clone() for name, grad in grads.items() if grad is not None}
        return {"y": y.detach(), **found}

    def mixed(self) -> dict[str, Tensor]:
        return self.call(None, self.grad())

    def alone(self) -> dict[str, Tensor]:
        """What `mixed` has to equal: gradients of adapters without rows are zeros."""
        found = {name: torch.zeros_like(leaf) for name, leaf in self.leaves().items()}
        found["y"] = torch.zeros_like(self.operands[0])
        for adapter in self.adapters.unique().tolist():
            own = (self.adapters == adapter)[:, None]
            step = self.call(adapter, self.grad() * own)
            step["y"] = step["y"] * own
            for name, value in step.items():
                found[name] += value
        return found

    def grad(self) -> Tensor:
        generator = torch.Generator().manual_seed(4)
        return torch.randn(self.operands[0].shape, generator=generator, dtype=F64)

    def to(self, dtype: torch.dtype) -> Layer:
        names = ("up", "down", "up_bias", "down_bias")
        frozen = {name: getattr(self.experts, name) for name in names}
        made = {name: each.to(dtype) for name, each in frozen.items() if each is not None}
        x, index, weights = self.operands
        return make_layer(
            self.experts._replace(**made),
            (x.detach().to(dtype), index, weights.detach().to(dtype)),
            self.adapters,
            [_leaf(each, dtype) for each in self.up],
            [_leaf(each, dtype) for each in self.down],
        )


def _alone(adapters: list, adapter: int) -> list:
    """One adapter of a projection. With dropout one that it lacks is another times 0, so that seeds
    are drawn as in the batch."""
    if 0 <= adapter < len(adapters) and adapters[adapter] is not None:
        return [adapters[adapter]]
    return [each._replace(scaling=0.0) for each in adapters if each and each.dropout][:1]


def _leaf(adapter, dtype: torch.dtype | None = None):
    if adapter is None:
        return None
    lora_a, lora_b = (
        each.detach().to(dtype or each.dtype).clone().requires_grad_() for each in adapter[:2]
    )
    return adapter._replace(lora_a=lora_a, lora_b=lora_b)


def make_layer(experts, operands, adapters, up, down) -> Layer:
    x, index, weights = operands
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    return Layer(experts, up, down, (x, index, weights), adapters)


def layer_of(
    kind: str = "plain",
    tokens: int = 7,
    pair: tuple[torch.dtype, ...] = (F64, F64),
    dropout: float = 0.0,
    one: bool = False,
) -> Layer:
    """Four adapters of other ranks, one on both projections, two on one; tokens of three of them
    and of none. one: the first adapter alone, of all tokens."""
    experts = Experts.of(make_experts(kind).to(pair[0]))
    generator = torch.Generator().manual_seed(tokens)
    sides = []
    for weight, own in ((experts.up, UP), (experts.down, DOWN)):
        out, within = weight.shape[1:]
        if experts.is_transposed:
            out, within = within, out
        adapters = []
        for i, (rank, scaling) in enumerate(zip(RANKS, SCALINGS, strict=True)):
            dtype = pair[1 + i % (len(pair) - 1)]
            shapes = (EXPERTS * rank, within), (out, rank * EXPERTS)
            a, b = (0.3 * torch.randn(each, generator=generator, dtype=F64) for each in shapes)
            made = ExpertsAdapter(a.to(dtype), b.to(dtype), scaling, dropout)
            adapters.append(_leaf(made) if i in own else None)
        sides.append(adapters[:1] if one else adapters)
    adapters = torch.randint(-1, 3, (tokens,), generator=generator, dtype=torch.int32)
    if one:
        adapters = torch.zeros_like(adapters)
    return make_layer(experts, make_routes(tokens, dtype=pair[0]), adapters, *sides)


@pytest.fixture(params=[8, 512])
def group_rows(request, monkeypatch):
    """Rows at which a group of experts ends; with few, few experts whose B is copied together."""
    monkeypatch.setattr(expert_groups, "_ROWS", request.param)
    monkeypatch.setattr(factors, "_BLOCK", 2 if request.param == 8 else 32)
    monkeypatch.setattr(routing, "_CPU_BLOCK", 100 if request.param == 8 else 1 << 18)


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_each_adapter_as_alone(kind, tokens, group_rows):
    layer = layer_of(kind, tokens)
    assert_close(layer.mixed(), layer.alone(), 1e-6 if kind == "float32 gate" else 1e-11)


@pytest.mark.parametrize("kind", ["plain", "transposed, biases, interleaved", "norm"])
def test_dropout_is_that_of_the_token_and_column(kind):
    layer = layer_of(kind, 40, dropout=0.4)
    found = layer.mixed()
    assert_close(found, layer.alone(), 1e-11)
    assert not torch.equal(found["y"], layer_of(kind, 40).mixed()["y"])


@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("pair", [(F64, F64), (F32, F32), (BF16, BF16), (F16, F32)], ids=pair_id)
def test_one_adapter_of_all_tokens_has_its_bits_alone(pair, tokens):
    layer = layer_of("plain", tokens, pair, one=True)
    found, alone = layer.mixed(), layer.call(0, layer.grad())
    assert all(torch.equal(found[name], alone[name]) for name in alone)


@pytest.mark.parametrize("panels", ["none", "float32"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_one_pass(kind, dropout, panels, group_rows):
    """In float32 base and update are one pass, in float64 two ops."""
    layer = layer_of(kind, 90, (F32, F32), dropout)
    _C.set_cpu_panels(panels)
    try:
        found = layer.mixed()
    finally:
        _C.set_cpu_panels("auto")
    assert_close(found, layer.to(F64).mixed(), 2e-5)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(
    "pair", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (BF16, BF16, F32)], ids=pair_id
)
def test_errors_are_at_most_twice_those_alone(pair, tokens):
    """The last pair has adapters of two dtypes in one batch. The gate is smooth: at a clamp's edge
    a rounding of z decides about a gradient."""
    layer = layer_of("plain", tokens, pair)
    exact, alone, found = layer.to(F64).alone(), layer.alone(), layer.mixed()
    for name, value in exact.items():
        assert found[name].dtype == alone[name].dtype
        floor = 4 * torch.finfo(found[name].dtype).eps * float(value.norm())
        error, of_alone = (float((each[name] - value).norm()) for each in (found, alone))
        assert error <= 2 * of_alone + floor, name


def test_numbers_of_no_expert_add_nothing():
    layer = layer_of(tokens=9)
    x, index, weights = layer.operands
    index = index.clone()
    index[0, 1] = index[3, 0] = (2**64 + 4) // 5  # times the kinds of rows it would be 4
    index[4, 0] = -1
    index[5] = EXPERTS
    layer = layer._replace(operands=(x, index, weights))
    found = layer.mixed()
    assert_close(found, layer.alone(), 1e-11)
    assert not found["y"][5].any()


def _rows_of_two_experts(index: Tensor, dtype: torch.dtype = F32) -> dict:
    """Operands of the op of one pass: 40 rows of expert 0, then 40 of expert 2."""
    generator = torch.Generator().manual_seed(5)
    shapes = (80, 65), (3, 49, 65), (2, 4, 65), (2, 49, 4)
    x, weight, a, b = (torch.randn(each, generator=generator).to(dtype) for each in shapes)
    lists = {"lora_a": [*a], "lora_b": [*b], "scaling": torch.tensor([0.5, 2.0])}
    experts = {"experts": [0, 2], "ends": [40, 80], "index": index.int(), "offs": None}
    dropout = {"dropout_p": 0.0, "seed": None, "mask_rows": None, "row_block": 0}
    return {"x": x, "weight": weight, **experts, **lists, **dropout}


@pytest.mark.parametrize(
    ("panels", "dtype", "tolerance"),
    [("none", F32, 2e-5), ("float32", F32, 2e-5), ("none", BF16, 0.1), ("bfloat16", BF16, 0.1)],
)
def test_rows_of_an_expert_whose_adapters_alternate(panels, dtype, tolerance):
    """The op takes adapters in any order, also where an expert's rows must stay together; sizes are
    odd."""
    index = torch.arange(80) % 3 - 1
    given = _rows_of_two_experts(index, dtype)
    y, dx = (torch.empty(80, columns, dtype=dtype) for columns in (49, 65))
    _C.set_cpu_panels(panels)
    try:
        s = torch.ops.lora_ext.experts_linear(bias=None, y=y, **given)
        torch.ops.lora_ext.experts_linear_backward(y, s=s, dx=dx, dlora_a=[], dlora_b=[], **given)
    finally:
        _C.set_cpu_panels("auto")
    matrices = given["weight"][torch.tensor([0, 2]).repeat_interleave(40)].double()
    for g, (a, b) in enumerate(zip(given["lora_a"], given["lora_b"], strict=True)):
        matrices[index == g] += float(given["scaling"][g]) * (b.double() @ a.double())
    exact = torch.einsum("mk,mnk->mn", given["x"].double(), matrices)
    exact_dx = torch.einsum("mn,mnk->mk", y.double(), matrices)
    assert_close({"y": y, "dx": dx}, {"y": exact, "dx": exact_dx}, tolerance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(()).expand(80, 65)}, "expected x in Float, contiguous along"),
        ({"x": torch.zeros(80, 65).bfloat16()}, "expected x in Float, contiguous along"),
        ({"x": torch.zeros(81, 65), "dx": None}, "expected x and dx of 65 columns"),
        ({"s": torch.zeros(()).expand(80, 4)}, "expected a contiguous s"),
    ],
)
def test_a_backward_in_one_pass_refuses_what_it_would_read_beyond(change, message):
    given = _rows_of_two_experts(torch.arange(80) // 40)
    given |= {"s": torch.zeros(80, 4), "dx": torch.empty(80, 65)} | change
    to = {f"d{name}": [torch.empty_like(f) for f in given[name]] for name in ("lora_a", "lora_b")}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lora_ext.experts_linear_backward(torch.zeros(80, 49), **given, **to)


def test_an_adapter_of_neither_projection_is_the_base():
    layer = layer_of(tokens=7)
    bare = layer._replace(up=[None] * 4, down=[])
    found, base = bare.mixed(), bare.call(-1, bare.grad())
    assert_close({name: found[name] for name in base}, base, 1e-11)


def test_the_same_bits_each_time(two_threads):
    layer = layer_of("norm", 64, (BF16, BF16), 0.1)
    first, second = layer.mixed(), layer.mixed()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize(
    "wanted", [{"x"}, {"weights"}, {"up0a", "down2a"}, {"up1b"}, {"x", "up1b"}]
)
def test_only_the_gradients_that_are_wanted(wanted, dtype):
    layer = layer_of(tokens=20, pair=(dtype, dtype))
    exact = layer.mixed()
    for name, leaf in layer.leaves().items():
        leaf.requires_grad_(name in wanted)
    found = layer.mixed()
    assert found.keys() == {"y", *wanted}
    assert all(torch.equal(found[name], exact[name]) for name in found)


@pytest.mark.parametrize("default", ["meta", "cuda"])
@pytest.mark.parametrize("adapter", [None, 0], ids=["by row", "one"])
@pytest.mark.parametrize(("dtype", "tokens"), [(F64, 40), (BF16, 40), (BF16, 1)])
def test_another_default_device(dtype, tokens, adapter, default):
    """On which nothing of the call is made."""
    layer = layer_of(tokens=tokens, pair=(dtype, dtype), dropout=0.1 if tokens > 1 else 0.0)
    wanted = layer.call(adapter, layer.grad())
    grad = layer.grad()
    with torch.device(default):
        found = layer.call(adapter, grad)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("pair", [(F64, F64), (BF16, BF16)], ids=pair_id)
def test_a_scaling_in_a_tensor(pair, dropout):
    """Is as one in a number, also with dropout."""
    layer = layer_of("plain", 7, pair, dropout)
    up = [a and a._replace(scaling=torch.tensor(a.scaling, dtype=F64)) for a in layer.up]
    wanted = {name: value.double() for name, value in layer.mixed().items()}
    assert_close(layer._replace(up=up).mixed(), wanted, 1e-11 if pair[0] == F64 else 2e-2)


def test_a_group_across_the_end_of_a_block_of_experts(monkeypatch):
    """Of which B is copied together: the groups are experts 0; 1 and 2; 3; blocks have two."""
    monkeypatch.setattr(expert_groups, "_ROWS", 8)
    monkeypatch.setattr(factors, "_BLOCK", 2)
    layer = layer_of(tokens=11)
    x, _, weights = layer.operands
    layer = layer._replace(operands=(x, torch.tensor([[0, 2]] * 8 + [[1, 3]] * 3), weights))
    assert_close(layer.mixed(), layer.alone(), 1e-11)


def test_non_contiguous_factors_and_an_index_of_another_integer():
    layer = layer_of()
    up = [a and a._replace(lora_b=a.lora_b.t().clone().t().requires_grad_()) for a in layer.up]
    layer = layer._replace(up=[_leaf_of(a) for a in up], adapters=layer.adapters.long())
    assert_close(layer.mixed(), layer.alone(), 1e-11)


def _leaf_of(adapter):
    return adapter and adapter._replace(lora_b=adapter.lora_b.detach().requires_grad_())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda i: i.float(), ValueError, r"integers and shape \[7\].*float32"),
        (lambda i: i[:3], ValueError, r"one for each token, but got .* of \[3\]"),
        (lambda i: i.fill_(1).index_fill_(0, torch.tensor(2), 4), IndexError, "4 adapters, .* 4$"),
        (lambda i: i.fill_(3).index_fill_(0, torch.tensor(2), -2), IndexError, "but got -2$"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(change, error, message):
    layer = layer_of()
    with pytest.raises(error, match=message):
        layer._replace(adapters=change(layer.adapters.clone())).mixed()


def test_other_numbers_of_adapters_are_refused():
    layer = layer_of()
    with pytest.raises(ValueError, match=r"the same adapters in up and down .* got 4 and 3"):
        layer._replace(down=layer.down[:3]).mixed()


@pytest.mark.parametrize("pair", [(BF16, BF16), (BF16, F32), (F16, BF16)], ids=pair_id)
def test_few_rows(pair):
    """Of adapters of two ranks and of rank 0, and of no adapter; each rounded once."""
    weight, ranks = torch.randn(EXPERTS, 24, 40).to(pair[0]), (3, 2, 0)
    bias, x = torch.randn(EXPERTS, 24).to(pair[0]), torch.randn(7, 40).to(pair[0])
    lora_a = [torch.randn(EXPERTS * r, 40).to(pair[1]) for r in ranks]
    lora_b = [torch.randn(24, r * EXPERTS).to(pair[1]) for r in ranks]
    scalings = (0.5, -2.0, 1.0)
    numbers, adapters = [1, 2, 2, 5, 5, 5, 5], [0, -1, 1, -1, 0, 0, 2]
    keys = torch.tensor([4 * e + a + 1 for e, a in zip(numbers, adapters, strict=True)])
    ends = torch.searchsorted(keys, torch.arange(4 * EXPERTS), right=True).int()
    order = torch.arange(7)
    routes = routing.Routes(order, order, ends.view(EXPERTS, 4)[:, -1], ends)
    found = few_rows.forward(
        x, Projection(weight, bias, routes, lora_a, lora_b, scalings), ends.tolist()
    )
    assert found is not None
    y, s = found
    assert s.shape == (7, 3)
    half = torch.finfo(pair[0]).eps / 2
    for m, (e, a) in enumerate(zip(numbers, adapters, strict=True)):
        exact = weight[e].double() @ x[m].double() + bias[e].double()
        if a >= 0 and ranks[a]:
            low_rank = lora_a[a].double().view(EXPERTS, -1, 40)[e] @ x[m].double()
            exact += scalings[a] * (lora_b[a].double().view(24, -1, EXPERTS)[..., e] @ low_rank)
            torch.testing.assert_close(s[m, : ranks[a]].double(), low_rank, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(y[m].double(), exact, rtol=1.01 * half, atol=1e-4)


@pytest.mark.parametrize(
    ("adapters", "message"), [([1], "from -1"), ([-2], "from -1"), ([0, 0], "one for each expert")]
)
def test_adapters_that_the_op_of_few_rows_refuses(adapters, message):
    x, weight = torch.ones(1, 40, dtype=BF16), torch.ones(EXPERTS, 24, 40, dtype=BF16)
    a, b = torch.ones(EXPERTS * 2, 40), torch.ones(24, 2 * EXPERTS)
    with pytest.raises((RuntimeError, IndexError), match=message):
        torch.ops.lora_ext.experts_few_rows(x, None, weight, None, [a], [b], [1.0], [0], adapters)
