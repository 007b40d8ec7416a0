"""Layers of experts, dense and quantised, with the adapters of all tokens or of each, against a
loop over tokens in float64."""

import copy
from dataclasses import replace

import pytest
import torch
from expert_cases import BOTH, FOUR, Case, assert_at_most_twice, some_index, some_own
from expert_helpers import EXPERTS, KINDS, assert_close, by_tokens, make_experts
from helpers import BF16, F16, F32, F64, pair_id
from hypothesis import example, given, settings
from hypothesis import strategies as st
from quantised_experts import FOUR_BITS, two_experts
from torch import Tensor
from torchao_experts import STAND_INS

from lora_ext.experts import Experts, explained, lora_experts, projection

NO_EXPERT = (-1, -(2**63), 2**63 - 1, (2**64 + 4) // 5)  # the last times 5 kinds of rows is 4

WIDE, SINGLE = (F64, F64), (F32, F32)
FEW, MANY = some_index(7), some_index(64)
BY_ROW = {"index": MANY, "own": some_own(64), "ranks": FOUR}
NAMED = [
    Case(own=()),
    *(Case(pair=pair) for pair in (WIDE, SINGLE)),  # no tokens
    *(Case(kind, index=FEW) for kind in KINDS),
    *(Case(kind, is_small=True, index=MANY) for kind in KINDS),
    *(Case(kind, is_small=True, **BY_ROW) for kind in KINDS),
    *(
        Case(kind, pair=SINGLE, panels=panels, dropout=dropout, **BY_ROW)
        for kind in KINDS
        for panels, dropout in (("none", 0.1), ("float32", 0.0))
    ),
    Case(index=((2,),) * 5),
    Case(index=((0, 1, 2, 3, 4, 5),) * 5, is_small=True),
    Case(index=((5, 0), (0, 5), (5, 0))),
    Case(index=((3, 3), (1, 1))),
    # A group ends within a block of experts, and one goes across its end.
    Case(index=((0, 2),) * 8 + ((1, 3),) * 3, own=some_own(11), ranks=FOUR, is_small=True),
    Case(index=(NO_EXPERT[:2], (0, 1), NO_EXPERT[2:]), own=(0, 1, 2), ranks=FOUR),
    *(Case(kind, index=((0, 6), (6, 6), (1, 0)), is_odd=True) for kind in ("plain", "norm")),
    Case(index=FEW, own=some_own(7), ranks=((0, 0),) * 4),  # the base
    Case(index=FEW, own=some_own(7), ranks=((3, 0),) * 4),
    *(Case(index=FEW, dropout=p) for p in (0.05, 1 / 65536, 1 - 2.0**-20)),
    *(Case(index=MANY, own=own, ranks=FOUR, dropout=0.4) for own in (None, some_own(64))),
    *(Case(form=form, pair=SINGLE, panels="none", **BY_ROW) for form in FOUR_BITS),
    *(
        Case("norm", form, SINGLE, FEW, dropout=0.3, panels="none")
        for form in (*FOUR_BITS, *STAND_INS)
    ),
    # dw cancels.
    Case(
        "transposed, biases, interleaved",
        "stand-in",
        SINGLE,
        ((7,),),
        ranks=((3, 0), (2, 2), (0, 2)),
        count=8,
        wants="xw",
    ),
    *(Case(index=MANY, wants=wants, own=some_own(64), ranks=FOUR) for wants in "xwab"),
]


@st.composite
def cases(draw) -> Case:
    experts, tokens = draw(st.integers(2, 9)), draw(st.integers(0, 12))
    slots = draw(st.integers(1, experts))
    number = st.one_of(st.integers(0, experts - 1), st.sampled_from([experts, *NO_EXPERT]))
    index = st.lists(st.tuples(*[number] * slots), min_size=tokens, max_size=tokens).map(tuple)
    ranks = draw(st.lists(st.tuples(*[st.integers(0, 3)] * 2), max_size=4).map(tuple))
    own = st.lists(st.integers(-1, len(ranks) - 1), min_size=tokens, max_size=tokens).map(tuple)
    form = draw(st.sampled_from(["dense"] * 3 + [*FOUR_BITS, *STAND_INS]))
    return Case(
        draw(st.sampled_from(list(KINDS))),
        form,
        draw(st.sampled_from([WIDE, SINGLE])) if form == "dense" else SINGLE,
        draw(index),
        draw(st.none() | own) if ranks else None,
        ranks,
        draw(st.sampled_from([0.0, 0.3])),
        experts,
        draw(st.booleans()),
        draw(st.sampled_from(["auto", "none", "float32"])),
        draw(st.booleans()),
        "".join(draw(st.sets(st.sampled_from("xwab"), min_size=1))),
    )


def with_examples(test):
    for case in NAMED:
        test = example(case)(test)
    return test


@with_examples
@settings(max_examples=60, deadline=None)
@given(cases())
def test_a_layer_is_that_of_a_loop_over_tokens(case):
    """Quantised experts have the bits of the same experts dense, unless panels are chosen by the
    rows of a group, which are then those of one expert."""
    torch.manual_seed(0)
    dense = packed = make_experts(case.kind, case.count).to(case.pair[0])
    if case.form != "dense":
        packed, dense = two_experts(case.kind, case.form, F32, case.count)
    found = case.step(lora_experts, Experts.of(packed))
    if packed is not dense and case.panels == "none":
        same = case.step(lora_experts, Experts.of(dense))
        assert all(torch.equal(found[name], value) for name, value in same.items())
    exact = case.step(by_tokens, Experts.of(copy.deepcopy(dense).double()))
    # A float32 gate rounds itself.
    tolerance = 2e-5 if case.pair == SINGLE else 1e-6 if case.kind == "float32 gate" else 1e-11
    # dw is dy times a slot's output, here of y's size, which may cancel: of two norms of 8 and 15
    # 0.14 was left.
    *_, dy = case.made(Experts.of(dense))
    norms = (dy.double().norm(dim=1) * exact["y"].norm(dim=1)).tolist()
    assert_close(found, exact, tolerance, {"w": max(norms, default=0.0)})


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("own", [None, (0,) * 64], ids=["all", "by row"])
@pytest.mark.parametrize("pair", [WIDE, SINGLE, (BF16, BF16), (BF16, F64)], ids=pair_id)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_explain_names_the_way_that_runs(pair, own, tokens, dropout, isa, monkeypatch):
    own, ran, told = own and own[:tokens], [], []
    case = Case("plain", "dense", pair, some_index(tokens), own, BOTH, dropout)

    def noted(way):
        return lambda *call: (found := way.forward(*call)) and (ran.append(way.name) or found)

    ways = [way._replace(forward=noted(way)) for way in projection.WAYS]
    monkeypatch.setattr(projection, "WAYS", ways)

    def both(experts, x, index, weights, up, down, own):
        told.extend(
            explained(experts, up, down, own is not None).split(" where rows are few, else ")
        )
        return lora_experts(experts, x, index, weights, up, down, own)

    case.step(both)
    assert ran == [told[-(tokens > 1)]] * 2
    assert (len(told) > 1) == (
        BF16 in pair and F64 not in pair and not dropout and isa != "library"
    )


def assert_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


PAIRS = [WIDE, SINGLE, (BF16, BF16), (F16, F32)]


@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("pair", PAIRS, ids=pair_id)
def test_one_adapter_of_all_tokens_has_its_bits_alone(pair, tokens):
    case = Case(pair=pair, index=some_index(tokens), ranks=((3, 3),))
    assert_bits(replace(case, own=(0,) * tokens).step(lora_experts), case.step(lora_experts))


@pytest.mark.parametrize("kind", ["plain", "norm"])
@pytest.mark.parametrize("own", [None, BY_ROW["own"]], ids=["all", "by row"])
def test_the_same_bits_each_time(own, kind, two_threads):
    case = replace(Case(kind, pair=(BF16, BF16), dropout=0.1, **BY_ROW), own=own)
    assert_bits(case.step(lora_experts), case.step(lora_experts))


@pytest.mark.parametrize("default", ["meta", "cuda"])
@pytest.mark.parametrize("is_by_row", [False, True])
@pytest.mark.parametrize(("pair", "tokens"), [(WIDE, 40), ((BF16, BF16), 40), ((BF16, BF16), 1)])
def test_another_default_device(pair, tokens, is_by_row, default):
    """On which nothing of the call is made."""
    own = some_own(tokens) if is_by_row else None
    case = Case("plain", "dense", pair, some_index(tokens), own, FOUR, 0.1 * (tokens > 1))
    assert_bits(replace(case, default=default).step(lora_experts), case.step(lora_experts))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_scalings_in_tensors_of_halves(dropout):
    """Are as numbers, to their rounding."""
    case = Case("plain", "dense", (BF16, BF16), FEW, some_own(7), FOUR, dropout)
    wanted = {name: value.double() for name, value in case.step(lora_experts).items()}
    assert_close(replace(case, is_odd=True).step(lora_experts), wanted, 2e-2)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(
    "pair", [*PAIRS[1:], (BF16, F32), (F16, F16), (BF16, BF16, F32)], ids=pair_id
)
def test_errors_are_at_most_twice_those_alone(pair, tokens):
    """The last pair has adapters of two dtypes in one batch. The gate is smooth: at a clamp's edge
    a rounding of z decides about a gradient."""
    case = Case("plain", "dense", pair, some_index(tokens), some_own(tokens), FOUR)
    exact, found = case.exact(), case.step(lora_experts)
    alone = {name: torch.zeros_like(value) for name, value in found.items()}
    for adapter in set(case.own):  # of all tokens, and the others have no expert
        pairs = zip(case.index, case.own, strict=True)
        index = tuple(row if own == adapter else (EXPERTS,) * len(row) for row, own in pairs)
        for name, value in (
            replace(case, index=index, own=(adapter,) * tokens).step(lora_experts).items()
        ):
            alone[name] += value
    assert_at_most_twice(found, alone, exact)


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
    def layer_of(*operands):
        *others, own = operands
        return lora_experts(*others, change(own))

    with pytest.raises(error, match=message):
        Case(index=FEW, own=some_own(7), ranks=FOUR).step(layer_of)


def test_other_numbers_of_adapters_are_refused():
    def layer_of(*operands):
        *others, down, own = operands
        return lora_experts(*others, down[:3], own)

    with pytest.raises(ValueError, match=r"the same adapters in up and down .* got 4 and 3"):
        Case(index=FEW, own=some_own(7), ranks=FOUR).step(layer_of)
