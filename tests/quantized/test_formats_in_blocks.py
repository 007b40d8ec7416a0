"""`lora_ext.quantized.formats`: the bits of transformers, and what does not fit."""

import pytest
import torch
from format_helpers import DTYPES
from helpers import BF16, F32, short

import lora_ext
from lora_ext.quantized.formats import FORMATS, codes_of

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E2M1 = torch.tensor([*E2M1, *(-value for value in E2M1)])


def pairs_of(shape):
    """Bytes of two codes, every one of them."""
    return torch.arange(torch.Size(shape).numel()).mul(37).view(shape).to(torch.uint8)


def values_of(pairs):
    return torch.stack([E2M1[(pairs & 15).int()], E2M1[(pairs >> 4).int()]], -1).flatten(-2)


def check(codes, wanted, dtype):
    out = torch.empty(codes.shape, dtype=dtype)
    for values in (codes.dequantize(dtype), codes.dequantize(dtype, out)):
        torch.testing.assert_close(values, wanted, rtol=0, atol=0, equal_nan=True)
    if len(codes.shape) == 3:
        part = codes.part(1).dequantize(dtype)
        torch.testing.assert_close(part, wanted[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_mxfp4(isa, dtype):
    """All codes with all scales, infinite and NaN ones among them."""
    theirs = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    blocks, scales = pairs_of((2, 64, 16, 16)), torch.arange(2048).view(2, 64, 16).to(torch.uint8)
    codes = codes_of("mxfp4", blocks.flatten(2), scales, BF16)
    assert codes.format == "mxfp4" and codes.shape == (2, 64, 512)
    check(codes, theirs(blocks, scales, dtype=dtype).transpose(1, 2).contiguous(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_nvfp4(isa, dtype):
    """compressed-tensors' formula: value * (e4m3 / scale of the tensor), in float32."""
    pairs, over = pairs_of((2, 64, 32)), torch.tensor([3.7])
    scale = torch.arange(512).view(2, 64, 4).to(torch.uint8).view(torch.float8_e4m3fn)
    codes = codes_of("nvfp4", pairs, scale, BF16, over=over)
    wanted = values_of(pairs) * (scale.float() / over).repeat_interleave(16, -1)
    check(codes, wanted.to(dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("of", [F32, torch.float8_e8m0fnu], ids=short)
def test_fp4(isa, dtype, of):
    pairs, scale = pairs_of((2, 8, 48)), torch.linspace(0.01, 9, 48).view(2, 8, 3).to(of)
    codes = codes_of("fp4", pairs, scale, BF16)
    check(codes, (values_of(pairs) * scale.float().repeat_interleave(32, -1)).to(dtype), dtype)


@pytest.mark.parametrize("of", [F32, torch.float8_e8m0fnu, torch.uint8], ids=short)
def test_fp8_of_a_stack(of):
    stored = torch.arange(2 * 24 * 40).view(2, 24, 40).mul(37).to(torch.uint8)
    stored = stored.view(torch.float8_e4m3fn)
    scale = torch.linspace(0.01, 9, 12).view(2, 2, 3).to(of)
    if of == torch.uint8:
        scale = torch.arange(12).mul(21).view(2, 2, 3).to(of)
    codes = codes_of("fp8", stored, scale, BF16, block=(16, 16))
    floats = (scale.float() - 127).exp2() if of == torch.uint8 else scale.float()
    whole = floats.repeat_interleave(16, 1)[:, :24].repeat_interleave(16, 2)[..., :40]
    check(codes, stored.float() * whole, F32)


def test_a_weight_of_a_call():
    codes = codes_of("mxfp4", pairs_of((48, 32)), torch.full((48, 2), 125).byte(), BF16)
    generator = torch.Generator().manual_seed(1)
    x, a, b = (torch.randn(*s, generator=generator) for s in ((5, 64), (4, 64), (48, 4)))
    wanted = lora_ext.lora_linear(x, codes.dequantize(F32), a, b)
    assert torch.equal(lora_ext.lora_linear(x, codes, a, b), wanted)


BYTES = torch.zeros(8, 32, dtype=torch.uint8)
FLOAT8 = torch.zeros(8, 32).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("name", "codes", "scale", "words", "message"),
    [
        (
            "mxfp4",
            BYTES,
            torch.zeros(8, 2),
            {},
            "mxfp4 has scales in uint8, but these are in float32",
        ),
        ("mxfp4", FLOAT8, BYTES, {}, "codes in uint8 or int8, but these are in float8_e4m3fn"),
        ("mxfp4", BYTES, BYTES[:, :3], {}, "[8, 64] has scales of [8, 2], but these are [8, 3]"),
        ("mxfp4", BYTES, BYTES[:7, :2], {}, "has scales of [8, 2], but these are [7, 2]"),
        ("mxfp4", BYTES, BYTES[:, :2], {"over": torch.ones(1)}, "has no scale of the whole tensor"),
        ("nvfp4", BYTES, FLOAT8[:, :4], {}, "nvfp4 has a scale of the whole tensor"),
        ("nvfp4", BYTES, FLOAT8[:, :4], {"over": torch.ones(2)}, "a scale of the whole tensor"),
        (
            "fp8",
            FLOAT8,
            torch.ones(1, 1),
            {"block": (4, 16)},
            "blocks of 4 x 16 has scales of [2, 2]",
        ),
        ("fp8", FLOAT8, torch.ones(3, 1), {}, "has scales of [-1, -1], but these are [3, 1]"),
    ],
)
def test_what_does_not_fit_is_named(name, codes, scale, words, message):
    found = codes_of(name, codes, scale, BF16, **words)
    assert isinstance(found, str) and message in found


def test_all_formats_have_a_test():
    assert set(FORMATS) == {"mxfp4", "nvfp4", "fp4", "fp8"}


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_torchs_operations_have_the_kernels_bits(name):
    scale, words = torch.arange(128).view(32, 4).to(torch.uint8), {}
    if name == "nvfp4":
        scale, words = scale.view(torch.float8_e4m3fn), {"over": torch.tensor(3.0)}
    pairs = pairs_of((32, 64 if name == "mxfp4" else 32))
    codes = codes_of(name, pairs, scale, BF16, **words)
    out = torch.empty(codes.shape, dtype=BF16)
    codes.write_by_library(out)
    assert torch.equal(out.nan_to_num(7), codes.dequantize(BF16).nan_to_num(7))
