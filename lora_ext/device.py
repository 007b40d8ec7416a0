"""Which device an argument refers to, and whether this build has kernels."""

from __future__ import annotations

import torch

import lora_ext._C as _C

NO_KERNELS = "this build has no CUDA kernels; lora_ext.build_info() says why"


def indexed(device: torch.device | str | None = None) -> torch.device:
    """A device with its index, which identifies its card and its tables.

    Args:
        device: ``None`` and a CUDA device without an index mean the current CUDA device; any other
            device is itself.

    Raises:
        RuntimeError: the text names no device, or torch's own error where it finds no CUDA device.
    """
    device = torch.device("cuda" if device is None else device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def need_kernels(function: str) -> None:
    """Raises RuntimeError, which names the function that was called, in a build without CUDA
    kernels."""
    if not _C.with_cuda:
        raise RuntimeError(f"lora_ext.{function}: {NO_KERNELS}")
