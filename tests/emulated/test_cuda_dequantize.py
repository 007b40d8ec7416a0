"""kernels/launch/dequantize.cu on our CUDA runtime: values, launches, refusals, its check."""

import pytest

from emulated.cuda.scripts import DEQUANTIZE, RUNS_CUDA, python

pytestmark = RUNS_CUDA


def test_a_weight_dequantised_on_cuda_has_the_bits_of_the_cpu():
    python(DEQUANTIZE)


def test_a_layer_on_a_quantised_base_dequantises_twice():
    """Once for each direction, with scales that are quantised, by one launch each."""
    python("""
from types import SimpleNamespace
from lora_ext.quantized import workspace
from lora_ext.quantized.formats import codes_of
from lora_ext.quantized.linear import Call, _QuantizedLinear
from lora_ext.quantized.of_bitsandbytes import FourBitWeight, eight_bit_weight

card(80, route="kernel")
there = torch.device("cuda", 1)
generator = torch.Generator().manual_seed(0)
n, k, rows, rank = 136, 96, 70, 8

# Of the function alone: autograd's engine would look for a device of torch's own.
class Context:
    needs_input_grad = (False, True, False, True, True)

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

def made(*shape):
    return 0.3 * torch.randn(shape, generator=generator)

def four_bits(device):
    generator.manual_seed(1)
    second = SimpleNamespace(
        code=made(256), absmax=made(1).abs(), blocksize=256, dtype=torch.float32
    )
    state = SimpleNamespace(
        shape=(n, k), dtype=torch.bfloat16, quant_type="nf4", blocksize=64, nested=True,
        code=made(16), absmax=torch.randint(0, 256, (n * k // 64,), generator=generator).byte(),
        offset=torch.tensor(0.5), state2=second,
    )
    for each in (second, state):
        for name, value in vars(each).items():
            if isinstance(value, torch.Tensor):
                setattr(each, name, value.to(device))
    packed = torch.randint(0, 256, (n * k // 2, 1), generator=generator).byte().to(device)
    return FourBitWeight(packed, state)

def eight_bits(device):
    generator.manual_seed(1)
    codes = torch.randint(-127, 128, (n, k), generator=generator).to(torch.int8)
    return eight_bit_weight(codes.to(device), made(n).abs().to(device))

def blocks_of_16(device):
    generator.manual_seed(1)
    pairs = torch.randint(0, 256, (n, k // 2), generator=generator).byte()
    scale = made(n, k // 16).to(torch.float8_e4m3fn)
    operands = [each.to(device) for each in (pairs, scale, torch.tensor(3.0))]
    return codes_of("nvfp4", *operands[:2], torch.bfloat16, over=operands[2])

kinds = ((four_bits, "dequantize4bit"), (blocks_of_16, "dequantize4bit"))
for weight, kernel in (*kinds, (eight_bits, "dequantize8bit")):
    dense = weight("cpu").dequantize(torch.bfloat16)
    generator.manual_seed(2)
    x, a, b, grad = (made(*s).bfloat16() for s in ((rows, k), (rank, k), (n, rank), (rows, n)))
    wanted = [each.detach().clone().requires_grad_() for each in (x, a, b)]
    y = lora_ext.lora_linear(wanted[0], dense, *wanted[1:], scaling=2.0)
    y.backward(grad)
    given, quantized = [each.to(there) for each in (x, a, b)], weight(there)
    lora_ext.lora_linear(given[0], quantized, *given[1:], scaling=2.0)  # the kernels' checks
    record()
    context = Context()
    found = _QuantizedLinear.forward(
        context, Call(quantized, 2.0, 0.0, None), given[0], None, *given[1:]
    )
    forward = kernels(record())
    _, dx, _, da, db = _QuantizedLinear.backward(context, grad.to(there))
    backward = kernels(record())
    assert forward[0] == backward[0] == kernel and "gemm" in forward and "gemm" in backward
    assert (forward + backward).count(kernel) == 2, (forward, backward)
    results = [each.cpu() for each in (found, dx, da, db)]
    assert close(results, [y.detach(), *(each.grad for each in wanted)])
    assert workspace.nbytes(there) == 2 * n * k
assert last_error() == 0
""")


def test_a_workspace_is_of_one_stream_of_its_own_device():
    """Whatever the current device is: on another stream, work may still read the weight in it."""
    python("""
from lora_ext.quantized import workspace

card(80)
kept = {}
for index, number in 2 * [(0, 0), (0, 1), (1, 0), (1, 1)]:
    x = torch.zeros(1).to(torch.device("cuda", index))
    set_stream(index, number)
    for current in (0, 1):
        set_device(current)
        buffer = workspace.take(8, x)
        assert buffer.device == x.device
        assert kept.setdefault((index, number), buffer.data_ptr()) == buffer.data_ptr()
        workspace.give(buffer)
assert len(set(kept.values())) == 4
""")


def test_dequantising_on_cuda_says_what_it_cannot_do():
    python("""
card(80)
there = torch.device("cuda", 1)
ops = torch.ops.lora_ext

def call(block=64, scale_block=None, table=there, cols=8):
    packed, scale = torch.zeros(4 * cols, dtype=torch.uint8, device=there), torch.zeros(1)
    out = torch.empty(8, cols, device=there)
    parts = dict(table=torch.zeros(16, device=table), block=block)
    if scale_block is not None:
        scale = scale.byte()
        zeros = [torch.zeros(size).to(there) for size in (256, 1, 1)]
        parts |= dict(zip(("scale_table", "scale_scale", "scale_offset"), zeros))
        parts["scale_block"] = scale_block
    ops.dequantize("4bit", packed, scale.to(there), out, **parts)

def refused(words, **options):
    with pytest.raises(RuntimeError, match=words):
        call(**options)

def call_8bit(dtype=torch.int8, **blocks):  # of 3 scales down, or across
    codes = torch.zeros(15, 15, dtype=torch.uint8, device=there).view(dtype)
    blocks = dict(block_rows=15, block=15) | blocks
    out = torch.empty(15, 15, device=there)
    ops.dequantize("8bit", codes, torch.zeros(3).to(there), out, **blocks)

call()
for block, cols in ((96, 8), (8, 1)):
    words = f"on CUDA a block that is a power of two from 16 on, but got {block}"
    refused(words, block=block, cols=cols)
refused("on CUDA a scale_block that is a power of two from 2 on, but got 6", scale_block=6)
for dtype in (torch.int8, torch.float8_e4m3fn):
    for size in ("block", "block_rows"):
        words = f"on CUDA a {size} that is a power of two from 1 on, but got 6"
        with pytest.raises(RuntimeError, match=words):
            call_8bit(dtype, **{size: 6})
refused("expected table on out's device, cuda:1, but got it on cpu", table="cpu")
fail("cudaLaunchKernelEx", 1, NO_IMAGE)
refused("dequantising on cuda:1 failed: no kernel image")
call()
assert settled() and current_device() == 0
""")


def test_a_device_that_cannot_run_them_is_left_to_the_library():
    python("""
from lora_ext.quantized import devices

card(80)
first, second = torch.device("cuda", 0), torch.device("cuda", 1)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    torch.cuda.is_current_stream_capturing = lambda: True
    assert not devices.has_kernels(second)  # nobody may wait for a graph
    torch.cuda.is_current_stream_capturing = lambda: False
    fail("cudaLaunchKernelEx", 1, NO_IMAGE)
    assert not devices.has_kernels(first) and devices.has_kernels(second)
    assert not devices.has_kernels(first)  # it is asked once
    record()
    assert devices.has_kernels(second) and not record()
assert settled()
""")


@pytest.mark.parametrize(
    "mutant",
    [
        "dequantize_lower_half_first",
        "dequantize_scale_fused",
        "dequantize/formats.dequantize_tile.j<Tile::kChunks/2:always",
    ],
)
def test_kernels_that_dequantise_wrongly_are_not_used(mutant):
    python(f"""
from lora_ext.quantized import devices

card(80)
plant({mutant!r})
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert not devices.has_kernels(torch.device("cuda", 0))
assert "failed their check on cuda:0" in str(said[0].message)
""")
