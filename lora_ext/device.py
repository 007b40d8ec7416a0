"""Which device an argument refers to, and whether this build has kernels for it that are right."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

import lora_ext._C as _C

from .torch_state import disabled_modes

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


def is_right(
    device: torch.device, wrong: Callable[[torch.device], str], what: str, instead: str
) -> bool:
    """Whether kernels run on a device, with correct results for a small case; a warning where these
    differ.

    Args:
        wrong: runs the case and names what differs, "" for nothing.
        what, instead: what the kernels do, and what runs in their place, in the warning.
    """
    try:
        with disabled_modes():  # of fake tensors, say, which have no values
            found = wrong(device)
    except torch.OutOfMemoryError:  # no information about the kernels
        raise
    except RuntimeError:  # includes NotImplementedError, raised if the op has no kernel
        return False
    if found:
        text = f"the kernels that {what} failed their check on {device}, in {found}: {instead}"
        warnings.warn(f"lora_ext: {text}", stacklevel=2)
    return not found
