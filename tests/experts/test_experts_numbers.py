"""LoRA on experts against PEFT's own forward in float64, both with transformers' eager experts."""

from functools import partial

import pytest
import torch
from expert_helpers import EXPERTS, KINDS, assert_close, make_experts, make_routes, mixture, run
from helpers import BF16, F16, F32, F64, pair_id
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_helpers import accelerated, exact_model, reasons
from torch import Tensor, nn

from lora_ext import _C
from lora_ext.experts import (
    Experts,
    ExpertsAdapter,
    expert_groups,
    few_rows,
    lora_experts,
    routing,
)
from lora_ext.experts.operands import Projection
from lora_ext.experts.projection import backward
from lora_ext.experts.routing import Routes

ROUNDED = "float32 gate"  # by the gate itself
TWO = {"x": {"r": 3, "lora_alpha": 5}, "y": {"r": 2, "lora_alpha": -3}}


def assert_as_peft(model, *operands, kind="plain") -> None:
    fast, tolerance = accelerated(model), 1e-6 if kind == ROUNDED else 1e-11
    assert {path for path, _ in reasons(fast)} == {"fused"}
    assert_close(run(fast, *operands), run(model, *operands), tolerance)


@pytest.fixture(params=[8, 512])
def group_rows(request, monkeypatch):
    """Rows at which a group of experts ends; with few, few elements that are summed together."""
    monkeypatch.setattr(expert_groups, "_ROWS", request.param)
    monkeypatch.setattr(routing, "_CPU_BLOCK", 100 if request.param == 8 else 1 << 18)


@pytest.mark.parametrize("kind", ["plain", "norm"])
def test_no_tokens(kind):
    """PEFT's y has no gradient then; here each factor's is zero."""
    found = run(accelerated(mixture(kind)), *make_routes(0))
    assert found["y"].shape == found["dx"].shape == (0, 16)
    assert len(found) == 7 and all(float(value.abs().sum()) == 0 for value in found.values())


@pytest.mark.parametrize("tokens", [1, 7, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_each_layout(kind, tokens, group_rows):
    assert_as_peft(mixture(kind), *make_routes(tokens), kind=kind)


@pytest.mark.parametrize("dtype", [F64, BF16])
def test_a_capture_is_refused_where_the_host_reads_rows(dtype, monkeypatch):
    """In forward and in backward; a double says that a CUDA graph is captured."""
    model, operands = accelerated(mixture(dtype=dtype)), make_routes(3, dtype=dtype)
    y, is_captured = model(*operands), lambda tensor: True
    monkeypatch.setattr(expert_groups, "is_captured", is_captured)
    for call in (lambda: model(*operands), y.sum().backward):
        with pytest.raises(RuntimeError, match="call the layer outside of the capture"):
            call()


@pytest.mark.parametrize("adapters", [None, TWO], ids=["one", "two"])
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("kind", ["plain", "transposed, biases, interleaved", "norm"])
def test_adapters_of_one_parameter(kind, name, adapters):
    assert_as_peft(mixture(kind, adapters, [name]), *make_routes(9))


@pytest.mark.parametrize(
    ("index", "what"),
    [
        ([[2]] * 5, "one expert for all, k = 1"),
        ([[0, 1, 2, 3, 4, 5]] * 5, "all experts for all, k = E"),
        ([[5, 0], [0, 5], [5, 0]], "the first and the last"),
        ([[3, 3], [1, 1]], "twice the same"),
    ],
)
def test_routes(index, what, group_rows):
    index = torch.tensor(index)
    x, _, weights = make_routes(*index.shape)
    assert_as_peft(mixture("plain", TWO), x, index, weights)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_routes(data):
    experts = data.draw(st.integers(2, 9), "experts")
    slots = data.draw(st.integers(1, experts), "slots")
    tokens = data.draw(st.integers(1, 12), "tokens")
    number = st.integers(0, experts - 1)
    index = data.draw(
        st.lists(
            st.lists(number, min_size=slots, max_size=slots), min_size=tokens, max_size=tokens
        ),
        "index",
    )
    rank = data.draw(st.sampled_from([1, 2, experts]), "rank")
    kind = data.draw(st.sampled_from(list(KINDS)), "kind")
    model = mixture(kind, {"x": {"r": rank, "lora_alpha": 2 * rank}}, experts=experts)
    x, _, weights = make_routes(tokens, slots, experts)
    assert_as_peft(model, x, torch.tensor(index).view(tokens, slots), weights, kind=kind)


PAIRS = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F32, BF16), (F16, BF16)]


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(
    ("kind", "names", "adapters", "pair"),
    [
        *(("plain", None, adapters, pair) for adapters in (None, TWO) for pair in PAIRS),
        ("plain", ["down_proj"], None, (BF16, F32)),
        ("norm", None, TWO, (BF16, F32)),
        ("transposed, biases, interleaved", None, TWO, (F16, F32)),
        ("no gate", ["up_proj"], None, (F16, F16)),
    ],
)
def test_errors_are_at_most_twice_pefts(device, kind, names, adapters, pair, tokens):
    model = mixture(kind, adapters, names, dtype=pair[0], adapter_dtype=pair[1]).to(device)
    operands = [each.to(device) for each in make_routes(tokens, dtype=pair[0])]
    x, index, weights = operands
    exact = run(exact_model(model), x.double(), index, weights.double())
    model.base_model.model.experts.get_base_layer().config._experts_implementation = "grouped_mm"
    theirs, ours = run(model, *operands), run(accelerated(model), *operands)
    # The library rounds the base before it adds the update.
    most = 3 if _C.cuda_route() == "library" else 2
    for name, value in exact.items():
        assert ours[name].dtype == theirs[name].dtype
        floor = 4 * torch.finfo(ours[name].dtype).eps * float(value.abs().max())
        error, of_peft = (float((each[name] - value).abs().max()) for each in (ours, theirs))
        assert error <= most * of_peft + floor, name


@pytest.mark.parametrize("threads", ["one_thread", "two_threads"])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("out_features", [25, 600])
@pytest.mark.parametrize("pair", [(BF16, BF16), (BF16, F32), (F16, BF16)], ids=pair_id)
def test_few_rows(pair, out_features, is_transposed, threads, deterministic, monkeypatch, request):
    """Of one to five rows of an expert, with biases and two adapters; rounded once. Memory that
    nobody writes is NaN."""
    request.getfixturevalue(threads)
    monkeypatch.setattr(few_rows, "MOST_ROWS", 5)  # more than the kernel takes at a time
    weight = torch.randn(EXPERTS, out_features, 40).to(pair[0])
    if is_transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    bias, x = torch.randn(EXPERTS, out_features).to(pair[0]), torch.randn(4, 40).to(pair[0])
    ranks = (3, 2)
    lora_a = [torch.randn(EXPERTS * r, 40).to(pair[1]) for r in ranks]
    lora_b = [torch.randn(out_features, r * EXPERTS).to(pair[1]) for r in ranks]
    bounds, token = [0, 1, 3, 3, 3, 8], torch.tensor([3, 0, 1, 2, 2, 0, 1, 3])
    routes, scalings = Routes(token, token, torch.tensor(bounds)), (0.5, -2.0)
    call = Projection(weight, bias, routes, lora_a, lora_b, scalings, is_first=True)
    numbers, found = [1, 2, 2, 5, 5, 5, 5, 5], few_rows.forward(x, call, bounds)
    assert found is not None
    y, s = found
    rows = x[token].double()
    low_rank = [
        torch.einsum("mk,mrk->mr", rows, a.double().view(EXPERTS, -1, 40)[numbers]) for a in lora_a
    ]
    exact = torch.einsum("mk,mok->mo", rows, weight[numbers].double()) + bias[numbers]
    for part, b, scaling in zip(low_rank, lora_b, scalings, strict=True):
        of_expert = b.double().view(out_features, -1, EXPERTS).permute(2, 0, 1)[numbers]
        exact += scaling * torch.einsum("mr,mor->mo", part, of_expert)
    torch.testing.assert_close(s.double(), torch.cat(low_rank, 1), rtol=1e-5, atol=1e-4)
    half = torch.finfo(pair[0]).eps / 2
    torch.testing.assert_close(y.double(), exact, rtol=1.01 * half, atol=1e-4)


@pytest.mark.parametrize("panels", ["none", "float32"])
@pytest.mark.parametrize("want_x", [False, True])
@pytest.mark.parametrize("is_by_row", [False, True])
def test_gradients_of_float32_factors_round_nothing_to_half(is_by_row, want_x, panels):
    """Rows with weights, as of the second projection: neither the row nor dS is rounded."""
    generator = torch.Generator().manual_seed(3)
    shapes = (240, 24), (240, 40), (EXPERTS, 24, 40)
    g, x, weight = (torch.randn(each, generator=generator).to(BF16) for each in shapes)
    of_row, w = torch.arange(240) // 40, torch.rand(240, generator=generator)
    ranks, scalings, ends = (3, 2), (0.5, -2.0), None
    own = [torch.ones(240, dtype=torch.bool)] * 2
    if is_by_row:  # of each expert 10 rows with none, 20 with the first, 10 with the second
        ends = (torch.tensor([10, 30, 40]) + 40 * torch.arange(EXPERTS)[:, None]).flatten().int()
        place = torch.arange(240) % 40
        own = [(place >= 10) & (place < 30), place >= 30]
    lora_a = [torch.randn(EXPERTS * r, 40, generator=generator) for r in ranks]
    lora_b = [torch.randn(24, r * EXPERTS, generator=generator) for r in ranks]
    parts, exact_a, exact_b = [], [], []
    for a, b, scaling, mine in zip(lora_a, lora_b, scalings, own, strict=True):
        by_expert = a.double().view(EXPERTS, -1, 40), b.double().view(24, -1, EXPERTS)
        part = torch.einsum("mk,mrk->mr", x.double(), by_expert[0][of_row])
        ds = torch.einsum("mo,orm->mr", g.double(), by_expert[1][..., of_row])
        of_expert = nn.functional.one_hot(of_row, EXPERTS) * (scaling * w.double() * mine)[:, None]
        exact_a.append(torch.einsum("me,mr,mk->erk", of_expert, ds, x.double()).view_as(a))
        exact_b.append(torch.einsum("me,mo,mr->ore", of_expert, g.double(), part).reshape(b.shape))
        parts.append(part)
    s = torch.cat(parts, 1)
    if is_by_row:
        s = torch.where(own[1][:, None], nn.functional.pad(parts[1], (0, 1)), parts[0])
    order, offs = torch.arange(240), torch.arange(40, 241, 40, dtype=torch.int32)
    # grad is of tokens, one for each row
    call = Projection(weight, None, Routes(order, order, offs, ends), lora_a, lora_b, scalings)
    _C.set_cpu_panels(panels)
    try:
        found = backward(g, x, w, call, s.float(), want_x, [True] * 2, [True] * 2)
    finally:
        _C.set_cpu_panels("auto")
    names = [f"{name}{i}" for name in "AB" for i in range(2)]
    given = dict(zip(names, [*found.dlora_a, *found.dlora_b], strict=True))
    assert_close(given, dict(zip(names, [*exact_a, *exact_b], strict=True)), 1e-4)


def test_rows_that_the_op_does_not_take():
    weight, bounds = torch.randn(EXPERTS, 24, 40).to(BF16), [0, 1, 1, 1, 1, 3]

    def takes(bounds: list[int], rows: int, weight: Tensor, *factors) -> bool:
        order = torch.arange(rows)
        call = Projection(weight, None, Routes(order, order, torch.tensor(bounds)), *factors)
        return few_rows.forward(torch.ones(rows, 40, dtype=weight.dtype), call, bounds) is not None

    assert takes(bounds, 3, weight)
    assert not takes([0, 1, 1, 1, 1, 6], 6, weight)
    assert not takes(bounds, 4, weight)  # one has no expert
    assert not takes(bounds, 3, weight.float())
    wide = [torch.ones(EXPERTS, 40, dtype=F64)], [torch.ones(24, EXPERTS)], (1.0,)
    assert not takes(bounds, 3, weight, *wide)


OPS = torch.ops.lora_ext


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w, a, b: OPS.experts_few_rows(x, None, w, None, [a], [b], [1.0], [6]), "below"),
        (lambda x, w, a, b: OPS.experts_few_rows(x, None, w, None, [a], [b], [1.0], [-1]), "below"),
        (lambda x, w, a, b: OPS.experts_few_rows(x, None, w, None, [a], [b], [1.0], [0, 1]), "row"),
        (lambda x, w, a, b: OPS.experts_few_rows(x, None, w, None, [a], [a], [1.0], [0]), "lora_b"),
        (lambda x, w, a, b: OPS.experts_few_rows(x, None, w, None, [a], [b], [], [0]), "scalings"),
        (lambda x, w, a, b: OPS.experts_few_rows(x, None, w, x, [a], [b], [1.0], [0]), "bias"),
        (
            lambda x, w, a, b: OPS.experts_few_rows(
                x, torch.tensor([1]), w, None, [a], [b], [1.0], [0]
            ),
            "of tokens below 1",
        ),
        (
            lambda x, w, a, b: OPS.experts_copy(a.view(1, 24, -1), b, torch.tensor([6]), EXPERTS),
            "below",
        ),
        (lambda x, w, a, b: OPS.experts_copy(a.view(1, 24, -1), b, torch.tensor([0]), 5), "lora_b"),
        (lambda x, w, a, b: OPS.experts_copy(b, b, torch.tensor([0]), EXPERTS), "pool"),
    ],
)
def test_operands_that_do_not_fit_are_refused(call, message):
    x, weight = torch.ones(1, 40, dtype=BF16), torch.ones(EXPERTS, 24, 40, dtype=BF16)
    factors = torch.ones(EXPERTS * 2, 40), torch.ones(24, 2 * EXPERTS)
    with pytest.raises((RuntimeError, IndexError), match=message):
        call(x, weight, *factors)


def product_and_gradients(**changes):
    """Both ops of a projection by kernels, which the library computes without them; rank 3."""
    ones = partial(torch.ones, dtype=BF16)
    factors = {"lora_a": ones(EXPERTS, 8, 40), "lora_b": ones(EXPERTS, 24, 8), "rank": 3}
    call = factors | {
        "weight": ones(EXPERTS, 24, 40),
        "scaling": 0.5,
        "offs": torch.full((EXPERTS,), 2, dtype=torch.int32),
        "x_rows": torch.tensor([0, 1, 0], dtype=torch.int32),
        "mask_rows": None,
        "dropout_p": 0.0,
        "seed": None,
        "first": 0,
        "workspace": None,
        "adapters": 1,
        "tables": None,
    }
    forward = call | {"x": ones(2, 40), "bias": None, "y": None, "t": None}
    own = {"grad": ones(3, 24), "s": torch.ones(3, 3), "wanted": [True] * 3, "slots": None}
    backward = call | own | {"x": ones(2, 40), "weights": None, "grad_rows": None, "dx": None}
    calls = (OPS.experts_product, forward), (OPS.experts_product_backward, backward)
    of_forward, of_backward = (op(**args | pick(changes, args)) for op, args in calls)
    return *of_forward, *of_backward


def pick(changes: dict, call: dict) -> dict:
    return {name: value for name, value in changes.items() if name in call}


ONE_EXPERT = torch.ones(1, 24, 40, dtype=BF16)
LAST_EXPERT = {"weight": ONE_EXPERT, "first": 5, "workspace": torch.ones(0, dtype=torch.uint8)}
LAST_EXPERT |= {"y": torch.ones(3, 24, dtype=BF16), "dx": torch.ones(3, 40, dtype=BF16)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(EXPERTS, 24, 40)}, "bfloat16 or float16, but got Float"),
        ({"weight": torch.ones(EXPERTS, 48, 80, dtype=BF16)[:, ::2, ::2]}, "unit stride along"),
        ({"x": torch.ones(2, 41, dtype=BF16)}, "x of shape .rows, 40."),
        ({"lora_a": torch.ones(EXPERTS, 12, 40, dtype=BF16)}, "pools of halves, .6, 8, 40. in"),
        ({"lora_b": torch.ones(EXPERTS, 24, 16, dtype=BF16)}, "pools of halves, .6, 24, 8. in"),
        ({"rank": 0}, "a rank from 1 to 512"),
        ({"offs": torch.zeros(EXPERTS)}, "offs of int32 and shape .6."),
        ({"x_rows": torch.zeros(3).long()}, "x_rows of int32 and shape .3."),
        ({"x": torch.ones(4, 40, dtype=BF16)}, "no more rows of x than of x_rows, 3, but got 4"),
        ({"dropout_p": 0.5}, "a seed and mask_rows beside dropout"),
        ({"bias": torch.ones(24, dtype=BF16)}, "a bias of shape .6, 24."),
        ({"grad": torch.ones(3, 23, dtype=BF16)}, "grad of shape .rows, 24."),
        (
            {"grad": torch.ones(4, 24, dtype=BF16), "grad_rows": torch.zeros(3).int()},
            "no more rows of grad than of grad_rows, 3, but got 4",
        ),
        ({"s": torch.ones(2, 3)}, "x_rows of int32 and shape .2."),
        ({"s": torch.ones(3, 2)}, "contiguous s of shape .rows, 3."),
        ({"weights": torch.ones(3).double()}, "weights of float32 or BFloat16, one for each of"),
        ({"slots": torch.zeros(3).long()}, "slots of int32 and shape .3."),
        ({"tables": torch.ones(9000)}, "the tables of experts_routes for 3 rows and 6 experts"),
        (
            {"t": torch.ones(3, 8, dtype=BF16)},
            "tables beside t, and a contiguous t of shape .3, 8.",
        ),
        ({"weight": torch.ones(7, 24, 40, dtype=BF16)}, "pools of all experts, .* 7 from 0 on"),
        ({"weight": ONE_EXPERT, "first": 6}, "pools of all experts, .* 1 from 6 on"),
        ({"adapters": 4}, "pools of all experts, .* for 4 groups of each expert"),
        ({"weight": ONE_EXPERT, "first": 1}, "contiguous result .3, 24. and the workspace"),
        (LAST_EXPERT | {"y": torch.ones(2, 24, dtype=BF16)}, "contiguous result .3, 24. and"),
        (LAST_EXPERT | {"workspace": torch.ones(0)}, "contiguous result .3, 24. and the workspace"),
        (LAST_EXPERT, "expected for further experts the (kernels|workspace) of the first"),
    ],
)
def test_operands_of_a_product_that_do_not_fit_are_refused(changes, message):
    y, s, _, dx, da, db, _ = product_and_gradients()
    assert y[0, 0] == 40 + 0.5 * 3 * 40 and not y[2].any() and s.shape == (3, 3)
    assert dx[1, 0] == 24 + 0.5 * 3 * 24 and da.shape == (18, 40) and db.shape == (24, 18)
    with pytest.raises((RuntimeError, TypeError), match=message):
        product_and_gradients(**changes)


@pytest.mark.parametrize("kind", ["plain", "norm"])
def test_the_same_bits_each_time(kind, two_threads):
    model, operands = accelerated(mixture(kind, dtype=BF16)), make_routes(128, 4, dtype=BF16)
    first, second = run(model, *operands), run(model, *operands)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["transposed, biases, interleaved", "norm"])
def test_numbers_of_no_expert_add_nothing(kind):
    """They are as slots of weight 0, whatever it is, and their weights have no gradient."""
    experts = Experts.of(make_experts(kind))
    sides = [(16, 48), (24, 16)]
    factors = [torch.randn(EXPERTS * 2, n, dtype=F64) for n, _ in sides]
    factors += [torch.randn(m, EXPERTS * 2, dtype=F64) for _, m in sides]
    x, index, weights = make_routes(7)
    absent = torch.zeros_like(index, dtype=torch.bool)
    absent[0, 1] = absent[3] = absent[5, 0] = True

    def step(index: Tensor, weights: Tensor) -> list[Tensor]:
        a1, a2, b1, b2 = leaves = [f.clone().requires_grad_() for f in factors]
        inputs = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        up, down = ExpertsAdapter(a1, b1, 0.5), ExpertsAdapter(a2, b2, 2.0)
        y = lora_experts(experts, inputs[0], index, inputs[1], [up], [down])
        return [y.detach(), *torch.autograd.grad(y, [*inputs, *leaves], torch.ones_like(y))]

    nobody = torch.tensor([EXPERTS, -1, -(2**63), 2**63 - 1]).repeat(4)
    unknown = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=F64).repeat(4)
    found = step(index.masked_scatter(absent, nobody), weights.masked_scatter(absent, unknown))
    exact = step(index, weights.masked_fill(absent, 0.0))
    exact[2] = exact[2].masked_fill(absent, 0.0)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert float(found[0][3].abs().max()) == 0.0
