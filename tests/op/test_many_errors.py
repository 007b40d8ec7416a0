"""What calls of many adapters refuse, and in which words."""

import op_calls
import pytest
import torch
from helpers import F32
from many_helpers import make_many
from test_errors import refused

import lora_ext

INT = torch.int32


def many(name="lora_linear", **changes):
    """Arguments of a call that works: 12 rows, 3 adapters, K = 16, N = 24."""
    given = F32 if name == "lora_update" else None
    return make_many((3, 4), 16, 24, (2, 3, 5), given=given).arguments | changes


MANY = many()
NESTED = torch.nested.nested_tensor([torch.ones(2, 16)] * 2, layout=torch.jagged)


def index(*values):
    return {"index": torch.tensor(values, dtype=INT)}


def offs(*ends):
    return {"index": None, "offs": torch.tensor(ends, dtype=INT)}


def pool(*ranks, **changes):
    a, b = torch.zeros(3, 5, 16), torch.zeros(3, 24, 5)
    return {"lora_a": a, "lora_b": b, "ranks": torch.tensor(ranks, dtype=INT)} | changes


def a_of(*shape, **options):
    """With another factor of the second adapter."""
    return {"lora_a": [MANY["lora_a"][0], torch.zeros(shape, **options), MANY["lora_a"][2]]}


def b_of(i, tensor):
    return {"lora_b": [*MANY["lora_b"][:i], tensor, *MANY["lora_b"][i + 1 :]]}


# Error -> case -> (what changes, words of the message).
OF_MANY = {
    TypeError: {
        "index of int64": ({"index": MANY["index"].long()}, ["index of dtype int32", "got Long"]),
        "offs of int64": (offs() | {"offs": torch.tensor([1, 2, 3])}, ["offs of dtype int32"]),
        "ranks of int64": (pool(ranks=torch.ones(3).long()), ["ranks of dtype int32"]),
        "no tensor": (b_of(1, "x"), ["lora_b[1] to be a tensor, but got str"]),
        "another dtype": (b_of(2, torch.zeros(24, 5).double()), ["lora_b[2] of lora_a[0]'s dtype"]),
        "half factors": ({"lora_a": [a.half() for a in MANY["lora_a"]]}, ["lora_a of x's dtype"]),
        "scaling of float64": ({"scaling": MANY["scaling"].double()}, ["of dtype float32"]),
        "scaling that is no number": ({"scaling": "large"}, ["scaling to be a number, a sequence"]),
        "x of int": ({"x": torch.ones(3, 4, 16, dtype=INT)}, ["x of dtype float64"]),
        "no tensor x": ({"x": [1.0]}, ["x to be a tensor, but got list"]),
        "a nested x": ({"x": NESTED}, ["expected a dense x, but got a nested one"]),
    },
    IndexError: {
        "index too large": (index(*[0] * 5, 3, *[0] * 6), ["from -1", "to 2, but got 3 for row 5"]),
        "index below -1": (index(*[-2] * 12), ["but got -2 for row 0"]),
        "offs that descend": (offs(5, 3, 9), ["ascend from 0", "the 12 rows, but got 3 at 1"]),
        "offs beyond the rows": (offs(5, 6, 13), ["but got 13 at 2"]),
        "offs below 0": (offs(-1, 6, 12), ["but got -1 at 0"]),
        "ranks too large": (pool(1, 6, 2), ["ranks from 0 to 5, but got 6 at 1"]),
    },
    RuntimeError: {
        "scaling that requires grad": (
            {"scaling": torch.ones(3, requires_grad=True)},
            ["a scaling without gradient", "multiply lora_b by it"],
        ),
        "numbers that require grad": (
            {"scaling": [1.0, torch.ones((), requires_grad=True), 2.0]},
            ["a scaling without gradient"],
        ),
        "index too short": (index(0, 0, 0), ["each of the 12 rows of x [3, 4, 16], but got [3]"]),
        "index and offs": ({**offs(1, 2, 3), "index": MANY["index"]}, ["but got both"]),
        "ranks alone": (pool(5, 0, 2, index=None), ["but got neither"]),
        "offs too short": (offs(1, 2), ["offs of shape [3], one for each adapter, but got [2]"]),
        "ranks with a list": ({"ranks": torch.ones(3, dtype=INT)}, ["ranks with a pool alone"]),
        "ranks too short": (pool(1, 1), ["ranks of shape [3]"]),
        "a matrix for a pool": ({"lora_a": torch.zeros(5, 16)}, ["matrices or a pool of 3 dim"]),
        "other pools": (pool(5, 0, 2, lora_b=torch.zeros(4, 24, 5)), ["pool lora_b", "[3, 24, 5]"]),
        "no adapter": ({"lora_a": [], "lora_b": [], "scaling": 1.0}, ["at least one adapter"]),
        "fewer lora_b": (
            {"lora_b": MANY["lora_b"][:2]},
            ["as many lora_b as lora_a, 3, but"],
        ),
        "a factor of 1 dimension": (a_of(16), ["lora_a[1] of 2 dimensions"]),
        "other in_features": (a_of(3, 15), ["lora_a[1] of shape [rank, 16]", "but got [3, 15]"]),
        "another rank": (b_of(1, torch.zeros(24, 4)), ["lora_b[1] of shape [24, 3]"]),
        "rank 0": (a_of(0, 16), ["a rank from 1 to 512, but got rank 0", "index -1"]),
        "rank 513": (a_of(513, 16), ["a rank from 1 to 512, but got rank 513"]),
        "factors on another device": (a_of(3, 16, device="meta"), ["lora_a[1] on x's device"]),
        "index on another device": ({"index": MANY["index"].to("meta")}, ["index on x's device"]),
        "scaling too short": ({"scaling": [1.0, 2.0]}, ["scaling of shape [3]"]),
        "x of other in_features": ({"x": torch.zeros(3, 4, 15)}, ["x of shape [..., 16]"]),
        "a scalar x": ({"x": torch.tensor(1.0)}, ["but got a 0-d tensor"]),
        "dropout_p of 1": ({"dropout_p": 1.0}, ["dropout_p in"]),
    },
}
# Which of the two the message names differs with the base.
OUT = {"lora_b": [torch.zeros(25, len(a)) for a in MANY["lora_a"]]}
TRAINED = {"weight": torch.zeros(24, 16, requires_grad=True)}


@pytest.mark.parametrize(
    ("name", "error", "changes", "words"),
    [
        *(
            pytest.param(name, error, *found, id=f"{name} {case}")
            for name in ("lora_linear", "lora_update")
            for error, cases in OF_MANY.items()
            for case, found in cases.items()
        ),
        ("lora_linear", RuntimeError, OUT, ["lora_b[0] of shape [24, 2]"]),
        ("lora_update", RuntimeError, OUT, ["y of shape [3, 4, 25]"]),
        ("lora_update", TypeError, {"y": NESTED}, ["expected a dense y, but got a nested one"]),
        ("lora_linear", RuntimeError, TRAINED, ["expected a frozen weight"]),
    ],
)
def test_what_many_adapters_refuse(name, error, changes, words):
    call = getattr(lora_ext, name)
    refused(error, f"lora_ext.{name}: ", *words, call=call, **many(name, **changes))


def test_more_of_many_adapters():
    """What is accepted; a list without rows; the reference."""
    for changes in ({}, pool(5, 0, 2), offs(0, 3, 12)):
        lora_ext.lora_linear(**many(**changes))
    with pytest.raises(TypeError, match="many adapters need index or offs"):
        lora_ext.lora_linear(**many(index=None))
    with pytest.raises(RuntimeError, match="one for each of 3 adapters, but got 1"):
        lora_ext.reference.lora_linear_reference(**many(scaling=[2.0]))


@pytest.mark.parametrize(
    ("adapters", "said"),
    [((0, 0), "at least one adapter"), ((1, 2), "as many lora_b as lora_a"), ((2, 2), "neither")],
)
def test_the_op_itself_refuses_lists_without_rows(adapters, said):
    x, weight, *lists = (MANY[name] for name in ("x", "weight", "lora_a", "lora_b"))
    lists = (factors[:n] for factors, n in zip(lists, adapters, strict=True))
    with pytest.raises(RuntimeError, match=said):
        op_calls.lora_linear_grouped(x, weight, *lists, (MANY["scaling"],))


def test_a_backward_wants_a_wish_for_each_factor():
    many = make_many(6, 16, 24, (2, 3), bias=False)
    groups = (many.scaling, many.index)
    operands = (many.x, many.weight, many.lora_a, many.lora_b)
    _, s = op_calls.lora_linear_grouped_forward(*operands, groups)
    wanted = ([True, False], [True] * 2, [True] * 2)
    for own, each, said in (
        (s, (wanted[0], [True], wanted[2]), "gradient of each of the 2 factors, but got 1 and 2"),
        (s[:, :2], wanted, r"expected s of shape \[6, 3\], but got \[6, 2\]"),
    ):
        with pytest.raises(RuntimeError, match=said):
            op_calls.lora_linear_grouped_backward(many.grad, *operands, own, groups, each)


def test_more_rows_than_an_int32_counts():
    x, weight, a, b = (
        torch.empty(sizes, device="meta") for sizes in ((2**31, 16), (8, 16), (2, 16), (8, 2))
    )
    index = torch.empty(2**31, dtype=INT, device="meta")
    with pytest.raises(RuntimeError, match=r"expected at most 2\^31 - 1 rows"):
        lora_ext.lora_linear(x, weight, [a], [b], index=index)
    y = lora_ext.lora_linear(x[1:], weight, [a], [b], index=index[1:])
    assert y.shape == (2**31 - 1, 8)
