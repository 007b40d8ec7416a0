import torch

with_cuda: bool
compiler: str

def cpu_isa() -> str:
    """The CPU kernels in use: "amx", "avx512", "avx2", "portable", or "library" for ATen alone."""

def available_cpu_isas() -> list[str]:
    """What this build and processor have, best first."""

def set_cpu_isa(name: str) -> None:
    """Uses one of available_cpu_isas(), "library", or "auto" for the best; for tests and timings.

    Raises:
        ValueError: the name is unknown or not available here.
    """

def cpu_library_reason(
    rows: int, rank: int, x_dtype: torch.dtype, adapter_dtype: torch.dtype
) -> str:
    """Why a call takes the library route, or "" when the vector kernels take it."""
