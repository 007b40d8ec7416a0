"""What the tests of kernels that dequantise share."""

import torch
from helpers import BF16, F16, F32

DTYPES = (F32, BF16, F16)
TABLE = torch.linspace(-1, 1, 16) ** 3  # any sixteen values


def four_bit_case(count, block, seed=0, nested=None):
    """(codes, scale, the op's other arguments, the values in float32)."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (count,), generator=generator)
    padded = torch.cat([codes, codes.new_zeros(count % 2)])
    packed = (padded[::2] << 4 | padded[1::2]).to(torch.uint8)
    blocks = -(-count // block)
    parts = {"table": TABLE, "block": block}
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
