"""The op's dropout: its seed, its mask and the factor of what it keeps."""

import torch
from torch import Tensor

_mask = torch.ops.lora_ext.dropout_mask.default

# Seeds are any non-negative int64.
_SEED_LIMIT = 2**63 - 1


def draw_seed(device: torch.device) -> Tensor:
    """An int64 seed tensor of one element on `device`, drawn from torch's default generator.

    It repeats when the generator's state repeats (activation checkpointing restores it) and
    differs in each replay of a CUDA graph, whose captured generator advances.
    """
    return torch.randint(_SEED_LIMIT, (), dtype=torch.int64, device=device)


def keep_scale_of(dropout_p: float) -> float:
    """1 / keep probability, which is a multiple of 1/65536: the factor of what dropout keeps."""
    return 65536 / max(1, int((1 - dropout_p) * 65536 + 0.5))


def dropout_mask(
    seed: int | Tensor,
    rows: int,
    cols: int,
    dropout_p: float,
    row_offset: int = 0,
    col_offset: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The mask that `lora_linear` applies: ``[rows, cols]`` of bool, True where x is kept.

    Element (i, j) is Philox-4x32-7 (Salmon et al. 2011) of the seed, row_offset + i and
    col_offset + j: the same on every device and instruction set, so that a shard can compute its
    part of the whole mask. Rows are those of x flattened to ``[M, in_features]``.

    Args:
        seed: an int, or an int64 tensor of one element (then `device` is the tensor's).
        rows, cols: the shape.
        dropout_p: probability in [0, 1); kept with round(65536 (1 - dropout_p)) / 65536.
        row_offset, col_offset: position of the first element in the whole mask, >= 0.
        device: where to compute it when seed is an int.

    Raises:
        RuntimeError: a number is out of range.
    """
    if not isinstance(seed, Tensor):
        seed = torch.tensor(seed, dtype=torch.int64, device=device)
    return _mask(seed, rows, cols, dropout_p, row_offset, col_offset)
