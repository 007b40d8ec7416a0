"""What is refused, and that the message names the tensor, what was expected and what came."""

import math
import re

import op_calls
import pytest
import torch
from helpers import BF16, F16, F32, F64

import lora_ext
from lora_ext import _C

OPS = torch.ops.lora_ext

# Real tensors and shapes without data, as torch.compile sees them, are refused in the same words.
PLACES = ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=PLACES)
def place(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


# Valid calls on 5 rows, 7 in, 6 out, rank 3.
FACTORS = {"lora_a": torch.zeros(3, 7), "lora_b": torch.zeros(6, 3)}
OPERANDS = {"x": torch.zeros(5, 7), "weight": torch.zeros(6, 7), **FACTORS}
LINEAR = {**OPERANDS, "bias": torch.zeros(6)}
UPDATE = {"y": torch.zeros(5, 6), "x": torch.zeros(5, 7), **FACTORS}
BACKWARD = {"grad": torch.zeros(5, 6), **OPERANDS, "s": torch.zeros(5, 3)}
SEED = {"seed": torch.zeros((), dtype=torch.int64), "dropout_p": 0.5}
MASK = {**SEED, "rows": 4, "cols": 4}


def backward(**tensors):
    tail = (1.0, 0.0, None, 0, 0, False, None, [True] * 4)
    return op_calls.lora_linear_backward(*tensors.values(), *tail)


def moved(place, arguments):
    return {k: v.to(place) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def good(place="cpu", **changes):
    """The arguments of a valid call, with some changed."""
    return moved(place, LINEAR | changes)


def refused(error, *words, call=lora_ext.lora_linear, **arguments):
    """Every word must be in the message, which starts with the name of the function."""
    with pytest.raises(error) as caught:
        call(**arguments)
    message = str(caught.value)
    assert message.startswith("lora_ext."), message
    assert "expected" in message, message
    assert re.search(r"but got|: an int64 tensor|: those of a list", message), message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def test_the_valid_call_is_accepted(place):
    assert lora_ext.lora_linear(**good(place)).shape == (5, 6)


def half_and(half, a, b):
    """Factors of some dtypes with a half x."""
    made = {"lora_a": FACTORS["lora_a"].to(a), "lora_b": FACTORS["lora_b"].to(b)}
    return {"x": torch.zeros(5, 7, dtype=half), "weight": torch.zeros(6, 7, dtype=half), **made}


WRONG_SHAPES = {
    "x is 0-d": ({"x": torch.zeros(())}, ["x", "[..., in_features]", "0-d"]),
    "x has another width": ({"x": torch.zeros(5, 8)}, ["x", "[..., 7]", "[6, 7]", "[5, 8]"]),
    "1-d x has another width": ({"x": torch.zeros(6)}, ["x", "[..., 7]", "[6]"]),
    "weight is 1-d": ({"weight": torch.zeros(7)}, ["weight", "[out_features, in_features]", "[7]"]),
    "weight is 3-d": ({"weight": torch.zeros(1, 6, 7)}, ["weight", "3 dimensions", "[1, 6, 7]"]),
    "weight is transposed": ({"weight": torch.zeros(7, 6)}, ["x", "[..., 6]", "[7, 6]", "[5, 7]"]),
    "lora_a is 1-d": ({"lora_a": torch.zeros(7)}, ["lora_a", "[rank, in_features]", "[7]"]),
    "lora_a is transposed": ({"lora_a": torch.zeros(7, 3)}, ["lora_a", "[rank, 7]", "[7, 3]"]),
    "lora_b is 1-d": ({"lora_b": torch.zeros(6)}, ["lora_b", "[out_features, rank]", "[6]"]),
    "lora_b is transposed": ({"lora_b": torch.zeros(3, 6)}, ["lora_b", "[6, 3]", "[3, 6]"]),
    "lora_b has another rank": ({"lora_b": torch.zeros(6, 4)}, ["lora_b", "[6, 3]", "[6, 4]"]),
    "bias has another length": ({"bias": torch.zeros(5)}, ["bias", "[6]", "[5]"]),
    "bias is 2-d": ({"bias": torch.zeros(1, 6)}, ["bias", "[6]", "[1, 6]"]),
    "bias is 0-d": ({"bias": torch.zeros(())}, ["bias", "[6]", "[]"]),
    **{
        f"rank {rank}": (
            {"lora_a": torch.zeros(rank, 7), "lora_b": torch.zeros(6, rank)},
            ["rank from 1 to 512", f"rank {rank}", f"[{rank}, 7]"],
        )
        for rank in (0, 513, 4096)
    },
    "rank 0, and what to do": (
        {"lora_a": torch.zeros(0, 7), "lora_b": torch.zeros(6, 0)},
        ["torch.nn.functional.linear"],
    ),
}
WRONG_NUMBERS = {
    **{
        # In evaluation too: what is wrong in a configuration is said at once.
        f"dropout_p = {p}, training = {training}": (
            {"dropout_p": p, "training": training},
            ["dropout_p", "[0, 1)"],
        )
        for p in (-0.1, 1.0, 1.5, math.nan, math.inf, -math.inf)
        for training in (True, False)
    },
    **{
        f"scaling = {value}": ({"scaling": value}, ["finite scaling"])
        for value in (math.nan, math.inf, -math.inf)
    },
    "scaling that requires grad": (
        {"scaling": torch.ones((), requires_grad=True)},
        ["scaling without gradient", "requires grad", "multiply lora_b by it"],
    ),
}
WRONG_DTYPES = {
    "int x": (
        {"x": torch.zeros(5, 7).long()},
        ["x", "float64, float32, bfloat16 or float16", "Long"],
    ),
    "complex x": ({"x": torch.zeros(5, 7).cfloat()}, ["x", "ComplexFloat"]),
    "float8 x": ({"x": torch.zeros(5, 7).to(torch.float8_e4m3fn)}, ["x", "Float8"]),
    "bool x": ({"x": torch.zeros(5, 7).bool()}, ["x", "Bool"]),
    "half weight": (
        {"weight": torch.zeros(6, 7, dtype=BF16)},
        ["weight", "Float", "BFloat16", "autocast"],
    ),
    "double weight": ({"weight": torch.zeros(6, 7, dtype=F64)}, ["weight", "Float", "Double"]),
    "half adapters": (
        {"lora_a": torch.zeros(3, 7, dtype=F16), "lora_b": torch.zeros(6, 3, dtype=F16)},
        ["lora_a", "Float", "Half"],
    ),
    "lora_b of another dtype": (
        {"lora_b": torch.zeros(6, 3, dtype=F64)},
        ["lora_b", "Float", "Double"],
    ),
    "int bias": ({"bias": torch.zeros(6).long()}, ["bias", "Float", "Long"]),
    "half bias": ({"bias": torch.zeros(6, dtype=BF16)}, ["bias", "Float", "BFloat16"]),
    # float32 or x's own: the message says both; the other half and float64 are refused.
    "double on bfloat16": (half_and(BF16, F64, F64), ["lora_a", "or float32"]),
    "float16 on bfloat16": (half_and(BF16, F16, F16), ["lora_a", "or float32"]),
    "double on float16": (half_and(F16, F64, F64), ["lora_a", "or float32"]),
    "bfloat16 on float16": (half_and(F16, BF16, BF16), ["lora_a", "or float32"]),
    "mixed on bfloat16": (half_and(BF16, BF16, F32), ["lora_b", "BFloat16", "Float"]),
}
WRONG_SEEDS = {
    "no seed": ({"seed": None}, ["seed", "dropout_p = 0.5"]),
    **{
        f"seed of shape {shape}": (
            {"seed": torch.zeros(shape, dtype=torch.int64)},
            ["seed", "one element", str(list(shape))],
        )
        for shape in ((2,), (0,), (1, 3))
    },
    **{
        f"offsets {row}, {col}": (
            {"row_offset": row, "col_offset": col},
            ["row_offset", "col_offset", ">= 0", str(min(row, col))],
        )
        for row, col in ((-1, 0), (0, -1), (-(2**40), 0))
    },
}
SEED_DTYPES = {
    f"seed of {dtype}": ({"seed": torch.zeros((), dtype=dtype)}, ["seed", "int64"])
    for dtype in (torch.int32, F32, torch.uint8)
}
WRONG_UPDATES = {
    "y has other columns": ({"y": torch.zeros(5, 5)}, ["y", "[5, 6]", "[5, 5]"]),
    "y has other rows": ({"y": torch.zeros(1, 6)}, ["y", "[5, 6]", "[1, 6]"]),
    "x is 0-d": ({"x": torch.zeros(())}, ["x", "0-d"]),
    "x has other columns": ({"x": torch.zeros(5, 8)}, ["[..., 7]", "[5, 8]"]),
    "no rank": ({"lora_a": torch.zeros(0, 7)}, ["rank from 1 to 512", "rank 0"]),
    "lora_a is 1-d": ({"lora_a": torch.zeros(7)}, ["lora_a", "1 dimensions"]),
    "ranks differ": ({"lora_b": torch.zeros(6, 4)}, ["lora_b", "3]", "[6, 4]"]),
    "scaling": ({"scaling": math.nan}, ["scaling", "nan"]),
    "scaling that requires grad": WRONG_NUMBERS["scaling that requires grad"],
    "probability": ({"dropout_p": 1.0}, ["dropout_p", "[0, 1)", "1"]),
    "of no use": ({"dropout_p": 1.0, "training": False}, ["lora_update: ", "dropout_p", "[0, 1)"]),
    "offset": ({"row_offset": -1}, [">= 0", "-1"]),
}
UPDATE_DTYPES = {
    "y is of integers": ({"y": torch.zeros(5, 6, dtype=torch.int8)}, ["y", "Char"]),
    "lora_a is half": ({"lora_a": torch.zeros(3, 7).half()}, ["lora_a", "Half"]),
    "lora_b differs": ({"lora_b": torch.zeros(6, 3).double()}, ["lora_b", "Double"]),
    "a list": ({"y": [1.0]}, ["y to be a tensor", "list"]),
    "no number": ({"scaling": "1"}, ["scaling", "'1'"]),
}
WRONG_GRADIENTS = {
    "grad of other columns": ({"grad": torch.zeros(5, 7)}, ["grad", "[5, 6]", "[5, 7]"]),
    "grad is 1-d": ({"grad": torch.zeros(30)}, ["grad", "[5, 6]", "[30]"]),
    "s of another rank": ({"s": torch.zeros(5, 4)}, ["s of shape", "[5, 3]", "[5, 4]"]),
    "s of other rows": ({"s": torch.zeros(4, 3)}, ["s of shape", "[5, 3]", "[4, 3]"]),
    "s is 1-d": ({"s": torch.zeros(15)}, ["s of shape", "[5, 3]", "[15]"]),
    "x of other columns": ({"x": torch.zeros(5, 8)}, ["x", "[..., 7]", "[5, 8]"]),
}
S_OF_FLOAT64 = {"s": ({"s": torch.zeros(5, 3, dtype=F64)}, ["s of dtype", "Float", "Double"])}
WRONG_MASKS = {
    **{name: ({name: -1}, [">= 0", "-1"]) for name in ("rows", "cols", "row_offset", "col_offset")},
    **{p: ({"dropout_p": p}, ["dropout_p", "[0, 1)"]) for p in (-0.1, 1.0, math.nan)},
    **{
        f"seeds {n}": ({"seed": torch.zeros(n).long()}, ["seed of one element", f"[{n}]"])
        for n in (0, 2)
    },
}
MASK_DTYPES = {"seed": ({"seed": torch.zeros(())}, ["seed of dtype int64", "Float"])}
WRONG_WEIGHTS = {
    **{
        str(shape): ({"weight": torch.zeros(shape)}, ["weight", str(list(shape))])
        for shape in ((7,), (2, 3, 4), ())
    },
    "trained": (
        {"weight": torch.zeros(6, 7, requires_grad=True)},
        ["requires grad", "requires_grad_(False)"],
    ),
}

# (function, a valid call, error, case -> (what changes, words of the message))
TABLES = [
    (lora_ext.lora_linear, LINEAR, RuntimeError, WRONG_SHAPES | WRONG_NUMBERS),
    (lora_ext.lora_linear, LINEAR, TypeError, WRONG_DTYPES),
    (op_calls.lora_linear, LINEAR | SEED, RuntimeError, WRONG_SEEDS),
    (op_calls.lora_linear, LINEAR | SEED, TypeError, SEED_DTYPES),
    (lora_ext.lora_update, UPDATE, RuntimeError, WRONG_UPDATES),
    (lora_ext.lora_update, UPDATE, TypeError, UPDATE_DTYPES),
    (op_calls.lora_update, UPDATE | SEED, RuntimeError, {"no seed": WRONG_SEEDS["no seed"]}),
    (backward, BACKWARD, RuntimeError, WRONG_GRADIENTS),
    (backward, BACKWARD, TypeError, S_OF_FLOAT64),
    (lora_ext.functional.dropout_mask, MASK, RuntimeError, WRONG_MASKS),
    (lora_ext.functional.dropout_mask, MASK, TypeError, MASK_DTYPES),
    (lora_ext.pack_weight, {}, RuntimeError, WRONG_WEIGHTS),
]


@pytest.mark.parametrize(
    ("call", "arguments", "error", "words"),
    [
        pytest.param(call, valid | changes, error, words, id=f"{call.__name__} {case}")
        for call, valid, error, cases in TABLES
        for case, (changes, words) in cases.items()
    ],
)
def test_what_does_not_fit_is_refused(place, call, arguments, error, words):
    refused(error, *words, call=call, **moved(place, arguments))


@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b", "bias"])
def test_device(name):
    """Without a GPU the meta device is the other one."""
    arguments = good()
    arguments[name] = arguments[name].to("meta")
    refused(RuntimeError, name, "x's device cpu", "meta", ".to()", **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "bias"])
def test_device_of_real_tensors(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    arguments = good("cuda")
    arguments[name] = arguments[name].to("cpu")
    refused(RuntimeError, "device", "cpu", "cuda:0", **arguments)


def test_seed_on_another_device():
    seed = torch.zeros((), dtype=torch.int64, device="meta")
    given = LINEAR | SEED | {"seed": seed}
    refused(RuntimeError, "seed", "cpu", "meta", call=op_calls.lora_linear, **given)


@pytest.mark.parametrize("name", ["grad", "s"])
def test_backward_op_on_two_devices(name):
    # Whoever refuses first, the call does not read memory that is not there.
    with pytest.raises((RuntimeError, NotImplementedError)):
        backward(**BACKWARD | {name: BACKWARD[name].to("meta")})


# ---- what is accepted, and what an error leaves ----


def test_zero_and_negative_scaling_are_accepted(isa, device):
    arguments = good(
        device, x=torch.randn(60, 7), lora_a=torch.randn(3, 7), lora_b=torch.randn(6, 3)
    )
    plus, zero, minus = (lora_ext.lora_linear(**arguments, scaling=s) for s in (1.0, 0.0, -1.0))
    assert torch.equal(
        zero, torch.nn.functional.linear(*(arguments[n] for n in ("x", "weight", "bias")))
    )
    assert torch.equal(plus, -minus)


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match=r"expected one of auto, library, .*but got sse9"):
        _C.set_cpu_isa("sse9")
    assert _C.cpu_isa() == _C.available_cpu_isas()[0]


def test_an_error_leaves_no_trace(isa, device):
    """The generator and later results are as if the refused call had not been made."""
    arguments = good(device, x=torch.randn(60, 7, generator=torch.Generator().manual_seed(1)))
    torch.manual_seed(3)
    before = lora_ext.lora_linear(**arguments, dropout_p=0.5)
    torch.manual_seed(3)
    with pytest.raises(RuntimeError):
        lora_ext.lora_linear(**{**arguments, "x": arguments["x"][:, 1:]}, dropout_p=0.0)
    assert torch.equal(before, lora_ext.lora_linear(**arguments, dropout_p=0.5))


@pytest.mark.gpu
def test_dropout_in_a_build_without_cuda_says_so():
    if not torch.cuda.is_available() or _C.with_cuda:
        pytest.skip("needs a CUDA device and a build without CUDA kernels")
    refused(RuntimeError, "build_info", **good("cuda"), dropout_p=0.5)
