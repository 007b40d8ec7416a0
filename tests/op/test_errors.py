"""What is refused, and that the message names the tensor, what was expected and what came."""

import math
import re

import pytest
import torch
from helpers import BF16, F16, F32, F64

import lora_ext
from lora_ext import _C

OP = torch.ops.lora_ext.lora_linear

# Real tensors and shapes without data, as torch.compile sees them, are refused in the same words.
PLACES = ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=PLACES)
def place(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def good(place="cpu", **changes):
    """The arguments of a valid call on 5 rows, 7 in, 6 out, rank 3, with some changed."""
    arguments = {
        "x": torch.zeros(5, 7),
        "weight": torch.zeros(6, 7),
        "lora_a": torch.zeros(3, 7),
        "lora_b": torch.zeros(6, 3),
        "bias": torch.zeros(6),
    }
    changed = {**arguments, **changes}
    return {k: v.to(place) if isinstance(v, torch.Tensor) else v for k, v in changed.items()}


def refused(error, *words, call=lora_ext.lora_linear, **arguments):
    """Every word must be in the message, which starts with the name of the function."""
    with pytest.raises(error) as caught:
        call(**arguments)
    message = str(caught.value)
    assert message.startswith("lora_ext."), message
    assert "expected" in message, message
    assert re.search(r"but got|: an int64 tensor", message), message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def test_the_valid_call_is_accepted(place):
    assert lora_ext.lora_linear(**good(place)).shape == (5, 6)


# ---- shapes ----

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
}


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_shape(place, name):
    changes, words = WRONG_SHAPES[name]
    refused(RuntimeError, *words, **good(place, **changes))


@pytest.mark.parametrize("rank", [0, 513, 4096])
def test_rank(place, rank):
    adapters = {"lora_a": torch.zeros(rank, 7), "lora_b": torch.zeros(6, rank)}
    words = ["rank from 1 to 512", f"rank {rank}", f"[{rank}, 7]"]
    if rank == 0:
        words.append("torch.nn.functional.linear")
    refused(RuntimeError, *words, **good(place, **adapters))


@pytest.mark.parametrize("rank", [1, 512])
def test_the_ends_of_the_rank_range_are_accepted(isa, device, rank):
    adapters = {"lora_a": torch.zeros(rank, 7), "lora_b": torch.zeros(6, rank)}
    assert lora_ext.lora_linear(**good(device, x=torch.zeros(60, 7), **adapters)).shape == (60, 6)


# ---- dtypes ----

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
}


@pytest.mark.parametrize("name", WRONG_DTYPES)
def test_dtype(place, name):
    changes, words = WRONG_DTYPES[name]
    refused(TypeError, *words, **good(place, **changes))


@pytest.mark.parametrize("half", [BF16, F16], ids=str)
def test_adapters_of_a_half_x(place, half):
    """float32 or x's own: the message says both; the other half and float64 are refused."""
    on_half = {"x": torch.zeros(5, 7, dtype=half), "weight": torch.zeros(6, 7, dtype=half)}
    for wrong in (F64, F16 if half == BF16 else BF16):
        adapters = {
            "lora_a": torch.zeros(3, 7, dtype=wrong),
            "lora_b": torch.zeros(6, 3, dtype=wrong),
        }
        refused(TypeError, "lora_a", "or float32", **good(place, **on_half, **adapters))


def test_mixed_adapters_are_refused(place):
    on_half = {"x": torch.zeros(5, 7, dtype=BF16), "weight": torch.zeros(6, 7, dtype=BF16)}
    mixed = {"lora_a": torch.zeros(3, 7, dtype=BF16), "lora_b": torch.zeros(6, 3, dtype=F32)}
    refused(TypeError, "lora_b", "BFloat16", "Float", **good(place, **on_half, **mixed))


# ---- devices ----


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


# ---- numbers ----


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, 1.5, math.nan, math.inf, -math.inf])
def test_dropout_p(place, dropout_p):
    refused(RuntimeError, "dropout_p", "[0, 1)", **good(place), dropout_p=dropout_p)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, math.nan])
def test_dropout_p_is_checked_in_evaluation_too(dropout_p):
    """A wrong number in a configuration is reported at once, not when training starts."""
    refused(RuntimeError, "dropout_p", "[0, 1)", **good(), dropout_p=dropout_p, training=False)


@pytest.mark.parametrize("scaling", [math.nan, math.inf, -math.inf])
def test_scaling(place, scaling):
    refused(RuntimeError, "finite scaling", **good(place), scaling=scaling)


def test_zero_and_negative_scaling_are_accepted(isa, device):
    arguments = good(
        device, x=torch.randn(60, 7), lora_a=torch.randn(3, 7), lora_b=torch.randn(6, 3)
    )
    plus, zero, minus = (lora_ext.lora_linear(**arguments, scaling=s) for s in (1.0, 0.0, -1.0))
    assert torch.equal(
        zero, torch.nn.functional.linear(*(arguments[n] for n in ("x", "weight", "bias")))
    )
    assert torch.equal(plus, -minus)


# ---- the pure op ----


def test_seed_is_needed_with_dropout(place):
    refused(RuntimeError, "seed", "dropout_p = 0.5", call=OP, **good(place), dropout_p=0.5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.uint8], ids=str)
def test_seed_of_another_dtype(place, dtype):
    seed = torch.zeros((), dtype=dtype, device=place)
    refused(TypeError, "seed", "int64", call=OP, **good(place), dropout_p=0.5, seed=seed)


@pytest.mark.parametrize("shape", [(2,), (0,), (1, 3)])
def test_seed_of_several_elements(place, shape):
    seed = torch.zeros(shape, dtype=torch.int64, device=place)
    words = ["seed", "one element", str(list(shape))]
    refused(RuntimeError, *words, call=OP, **good(place), dropout_p=0.5, seed=seed)


def test_seed_on_another_device():
    seed = torch.zeros((), dtype=torch.int64, device="meta")
    refused(RuntimeError, "seed", "cpu", "meta", call=OP, **good(), dropout_p=0.5, seed=seed)


@pytest.mark.parametrize("offsets", [(-1, 0), (0, -1), (-(2**40), 0)])
def test_negative_offsets(place, offsets):
    seed = torch.zeros((), dtype=torch.int64, device=place)
    names = dict(zip(("row_offset", "col_offset"), offsets, strict=True))
    words = ["row_offset", "col_offset", ">= 0", str(min(offsets))]
    refused(RuntimeError, *words, call=OP, **good(place), dropout_p=0.5, seed=seed, **names)


def backward_arguments(place="cpu", **changes):
    arguments = {k: v for k, v in good().items() if k != "bias"}
    arguments = {"grad": torch.zeros(5, 6), **arguments, "s": torch.zeros(5, 3), **changes}
    return [v.to(place) for v in arguments.values()] + [
        1.0, 0.0, None, 0, 0, False, None, [True] * 4,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"grad": torch.zeros(5, 7)}, RuntimeError, ["grad", "[5, 6]", "[5, 7]"]),
        ({"grad": torch.zeros(30)}, RuntimeError, ["grad", "[5, 6]", "[30]"]),
        ({"s": torch.zeros(5, 4)}, RuntimeError, ["s of shape", "[5, 3]", "[5, 4]"]),
        ({"s": torch.zeros(4, 3)}, RuntimeError, ["s of shape", "[5, 3]", "[4, 3]"]),
        ({"s": torch.zeros(15)}, RuntimeError, ["s of shape", "[5, 3]", "[15]"]),
        ({"s": torch.zeros(5, 3, dtype=F64)}, TypeError, ["s of dtype", "Float", "Double"]),
        ({"x": torch.zeros(5, 8)}, RuntimeError, ["x", "[..., 7]", "[5, 8]"]),
    ],
)
def test_backward_op(place, changes, error, words):
    def call(**kwargs):
        torch.ops.lora_ext.lora_linear_backward(*backward_arguments(place, **changes))

    refused(error, *words, call=call)


@pytest.mark.parametrize("name", ["grad", "s"])
def test_backward_op_on_two_devices(name):
    def call(**kwargs):
        arguments = backward_arguments(
            **{name: torch.zeros(5, 6 if name == "grad" else 3, device="meta")}
        )
        with torch.no_grad():
            moved = [a.to("cpu") if i not in (0, 5) else a for i, a in enumerate(arguments[:6])]
        torch.ops.lora_ext.lora_linear_backward(*moved, *arguments[6:])

    # Whoever refuses first, the call does not read memory that is not there.
    with pytest.raises((RuntimeError, NotImplementedError)):
        call()


# ---- dropout_mask ----


@pytest.mark.parametrize(
    "arguments",
    [(-1, 4, 0.5), (4, -1, 0.5), (4, 4, 0.5, -1), (4, 4, 0.5, 0, -1)],
    ids=["rows", "cols", "row_offset", "col_offset"],
)
def test_mask_of_negative_numbers(place, arguments):
    def call():
        lora_ext.functional.dropout_mask(1, *arguments, device=place)

    refused(RuntimeError, ">= 0", "-1", call=call)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, math.nan])
def test_mask_of_a_wrong_probability(place, dropout_p):
    def call():
        lora_ext.functional.dropout_mask(1, 4, 4, dropout_p, device=place)

    refused(RuntimeError, "dropout_p", "[0, 1)", call=call)


@pytest.mark.parametrize(
    ("seed", "error", "words"),
    [
        (torch.zeros(()), TypeError, ["seed of dtype int64", "Float"]),
        (torch.zeros(2).long(), RuntimeError, ["seed of one element", "[2]"]),
        (torch.zeros(0).long(), RuntimeError, ["seed of one element", "[0]"]),
    ],
)
def test_mask_of_a_wrong_seed(place, seed, error, words):
    def call():
        lora_ext.functional.dropout_mask(seed.to(place), 4, 4, 0.5)

    refused(error, *words, call=call)


# ---- the rest of the module ----


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match=r"expected one of auto, library, .*but got sse9"):
        _C.set_cpu_isa("sse9")
    assert _C.cpu_isa() == _C.available_cpu_isas()[0]


@pytest.mark.parametrize("weight", [torch.zeros(7), torch.zeros(2, 3, 4), torch.zeros(())])
def test_prepack_of_another_shape(weight):
    def call():
        lora_ext.prepack(weight)

    refused(RuntimeError, "weight", str(list(weight.shape)), call=call)


def test_prepack_of_a_weight_that_requires_grad():
    def call():
        lora_ext.prepack(torch.zeros(6, 7, requires_grad=True))

    refused(RuntimeError, "requires grad", "requires_grad_(False)", call=call)


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
