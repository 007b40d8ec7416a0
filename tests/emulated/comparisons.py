"""Comparisons of two lists of results, for child processes of both emulated packages."""

import torch


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def close(results: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(
        (one.float() - other.float()).abs().max() <= 2**-6 * other.float().abs().max()
        for one, other in zip(results, expected, strict=True)
    )
