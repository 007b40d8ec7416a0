"""The package in emulation: layers of experts, by kernels and around them."""

import pytest

from emulated.cuda.scripts import EXPERTS
from emulated.package.child import python

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("package")]

# A layer of experts with an adapter of float32, or by row with one of two or none: Y and every
# gradient.
LAYER_OF_EXPERTS = """
from lora_ext.experts import Experts, ExpertsAdapter, lora_experts

def layer(stored=torch.Tensor.bfloat16, dropout=0.0, is_transposed=False, is_by_row=False):
    torch.manual_seed(0)
    up, down = 0.1 * torch.randn(5, 48, 32), 0.1 * torch.randn(5, 32, 24)
    if is_transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    gate = lambda z: z[:, :24] * z[:, 24:].sigmoid()
    experts = Experts(stored(up), stored(down), gate, is_transposed=is_transposed)
    leaves = [torch.randn(9, 32).to(experts.up.dtype), torch.rand(9, 2)]
    ranks = (20, 10) if is_by_row else (20,)
    leaves += [0.1 * torch.randn(n) for r in ranks for n in ((r, 32), (48, r), (r, 24), (32, r))]
    x, weights, *factors = (leaf.requires_grad_() for leaf in leaves)
    first, second = (
        [ExpertsAdapter(*factors[i : i + 2], 2.0, dropout) for i in range(begin, len(factors), 4)]
        for begin in (0, 2)
    )
    index = torch.arange(18).view(9, 2) % 6  # 5 is no expert
    rows = torch.arange(9) % 4 % 3 - 1 if is_by_row else None
    y = lora_experts(experts, x, index, weights, first, second, rows)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, weights, *factors))]
"""


def test_experts_are_captured_once_their_kernels_are_checked():
    """Nothing is read on the host then; the library's products, of a first use too, do that."""
    python(
        LAYER_OF_EXPERTS
        + """
with pytest.raises(RuntimeError, match="lora_experts: .* first use in a capture, .* call"):
    layer()
emulate("CAPTURE", "0")
results = layer()
assert {name.split(" ")[0] for name in check_results("cpu")} == {"forward", "backward"}
assert all("experts" in name for name in check_results("cpu"))
by_row = layer(is_by_row=True)
emulate("CAPTURE", "1")
assert same(layer(), results) and same(layer(is_by_row=True), by_row)
_C.set_cuda_route("library")
with pytest.raises(RuntimeError, match="library route .* call the layer outside of the capture"):
    layer()
emulate("CAPTURE", "0")
for found, expected in ((results, layer()), (by_row, layer(is_by_row=True))):
    assert not same(found, expected) and close(found, expected)
""",
        LORA_EXT_EMULATED_CAPTURE="1",
    )


def test_experts_whose_kernels_are_wrong_have_the_librarys_products():
    said = python(
        LAYER_OF_EXPERTS
        + """
results = layer()
_C.set_cuda_route("library")
assert same(results, layer())
""",
        LORA_EXT_EMULATED_FAULT="tile/halves.sum_of_splits.split<splits:low",
    )
    assert said.count("failed their check") == 2 and "experts" in said


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_quantised_experts_are_dequantised_by_slices_and_have_the_bits_of_dense_ones(dtype):
    python(
        LAYER_OF_EXPERTS
        + f"dtype = torch.{dtype}"
        + """
from lora_ext.quantized import stack, stacks, workspace
from lora_ext.quantized.codes import FourBits, Nested, ScaledCodes

def four_bits(weight, nested=None):
    codes, table = torch.randint(256, (weight.numel() // 2,)).byte(), torch.linspace(-1, 1, 16)
    scale = torch.rand(weight.numel() // 32) / 5
    scale = scale if nested is None else (255 * scale).byte()
    return FourBits(codes, scale, nested, "nf4", table, 32, tuple(weight.shape), dtype)

def second_scales(weight):  # of an expert and a part of the next
    blocks = -(-weight.numel() // 32 // 26)
    given = torch.rand(256) / 5, torch.rand(blocks), torch.rand(1) / 9, 26, torch.float32
    return four_bits(weight, Nested(*given))

def eight_bits(weight, scales=slice(None)):
    codes = torch.randint(-128, 128, weight.shape).to(torch.int8)
    scale = torch.rand(*weight.shape[:2], 1)[scales] / 1000
    return ScaledCodes(codes, scale, None, dtype)

def shared(weight):
    return eight_bits(weight, slice(1))

def of_matrix(weight):
    return eight_bits(weight, (slice(None), slice(1)))

monkeypatch = pytest.MonkeyPatch()
for codes in (four_bits, second_scales, eight_bits, shared, of_matrix):
    for words in ({"is_by_row": True}, {"dropout": 0.4}, {"is_transposed": True}):
        dense = layer(lambda weight: codes(weight).dequantize(dtype), **words)
        for most in (1, 2, 3, 5):
            stack.SLICE_BYTES = most * 48 * 32 * 2
            workspace.release()
            with monkeypatch.context() as patch:
                patch.delattr(stack.QuantizedStack, "stored")  # one at a time
                found = layer(lambda weight: stack.QuantizedStack(codes(weight)), **words)
            assert same(found, dense), (codes, words, most)
            assert workspace.nbytes() == stack.SLICE_BYTES

def of_a_traced_program(weight):
    flat = stacks.flat_weight(stack.QuantizedStack(of_matrix(weight)))
    return stacks.weight_from_flat(*flat)

workspace.release()
assert same(layer(of_a_traced_program, **words), dense) and not workspace.nbytes()
_C.set_cuda_route("library")
stack.SLICE_BYTES = 1
expected = layer(lambda weight: stack.QuantizedStack(of_matrix(weight)), is_transposed=True)
assert not same(found, expected) and close(found, expected)
"""
    )


@pytest.mark.parametrize(
    ("fault", "op"),
    [
        ("experts_place_as_perm", "experts_routes"),
        ("experts_b_by_expert", "experts_factors"),
        ("experts_weight_of_position", "experts_sum"),
        ("experts_bias_of_position", "experts_dot"),
    ],
)
def test_a_wrong_kernel_around_experts_is_found_and_not_used(fault, op):
    said = python(
        LAYER_OF_EXPERTS
        + """
results = layer()
emulate("FAULT")
assert same(results, layer())  # not even once the fault is gone
assert not check_results("cpu")
""",
        LORA_EXT_EMULATED_FAULT=fault,
    )
    assert f"failed their check on cpu, in {op}: torch's own operations are used" in said


def test_what_surrounds_the_products_of_experts_is_right():
    python(
        f"there = cpu\n{EXPERTS}"
        + """
calls = (
    (ops.experts_routes, (index, experts)),
    (ops.experts_factors, (a, b, [1.0, 0.3], experts, dtype, 2)),
    (ops.experts_factors, (a, b, [1.0, 0.3], experts, dtype, 2, None, True)),
    (ops.experts_low_rank, (few, a, b, [1.0, 0.3], 0.7, experts, 2, routes[3], routes[1])),
    (ops.experts_sum, (x[:, :n], *routes[2:4], weights, k)),
    (ops.experts_dot, given),
)
for op, arguments in calls:
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(op.default, arguments, test_utils=utils)
"""
    )
