"""Philox-4x32 with 7 rounds in plain Python, as the comment of csrc/common/philox.h defines it."""

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def philox_4x32(counter: list[int], key: list[int], rounds: int) -> list[int]:
    """Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


def is_kept(seed: int, row: int, col: int, dropout_p: float) -> bool:
    group = (col // 32) * 4 + (col % 8) // 2
    counter = [row & WORD, group & WORD, 0, row >> 32]
    words = philox_4x32(counter, [seed & WORD, (seed >> 32) & WORD], rounds=7)
    draw = (words[(col % 32) // 8] >> (16 * (col % 2))) & 0xFFFF
    return draw < max(1, int((1 - dropout_p) * 65536 + 0.5))


def mask(
    seed: int, rows: int, cols: int, dropout_p: float, row_offset: int = 0, col_offset: int = 0
) -> Tensor:
    """[rows, cols] of bool, element by element."""
    return torch.tensor(
        [
            [is_kept(seed, row_offset + i, col_offset + j, dropout_p) for j in range(cols)]
            for i in range(rows)
        ]
    ).view(rows, cols)
