"""Layers of experts beside PEFT's own forward, and the ops of projections."""

from functools import partial

import pytest
import torch
from expert_helpers import EXPERTS, assert_close, make_routes, mixture, run
from helpers import BF16, F16, F32, F64, pair_id, short
from peft_helpers import accelerated, exact_model, reasons
from torch import Tensor, nn

from lora_ext import _C
from lora_ext.experts import (
    expert_groups,
    few_rows,
)
from lora_ext.experts.expert_groups import Rows
from lora_ext.experts.operands import Gradient, Projection
from lora_ext.experts.projection import backward
from lora_ext.experts.routing import Routes

TWO = {"x": {"r": 3, "lora_alpha": 5}, "y": {"r": 2, "lora_alpha": -3}}


def assert_as_peft(model, *operands) -> None:
    fast = accelerated(model)
    assert {path for path, _ in reasons(fast)} == {"fused"}
    assert_close(run(fast, *operands), run(model, *operands), 1e-11)


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


@pytest.mark.parametrize("dtype", [F32, BF16], ids=short)
def test_slots_of_no_expert_have_no_gradient(device, dtype, deterministic):
    """Their rows are not written, and memory that nobody writes is NaN; as slots of weight 0."""
    model = accelerated(mixture(dtype=dtype)).to(device)
    x, index, weights = (each.to(device) for each in make_routes(9, dtype=dtype))
    absent = torch.arange(18, device=device).view(9, 2) % 5 == 0
    found = run(model, x, index.masked_fill(absent, EXPERTS), weights)
    exact = run(model, x, index, weights.masked_fill(absent, 0))
    del found["dweights"], exact["dweights"]
    assert_close(found, {n: value.double() for n, value in exact.items()}, 4 * 2**-7)


# The adapter of each of eight rows, or -1; None: all rows have all.
OWN = [0, -1, 1, -1, 0, 0, 2, 1]


@pytest.mark.parametrize("threads", ["one_thread", "two_threads"])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("out_features", [25, 600])
@pytest.mark.parametrize("own", [None, OWN], ids=["all", "by row"])
@pytest.mark.parametrize("pair", [(BF16, BF16), (BF16, F32), (F16, BF16)], ids=pair_id)
def test_few_rows(
    pair, own, out_features, is_transposed, threads, deterministic, monkeypatch, request
):
    """Of one to five rows of an expert, with biases and three adapters, one of rank 0; rounded
    once. Memory that nobody writes is NaN."""
    request.getfixturevalue(threads)
    monkeypatch.setattr(few_rows, "MOST_OF_AN_EXPERT", 5)  # more than the kernel takes at a time
    weight = torch.randn(EXPERTS, out_features, 40).to(pair[0])
    if is_transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    bias, x = torch.randn(EXPERTS, out_features).to(pair[0]), torch.randn(4, 40).to(pair[0])
    ranks, scalings = (3, 2, 0), (0.5, -2.0, 1.0)
    lora_a = [torch.randn(EXPERTS * r, 40).to(pair[1]) for r in ranks]
    lora_b = [torch.randn(out_features, r * EXPERTS).to(pair[1]) for r in ranks]
    numbers, token = [1, 2, 2, 5, 5, 5, 5, 5], torch.tensor([3, 0, 1, 2, 2, 0, 1, 3])
    if own is not None:  # those of an expert are sorted by adapter
        order = sorted(range(8), key=lambda m: (numbers[m], own[m]))
        own = [own[m] for m in order]
    keys = torch.tensor([4 * e + a + 1 for e, a in zip(numbers, own or [2] * 8, strict=True)])
    ends = torch.searchsorted(keys, torch.arange(4 * EXPERTS), right=True).int()
    offs = ends.view(EXPERTS, 4)[:, -1].contiguous()
    routes = Routes(token, token, offs, None if own is None else ends)
    call = Projection(weight, bias, routes, lora_a, lora_b, scalings, is_first=True)
    rows = Rows(call, None)
    assert few_rows.takes(rows)
    y, s = few_rows.forward(x, rows)
    assert s.shape == (8, 5 if own is None else 3)
    half = torch.finfo(pair[0]).eps / 2
    for m, (e, t) in enumerate(zip(numbers, token.tolist(), strict=True)):
        exact = weight[e].double() @ x[t].double() + bias[e].double()
        low_rank = []
        for i in range(3) if own is None else [own[m]] * (own[m] >= 0):
            low_rank.append(lora_a[i].double().view(EXPERTS, ranks[i], 40)[e] @ x[t].double())
            matrix = lora_b[i].double().view(out_features, ranks[i], EXPERTS)[..., e]
            exact += scalings[i] * (matrix @ low_rank[-1])
        found = torch.cat([*low_rank, torch.empty(0, dtype=F64)])
        torch.testing.assert_close(s[m, : len(found)].double(), found, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(y[m].double(), exact, rtol=1.01 * half, atol=1e-4)


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
        gradient = Gradient(g, w, s.float(), want_x, [True] * 2, [True] * 2)
        found = backward(gradient, x, call)
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
        return few_rows.takes(Rows(call, None))

    assert takes(bounds, 3, weight)
    assert not takes([0, 1, 1, 1, 1, 6], 6, weight)
    assert not takes(bounds, 4, weight)  # one has no expert
    assert not takes(bounds, 3, weight.float())
    wide = [torch.ones(EXPERTS, 40, dtype=F64)], [torch.ones(24, EXPERTS)], (1.0,)
    assert not takes(bounds, 3, weight, *wide)


OPS = torch.ops.lora_ext


def few_rows_of(adapters, x, w, a, b):
    OPS.experts_few_rows(x, None, w, None, [a], [b], [1.0], [0], adapters)


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
        *(
            (partial(few_rows_of, adapters), message)
            for adapters, message in (([1], "from -1"), ([-2], "from -1"), ([0, 0], "one for each"))
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
        s = OPS.experts_linear(bias=None, y=y, **given)
        OPS.experts_linear_backward(y, s=s, dx=dx, dlora_a=[], dlora_b=[], **given)
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
        OPS.experts_linear_backward(torch.zeros(80, 49), **given, **to)
