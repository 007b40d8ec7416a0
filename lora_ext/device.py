"""Which device an argument refers to, whether this build has kernels, and what memory is free."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

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


def free_memory() -> int | None:
    """Bytes of the main memory, swap included, that processes can still have; None where Linux does
    not say it. A limit of the cgroup counts, without its pages of files."""
    with suppress(OSError, KeyError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {name: int(rest.split()[0]) for name, _, rest in (s.partition(":") for s in lines)}
        free = (sizes["MemAvailable"] + sizes["SwapFree"]) * 1024
        with suppress(OSError, ValueError):
            group = Path("/sys/fs/cgroup")
            limit, used = (int((group / f"memory.{s}").read_text()) for s in ("max", "current"))
            stat = (group / "memory.stat").read_text().split()
            used -= int(stat[stat.index("inactive_file") + 1])
            free = min(free, limit - used)
        return free
    return None
