"""The CPU's kernels that dequantise: bit for bit torch's formulas, on each instruction set."""

import pytest
import torch
from helpers import BF16, F16, F32, F64, short
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from lora_ext.quantized import devices

ops = torch.ops.lora_ext
DTYPES = (F32, BF16, F16)
TABLE = torch.linspace(-1, 1, 16) ** 3  # any sixteen values


def four_bit_case(count, block, seed=0, nested=None, low_first=False):
    """(codes, scale, the op's other arguments, the values in float32)."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (count,), generator=generator)
    padded = torch.cat([codes, codes.new_zeros(count % 2)])
    first, second = padded[::2], padded[1::2]
    packed = (second << 4 | first if low_first else first << 4 | second).to(torch.uint8)
    blocks = -(-count // block)
    parts = {"table": TABLE, "block": block, "low_first": low_first}
    if nested is None:
        scale = torch.rand(blocks, generator=generator) * 3
        values = scale
    else:
        scale = torch.randint(0, 256, (blocks,), generator=generator).to(torch.uint8)
        table = torch.randn(256, generator=generator)
        factor = torch.rand(-(-blocks // nested), generator=generator) * 3
        offset = torch.tensor(0.7)
        parts |= {"scale_table": table, "scale_scale": factor, "scale_offset": offset}
        parts["scale_block"] = nested
        values = table[scale.long()] * factor.repeat_interleave(nested)[:blocks] + offset
    expected = TABLE[codes] * values.repeat_interleave(block)[:count]
    return packed, scale, parts, expected


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("rows", "cols", "block"), [(32, 32, 32), (96, 192, 64), (64, 4096, 4096)])
def test_panels(isa, dtype, rows, cols, block):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (rows, cols), generator=generator)
    # 16 rows in the lower halves of bytes, the next 16 in the upper ones; pairs of columns together
    by_panel = codes.view(rows // 32, 2, 16, cols // 2, 2).permute(0, 3, 1, 2, 4)
    lower, upper = by_panel[:, :, 0], by_panel[:, :, 1]
    packed = (upper << 4 | lower).to(torch.uint8).contiguous()
    scale = torch.rand(cols // block, rows, generator=generator).bfloat16()
    out = torch.empty(rows, cols, dtype=dtype)
    ops.dequantize("4bit_panels", packed, scale, out, table=TABLE, block=block)
    expected = TABLE[codes] * scale.float().t().repeat_interleave(block, 1)
    assert torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_nan_and_infinity(isa, dtype):
    packed, scale, parts, _ = four_bit_case(256, 64)
    scale = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-45])
    out = torch.empty(256, dtype=dtype)
    ops.dequantize("4bit", packed, scale, out, **parts)
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    expected = (TABLE[codes] * scale.repeat_interleave(64)).to(dtype)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_the_same_bits_whatever_the_threads():
    packed, scale, parts, _ = four_bit_case(1 << 20, 64, nested=256)
    found = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        out = torch.empty(1 << 20, dtype=BF16)
        ops.dequantize("4bit", packed, scale, out, **parts)
        found.append(out)
    torch.set_num_threads(threads)
    assert all(torch.equal(out, found[0]) for out in found)


def eight_bit_case(shape, block, kind, seed=2):
    """(codes, scale, the op's other arguments, the values in float32), of blocks of rows and of
    columns of a stack of matrices."""
    matrices, rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    codes[codes == 0x7F], codes[codes == 0xFF] = 1, 2  # e4m3's NaN
    codes = codes.view(torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    down, across = -(-rows // block[0]), -(-columns // block[1])
    scale = torch.rand(matrices, down, across, generator=generator) * 5
    parts = {"block_rows": block[0], "block": block[1], "experts": matrices}
    parts["multiplier"] = 1.0 / 127.0
    whole = (scale * torch.tensor(1.0 / 127.0)).repeat_interleave(block[0], 1)[:, :rows]
    whole = whole.repeat_interleave(block[1], 2)[..., :columns]
    return codes.flatten(0, 1), scale.flatten(), parts, (codes.float() * whole).flatten(0, 1)


@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_every_code_of_eight_bits(isa, dtype, kind):
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    codes = codes.view(torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    out = torch.empty(2, 128, dtype=dtype)
    ops.dequantize("8bit", codes, torch.full((2,), 0.7), out, block=128)
    expected = (codes.float() * torch.tensor(0.7)).to(dtype)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("nested", [None, 16, 256])
@pytest.mark.parametrize("low_first", [False, True], ids=["high first", "low first"])
@pytest.mark.parametrize(
    ("count", "block"), [(1 << 20, 64), (1 << 20, 4096), (12345, 32), (9999, 16), (1, 64)]
)
def test_four_bits_on_cuda(count, block, nested, dtype, cuda, low_first):
    packed, scale, parts, expected = four_bit_case(count, block, 0, nested, low_first)
    packed, scale = packed.to(cuda), scale.to(cuda)
    parts = {
        name: part.to(cuda) if isinstance(part, torch.Tensor) else part
        for name, part in parts.items()
    }
    for before in (0, 1):  # aligned, and not
        out = torch.full((before + count,), float("nan"), dtype=dtype, device=cuda)[before:]
        ops.dequantize("4bit", packed, scale, out, **parts)
        assert torch.equal(out.cpu(), expected.to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((1, 512, 4096), (1, 4096)),
        ((1, 70, 33), (1, 33)),
        ((1, 4096, 32), (4096, 32)),
        ((1, 3, 8), (1, 8)),
        ((1, 520, 1000), (128, 128)),
        ((3, 70, 264), (64, 32)),
        ((2, 33, 45), (16, 4)),
    ],
)
def test_eight_bits_on_cuda(shape, block, kind, dtype, cuda):
    codes, scale, parts, expected = eight_bit_case(shape, block, kind)
    out = torch.empty(codes.shape, dtype=dtype, device=cuda)
    ops.dequantize("8bit", codes.to(cuda), scale.to(cuda), out, **parts)
    assert torch.equal(out.cpu(), expected.to(dtype))


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_the_check_of_a_device_is_right_and_sees_another_formula(dtype, block, isa, monkeypatch):
    cpu = torch.device("cpu")
    assert not devices._differs(cpu, dtype, block)
    once = devices._scales_of
    monkeypatch.setattr(devices, "_scales_of", lambda *parts: once(*parts[:3], parts[3] * 1.01))
    assert devices._differs(cpu, dtype, block)


def test_a_device_without_kernels():
    assert devices.has_kernels(torch.device("cpu"))
    assert not devices._are_right(torch.device("meta"))


def test_the_check_of_a_device_has_values_among_fake_tensors():
    with FakeTensorMode():
        assert devices._are_right(torch.device("cpu"))


def test_a_device_without_memory_is_asked_again(monkeypatch):
    def fails(*case):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(devices, "_differs", fails)
    meta = torch.device("meta")
    with pytest.raises(torch.OutOfMemoryError):
        devices.has_kernels(meta)
    assert meta not in devices._found


def test_registration():
    packed, scale, parts, _ = four_bit_case(256, 64, nested=2)
    op = ops.dequantize.default
    opcheck(op, ("4bit", packed, scale, torch.empty(4, 64)), parts)
    codes = torch.zeros(4, 6, dtype=torch.int8)
    words = {"multiplier": 0.5, "block": 6}
    opcheck(op, ("8bit", codes, torch.rand(4), torch.empty(4, 6)), words)
    panels = torch.zeros(32 * 32, dtype=torch.uint8)
    arguments = ("4bit_panels", panels, torch.rand(2, 32).bfloat16(), torch.empty(32, 64))
    opcheck(op, arguments, {"table": TABLE, "block": 32})


def four_bit_call(**changes):
    packed, scale, parts, _ = four_bit_case(256, 64)
    call = {"format": "4bit", "codes": packed, "scale": scale, "out": torch.empty(256), **parts}
    return ops.dequantize(**{**call, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"out": torch.empty(256, dtype=F64)}, TypeError, "out in float32, bfloat16 or float16"),
        ({"out": torch.empty(512)[::2]}, RuntimeError, "a contiguous out"),
        ({"out": torch.empty(258)}, RuntimeError, "codes of 129 elements, but got 128"),
        ({"codes": torch.zeros(128)}, TypeError, "codes in Byte, but got Float"),
        ({"table": torch.zeros(8)}, RuntimeError, "table of 16 elements, but got 8"),
        ({"table": None}, RuntimeError, "a table of 16 elements, but got none"),
        ({"format": "5bit"}, ValueError, "the formats 4bit, 4bit_panels, 8bit, but got 5bit"),
        ({"scale": torch.zeros(3)}, RuntimeError, "scale of 4 elements, but got 3"),
        ({"scale": torch.zeros(4).half()}, TypeError, "scale in Float, but got Half"),
        ({"block": 3}, RuntimeError, "an even block, but got 3"),
        ({"block": 0}, RuntimeError, "an even block, but got 0"),
        ({"block": -2}, RuntimeError, "an even block, but got -2"),
        ({"scale_offset": torch.zeros(1)}, RuntimeError, "or none"),
    ],
)
def test_errors_of_four_bits(changes, error, message):
    with pytest.raises(error, match=f"lora_ext.dequantize: .*{message}"):
        four_bit_call(**changes)


def test_other_errors():
    codes, scale = torch.zeros(4, 6, dtype=torch.int8), torch.rand(4)
    with pytest.raises(RuntimeError, match="dequantize: expected out of 2 dimensions"):
        ops.dequantize("8bit", codes, scale, torch.empty(24))
    for words, message in (
        ({"block": 6}, "expected scale of 8 elements, but got 4"),
        ({"block": 0}, "expected positive blocks, but got 0"),
        ({"block": 6, "block_rows": -1}, "expected positive blocks, but got -1"),
        ({"experts": 3}, "expected out of 3 matrices of whole rows, but got shape .8, 6."),
        ({"experts": 0}, "expected out of 0 matrices"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.dequantize("8bit", codes.repeat(2, 1), scale, torch.empty(8, 6), **words)
    with pytest.raises(TypeError, match="expected codes in Char, but got Byte"):
        ops.dequantize("8bit", codes.byte(), scale, torch.empty(4, 6), block=6)
    panels, scale = torch.zeros(32 * 32, dtype=torch.uint8), torch.rand(2, 32).bfloat16()
    with pytest.raises(RuntimeError, match="expected rows that 32 divides and columns that the"):
        ops.dequantize("4bit_panels", panels, scale, torch.empty(64, 48), table=TABLE, block=32)
    with pytest.raises(RuntimeError, match="expected a block that 32 divides, but got 16"):
        ops.dequantize("4bit_panels", panels, scale, torch.empty(32, 64), table=TABLE, block=16)
