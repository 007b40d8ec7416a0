"""Does a variant compute the same layer? Errors of its output and gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import Problem
from .shapes import FORWARD
from .variants import Variant

# Largest and rms difference from naive that rounding explains, relative to the largest and the rms
# value of the tensor. Both sides round, so these are twice what either may be off.
TOLERANCE = {
    torch.float64: (1e-10, 1e-11),
    torch.float32: (1e-4, 1e-5),
    torch.bfloat16: (4e-2, 1e-2),
    torch.float16: (1e-2, 2e-3),
}


@dataclass(frozen=True)
class Error:
    """Largest and root mean square error, relative to the expected tensor's."""

    max: float
    rms: float

    def within(self, tolerance: tuple[float, float]) -> bool:
        """False for NaN, too."""
        return self.max <= tolerance[0] and self.rms <= tolerance[1]


def error_of(actual: Tensor, expected: Tensor) -> Error:
    """Relative errors of one tensor; a wrong shape counts as infinitely wrong."""
    if actual.shape != expected.shape:
        return Error(float("inf"), float("inf"))
    expected = expected.detach().double()
    difference = actual.detach().double() - expected
    tiny = torch.finfo(torch.float64).tiny
    scale_max = expected.abs().max().item() + tiny
    scale_rms = expected.square().mean().sqrt().item() + tiny
    return Error(
        difference.abs().max().item() / scale_max,
        difference.square().mean().sqrt().item() / scale_rms,
    )


def outputs(variant: Variant, problem: Problem, mode: str) -> dict[str, Tensor]:
    """The output on the first input and, unless it is a forward, dx, dlora_a and dlora_b."""
    x = problem.inputs[0]
    if mode == FORWARD:
        with variant, torch.no_grad():
            return {"out": variant.call(x)}
    with variant:
        out = variant.call(x)
        grads = torch.autograd.grad(out, (x, *variant.adapters), problem.grads[0])
    return {"out": out, **dict(zip(("dx", "dlora_a", "dlora_b"), grads, strict=True))}


def disagreements(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """One sentence for each tensor that is further from naive's than rounding explains."""
    found = []
    for name, reference in expected.items():
        error = error_of(actual[name], reference)
        tolerance = TOLERANCE[reference.dtype]
        if not error.within(tolerance):
            found.append(
                f"{name}: max error {error.max:.1e} (allowed {tolerance[0]:.0e}), "
                f"rms error {error.rms:.1e} (allowed {tolerance[1]:.0e})"
            )
    return found
