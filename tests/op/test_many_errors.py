"""What calls of many adapters refuse, and in which words."""

import op_calls
import pytest
import torch
from helpers import BF16, F32, F64
from many_helpers import make_many

import lora_ext

INT = torch.int32


def good(name="lora_linear", **changes):
    """Arguments of a call that works: 12 rows, 3 adapters, K = 16, N = 24."""
    given = F32 if name == "lora_update" else None
    return make_many((3, 4), 16, 24, (2, 3, 5), given=given).arguments | changes


GOOD = good()


def index(*values):
    return {"index": torch.tensor(values, dtype=INT)}


def offs(*ends):
    return {"index": None, "offs": torch.tensor(ends, dtype=INT)}


def pool(*ranks, **changes):
    a, b = torch.zeros(3, 5, 16), torch.zeros(3, 24, 5)
    return {"lora_a": a, "lora_b": b, "ranks": torch.tensor(ranks, dtype=INT)} | changes


def a_of(*shape, **options):
    """With another factor of the second adapter."""
    return {"lora_a": [GOOD["lora_a"][0], torch.zeros(shape, **options), GOOD["lora_a"][2]]}


def b_of(i, tensor):
    return {"lora_b": [*GOOD["lora_b"][:i], tensor, *GOOD["lora_b"][i + 1 :]]}


# Error -> case -> what the message says was expected, and the changes.
REFUSED = {
    TypeError: {
        "index of int64": (
            "index of dtype int32, but got Long.*to.torch.int32",
            {"index": GOOD["index"].long()},
        ),
        "offs of int64": ("offs of dtype int32", {"index": None, "offs": torch.tensor([1, 2, 3])}),
        "ranks of int64": ("ranks of dtype int32", pool(ranks=torch.ones(3, dtype=torch.int64))),
        "no tensor": (r"lora_b\[1\] to be a tensor, but got str", b_of(1, "x")),
        "a factor of another dtype": (
            r"lora_b\[2\] of lora_a\[0\]'s dtype",
            b_of(2, torch.zeros(24, 5, dtype=F64)),
        ),
        "half factors": ("lora_a of x's dtype", {"lora_a": [a.half() for a in GOOD["lora_a"]]}),
        "scaling of float64": ("scaling of dtype float32", {"scaling": GOOD["scaling"].double()}),
        "scaling that is no number": ("scaling to be a number, a sequence", {"scaling": "large"}),
        "x of int": ("x of dtype float64", {"x": torch.ones(3, 4, 16, dtype=INT)}),
        "no tensor x": ("x to be a tensor, but got list", {"x": [1.0]}),
    },
    IndexError: {
        "index too large": (
            r"an index from -1 \(no adapter\) to 2, but got 3 for row 5",
            index(*[0] * 5, 3, *[0] * 6),
        ),
        "index below -1": (".*but got -2 for row 0", index(*[-2] * 12)),
        "offs that descend": (
            "offs that ascend from 0 to at most the 12 rows, but got 3 at 1",
            offs(5, 3, 9),
        ),
        "offs beyond the rows": (".*but got 13 at 2", offs(5, 6, 13)),
        "offs below 0": (".*but got -1 at 0", offs(-1, 6, 12)),
        "ranks too large": ("ranks from 0 to 5, but got 6 at 1", pool(1, 6, 2)),
    },
    RuntimeError: {
        "scaling that requires grad": (
            "a scaling without gradient.*multiply lora_b by it",
            {"scaling": torch.ones(3, requires_grad=True)},
        ),
        "numbers that require grad": (
            "a scaling without gradient",
            {"scaling": [1.0, torch.ones((), requires_grad=True), 2.0]},
        ),
        "index too short": (
            r".*one element for each of the 12 rows of x \[3, 4, 16\], but got \[3\]",
            index(0, 0, 0),
        ),
        "index and offs": (".*but got both", {**offs(1, 2, 3), "index": GOOD["index"]}),
        "ranks alone": (".*but got neither", pool(5, 0, 2, index=None)),
        "offs too short": (
            r"offs of shape \[3\], one for each adapter, but got \[2\]",
            offs(1, 2),
        ),
        "ranks with a list": ("ranks with a pool alone", {"ranks": torch.ones(3, dtype=INT)}),
        "ranks too short": (r"ranks of shape \[3\]", pool(1, 1)),
        "a matrix for a pool": (
            "lora_a of many adapters as a list of matrices or a pool of 3 dimensions, but got",
            {"lora_a": torch.zeros(5, 16)},
        ),
        "pools that differ": (
            r"a pool lora_b of shape \[3, 24, 5\]",
            pool(5, 0, 2, lora_b=torch.zeros(4, 24, 5)),
        ),
        "no adapter": ("at least one adapter", {"lora_a": [], "lora_b": [], "scaling": 1.0}),
        "fewer lora_b": (
            "as many lora_b as lora_a, 3, but got 2",
            {"lora_b": GOOD["lora_b"][:2]},
        ),
        "a factor of 1 dimension": (r"lora_a\[1\] of 2 dimensions", a_of(16)),
        "a factor of other in_features": (
            r"lora_a\[1\] of shape \[rank, 16\].*, but got \[3, 15\]",
            a_of(3, 15),
        ),
        "a factor of another rank": (
            r"lora_b\[.\] of shape \[24, .\]|y of shape \[3, 4, 25\]",
            b_of(1, torch.zeros(24, 4)),
        ),
        "rank 0": ("a rank from 1 to 512, but got rank 0.*index -1", a_of(0, 16)),
        "rank 513": ("a rank from 1 to 512, but got rank 513", a_of(513, 16)),
        "other out_features": (
            r"lora_b\[.\] of shape \[24, .\]|y of shape \[3, 4, 25\]",
            {"lora_b": [torch.zeros(25, len(a)) for a in GOOD["lora_a"]]},
        ),
        "factors on another device": (r"lora_a\[1\] on x's device", a_of(3, 16, device="meta")),
        "index on another device": ("index on x's device", {"index": GOOD["index"].to("meta")}),
        "scaling too short": (r"scaling of shape \[3\]", {"scaling": [1.0, 2.0]}),
        "x of other in_features": (r"x of shape \[..., 16\]", {"x": torch.zeros(3, 4, 15)}),
        "a scalar x": (".*but got a 0-d tensor", {"x": torch.tensor(1.0)}),
        "dropout_p of 1": ("dropout_p in", {"dropout_p": 1.0}),
    },
}


@pytest.mark.parametrize("name", ["lora_linear", "lora_update"])
@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        pytest.param(error, *found, id=case)
        for error, cases in REFUSED.items()
        for case, found in cases.items()
    ],
)
def test_refuses(name, error, words, changes):
    if name == "lora_update" and "out_features" in words:
        words = words.replace(r"lora_b\[.\] of shape \[24, .\]", r"y of shape \[3, 4, 25\]")
    with pytest.raises(error, match=rf"lora_ext\.{name}: expected {words}"):
        getattr(lora_ext, name)(**good(name, **changes))


def test_the_reference_refuses_a_scaling_for_some_adapters():
    many = good(scaling=[2.0])
    with pytest.raises(RuntimeError, match="one for each of 3 adapters, but got 1"):
        lora_ext.reference.lora_linear_reference(**many)


def test_the_good_case_is_good():
    lora_ext.lora_linear(**good())
    lora_ext.lora_linear(**good(**pool(5, 0, 2)))
    lora_ext.lora_linear(**good(**offs(0, 3, 12)))


def test_a_list_without_an_index_says_what_is_missing():
    arguments = good()
    del arguments["index"]
    with pytest.raises(TypeError, match="many adapters need index or offs"):
        lora_ext.lora_linear(**arguments)


@pytest.mark.parametrize(
    ("name", "which"), [("lora_linear", "x"), ("lora_update", "x"), ("lora_update", "y")]
)
def test_nested_tensors(name, which):
    rows = [torch.randn(2, 16), torch.randn(3, 16)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    with pytest.raises(TypeError, match=f"expected a dense {which}, but got a nested one"):
        getattr(lora_ext, name)(**good(name, **{which: nested}))


def test_a_trained_weight():
    arguments = good()
    arguments["weight"].requires_grad_()
    with pytest.raises(RuntimeError, match="expected a frozen weight"):
        lora_ext.lora_linear(**arguments)
    with torch.no_grad():
        lora_ext.lora_linear(**arguments)


def test_a_backward_wants_a_wish_for_each_factor():
    many = make_many(6, 16, 24, (2, 3), bias=False)
    groups = (many.scaling, many.index)
    operands = (many.x, many.weight, many.lora_a, many.lora_b)
    _, s = op_calls.lora_linear_grouped_forward(*operands, groups)
    with pytest.raises(
        RuntimeError,
        match="gradient of each of the 2 factors, but got 1 and 2",
    ):
        wanted = ([True, False], [True], [True, True])
        op_calls.lora_linear_grouped_backward(many.grad, *operands, s, groups, wanted)
    with pytest.raises(RuntimeError, match=r"expected s of shape \[6, 3\], but got \[6, 2\]"):
        wanted = ([True, False], [True] * 2, [True] * 2)
        op_calls.lora_linear_grouped_backward(many.grad, *operands, s[:, :2], groups, wanted)


@pytest.mark.parametrize(
    ("adapters", "said"),
    [((0, 0), "at least one adapter"), ((1, 2), "as many lora_b as lora_a"), ((2, 2), "neither")],
)
def test_the_op_itself_refuses_lists_without_rows(adapters, said):
    many = make_many(6, 16, 24, (2, 2), bias=False)
    lists = (factors[:n] for factors, n in zip((many.lora_a, many.lora_b), adapters, strict=True))
    with pytest.raises(RuntimeError, match=said):
        op_calls.lora_linear_grouped(many.x, many.weight, *lists, (many.scaling,))


def test_more_rows_than_an_int32_counts():
    x = torch.empty(2**31, 16, device="meta", dtype=BF16)
    factors = (
        [torch.empty(2, 16, device="meta", dtype=BF16)],
        [torch.empty(8, 2, device="meta", dtype=BF16)],
    )
    index = torch.empty(2**31, dtype=INT, device="meta")
    weight = torch.empty(8, 16, device="meta", dtype=BF16)
    with pytest.raises(RuntimeError, match=r"expected at most 2\^31 - 1 rows"):
        lora_ext.lora_linear(x, weight, *factors, None, 1.0, index=index)
    y = lora_ext.lora_linear(x[1:], weight, *factors, None, 1.0, index=index[1:])
    assert y.shape == (2**31 - 1, 8)
    assert y.dtype == BF16 != F32
