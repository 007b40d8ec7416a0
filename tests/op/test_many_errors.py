"""What calls of many adapters refuse, and in which words."""

import pytest
import torch
from helpers import BF16, F32, F64
from many_helpers import OPS, make_many

import lora_ext

INT = torch.int32


def good(**changes):
    """Arguments of a call that works: 12 rows, 3 adapters, K = 16, N = 24."""
    many = make_many((3, 4), 16, 24, (2, 3, 5))
    arguments = {
        "x": many.x,
        "weight": many.weight,
        "lora_a": many.lora_a,
        "lora_b": many.lora_b,
        "bias": many.bias,
        "scaling": many.scaling,
        "index": many.index,
    }
    return arguments | changes


def offs(*ends):
    return {"index": None, "offs": torch.tensor(ends, dtype=INT)}


def pool(**changes):
    a, b = torch.randn(3, 5, 16), torch.randn(3, 24, 5)
    return {"lora_a": a, "lora_b": b, "ranks": torch.tensor([5, 0, 2], dtype=INT)} | changes


def changed(name, i, tensor):
    factors = list(good()[name])
    factors[i] = tensor
    return {name: factors}


CASES = {
    "index of int64": (
        TypeError,
        "expected index of dtype int32, but got Long.*to.torch.int32",
        lambda: {"index": good()["index"].long()},
    ),
    "index too short": (
        RuntimeError,
        r"one element for each of the 12 rows of x \[3, 4, 16\], but got \[3\]",
        lambda: {"index": torch.zeros(3, dtype=INT)},
    ),
    "index too large": (
        IndexError,
        r"expected an index from -1 \(no adapter\) to 2, but got 3 for row 5",
        lambda: {"index": torch.tensor([0] * 5 + [3] + [0] * 6, dtype=INT)},
    ),
    "index below -1": (
        IndexError,
        "but got -2 for row 0",
        lambda: {"index": torch.full((12,), -2, dtype=INT)},
    ),
    "index and offs": (
        RuntimeError,
        "but got both",
        lambda: offs(1, 2, 3) | {"index": good()["index"]},
    ),
    "ranks alone": (RuntimeError, "but got neither", lambda: {"index": None, **pool()}),
    "offs of int64": (
        TypeError,
        "expected offs of dtype int32",
        lambda: {"index": None, "offs": torch.tensor([1, 2, 3])},
    ),
    "offs too short": (
        RuntimeError,
        r"expected offs of shape \[3\], one for each adapter, but got \[2\]",
        lambda: offs(1, 2),
    ),
    "offs that descend": (
        IndexError,
        "expected offs that ascend from 0 to at most the 12 rows, but got 3 at 1",
        lambda: offs(5, 3, 9),
    ),
    "offs beyond the rows": (IndexError, "but got 13 at 2", lambda: offs(5, 6, 13)),
    "offs below 0": (IndexError, "but got -1 at 0", lambda: offs(-1, 6, 12)),
    "ranks with a list": (
        RuntimeError,
        "expected ranks with a pool alone",
        lambda: {"ranks": torch.ones(3, dtype=INT)},
    ),
    "ranks of int64": (
        TypeError,
        "expected ranks of dtype int32",
        lambda: pool(ranks=torch.ones(3, dtype=torch.int64)),
    ),
    "ranks too large": (
        IndexError,
        "expected ranks from 0 to 5, but got 6 at 1",
        lambda: pool(ranks=torch.tensor([1, 6, 2], dtype=INT)),
    ),
    "ranks too short": (
        RuntimeError,
        r"expected ranks of shape \[3\]",
        lambda: pool(ranks=torch.ones(2, dtype=INT)),
    ),
    "a matrix for a pool": (
        RuntimeError,
        "as a list of matrices or a pool of 3 dimensions, but got a tensor of shape",
        lambda: {"lora_a": torch.randn(5, 16)},
    ),
    "pools that differ": (
        RuntimeError,
        r"expected a pool lora_b of shape \[3, out_features, 5\]",
        lambda: pool(lora_b=torch.randn(4, 24, 5)),
    ),
    "no adapter": (
        RuntimeError,
        "expected at least one adapter",
        lambda: {"lora_a": [], "lora_b": [], "scaling": 1.0},
    ),
    "fewer lora_b": (
        RuntimeError,
        "expected as many lora_b as lora_a, 3, but got 2",
        lambda: {"lora_b": good()["lora_b"][:2]},
    ),
    "no tensor": (
        TypeError,
        r"expected lora_b\[1\] to be a tensor, but got str",
        lambda: changed("lora_b", 1, "x"),
    ),
    "a factor of 1 dimension": (
        RuntimeError,
        r"expected lora_a\[1\] of 2 dimensions",
        lambda: changed("lora_a", 1, torch.randn(16)),
    ),
    "a factor of another dtype": (
        TypeError,
        r"expected lora_b\[2\] of lora_a\[0\]'s dtype",
        lambda: changed("lora_b", 2, torch.randn(24, 5, dtype=F64)),
    ),
    "a factor of other in_features": (
        RuntimeError,
        r"expected lora_a\[1\] of shape \[rank, 16\], but got \[3, 15\]",
        lambda: changed("lora_a", 1, torch.randn(3, 15)),
    ),
    "a factor of another rank": (
        RuntimeError,
        r"expected lora_b\[1\] of shape \[24, 3\]",
        lambda: changed("lora_b", 1, torch.randn(24, 4)),
    ),
    "rank 0": (
        RuntimeError,
        "expected a rank from 1 to 512, but got rank 0.*index -1",
        lambda: changed("lora_a", 1, torch.randn(0, 16)),
    ),
    "rank 513": (
        RuntimeError,
        "expected a rank from 1 to 512, but got rank 513",
        lambda: changed("lora_a", 1, torch.randn(513, 16)),
    ),
    "other out_features": (
        RuntimeError,
        "expected lora_b with 24 out_features",
        lambda: {"lora_b": [torch.randn(25, len(a)) for a in good()["lora_a"]]},
    ),
    "factors on another device": (
        RuntimeError,
        r"expected lora_a\[1\] on x's device",
        lambda: changed("lora_a", 1, torch.randn(3, 16, device="meta")),
    ),
    "index on another device": (
        RuntimeError,
        "expected index on x's device",
        lambda: {"index": good()["index"].to("meta")},
    ),
    "half factors": (
        TypeError,
        "expected lora_a of x's dtype",
        lambda: {"lora_a": [a.half() for a in good()["lora_a"]]},
    ),
    "scaling of float64": (
        TypeError,
        "expected scaling of dtype float32",
        lambda: {"scaling": good()["scaling"].double()},
    ),
    "scaling too short": (
        RuntimeError,
        r"expected scaling of shape \[3\]",
        lambda: {"scaling": [1.0, 2.0]},
    ),
    "scaling that is no number": (
        TypeError,
        "expected scaling to be a number, a sequence",
        lambda: {"scaling": "large"},
    ),
    "x of other in_features": (
        RuntimeError,
        r"expected x of shape \[..., 16\]",
        lambda: {"x": torch.randn(3, 4, 15)},
    ),
    "x of int": (
        TypeError,
        "expected x of dtype float64",
        lambda: {"x": torch.ones(3, 4, 16, dtype=INT)},
    ),
    "a scalar x": (RuntimeError, "but got a 0-d tensor", lambda: {"x": torch.tensor(1.0)}),
    "no tensor x": (TypeError, "expected x to be a tensor, but got list", lambda: {"x": [1.0]}),
    "dropout_p of 1": (RuntimeError, "expected dropout_p in", lambda: {"dropout_p": 1.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_refuses(name):
    error, words, changes = CASES[name]
    with pytest.raises(error, match=r"lora_ext\.lora_linear: .*" + words):
        lora_ext.lora_linear(**good(**changes()))


@pytest.mark.parametrize("name", CASES)
def test_lora_update_refuses(name):
    error, words, changes = CASES[name]
    arguments = good(**changes())
    if (
        "weight" in words
        or "out_features for" in words
        or name in ("other out_features", "dropout_p of 1")
    ):
        pytest.skip("of the weight, or said elsewhere")
    arguments |= {"y": torch.randn(3, 4, 24)}
    del arguments["weight"], arguments["bias"]
    words = words.replace(r"\[..., 16\]", r"\[..., 16\]")
    with pytest.raises(error, match=r"lora_ext\.lora_update: .*" + words):
        lora_ext.lora_update(**arguments)


def test_the_good_case_is_good():
    lora_ext.lora_linear(**good())
    lora_ext.lora_linear(**good(**pool()))
    lora_ext.lora_linear(**good(**offs(0, 3, 12)))


def test_a_list_without_an_index_says_what_is_missing():
    arguments = good()
    del arguments["index"]
    with pytest.raises(TypeError, match="many adapters need index or offs"):
        lora_ext.lora_linear(**arguments)


@pytest.mark.parametrize("which", ["x", "y"])
def test_nested_tensors(which):
    many = make_many((3, 4), 16, 24, (2, 3, 5))
    nested = torch.nested.nested_tensor(
        [torch.randn(2, 16), torch.randn(3, 16)], layout=torch.jagged
    )
    y = {"y": nested if which == "y" else many.x, "x": nested if which == "x" else many.x}
    factors = (many.lora_a, many.lora_b, many.scaling)
    with pytest.raises(TypeError, match=f"expected a dense {which}, but got a nested one"):
        lora_ext.lora_update(y["y"], y["x"], *factors, index=many.index)
    if which == "x":
        with pytest.raises(TypeError, match="expected a dense x, but got a nested one"):
            lora_ext.lora_linear(nested, many.weight, *factors[:2], None, 1.0, index=many.index)


def test_a_trained_weight():
    arguments = good()
    arguments["weight"].requires_grad_()
    with pytest.raises(RuntimeError, match="expected a frozen weight"):
        lora_ext.lora_linear(**arguments)
    with torch.no_grad():
        lora_ext.lora_linear(**arguments)


def test_a_backward_wants_a_wish_for_each_factor():
    many = make_many(6, 16, 24, (2, 3), bias=False)
    groups = (many.scaling, many.index, None, None, 0.0, None, 0, 0, False, None)
    operands = (many.x, many.weight, many.lora_a, many.lora_b)
    _, s = OPS.lora_linear_grouped_forward(*operands, *groups[:4], None, *groups[4:])
    with pytest.raises(
        RuntimeError, match="expected a wish for each of the 2 factors, but got 1 and 2"
    ):
        OPS.lora_linear_grouped_backward(
            many.grad, *operands, s, *groups, [True, False], [True], [True, True]
        )
    with pytest.raises(RuntimeError, match=r"expected s of shape \[6, 3\], but got \[6, 2\]"):
        OPS.lora_linear_grouped_backward(
            many.grad, *operands, s[:, :2], *groups, [True, False], [True] * 2, [True] * 2
        )


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
