"""Initial values of lora_a and lora_b."""

import math

import torch
from torch import Tensor, nn

from .adapter_spec import AdapterSpec


@torch.no_grad()
def plain_(spec: AdapterSpec, lora_a: Tensor, lora_b: Tensor) -> None:
    """Of an init that takes nothing from the weight: lora_a as nn.Linear's weight (Kaiming uniform,
    a = sqrt(5)), as in loralib, or normal with standard deviation 1 / r, as PEFT's "gaussian";
    lora_b zero."""
    if spec.init_lora_weights is True:
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
    else:
        nn.init.normal_(lora_a, std=1.0 / spec.r)
    nn.init.zeros_(lora_b)


@torch.no_grad()
def embedding_(lora_a: Tensor, lora_b: Tensor) -> None:
    """lora_a zero, lora_b standard normal, as in loralib and PEFT for embeddings."""
    nn.init.zeros_(lora_a)
    nn.init.normal_(lora_b)


@torch.no_grad()
def pissa(weight: Tensor, spec: AdapterSpec) -> tuple[Tensor, Tensor]:
    """(lora_a, lora_b) with scaling * lora_b lora_a = U_r diag(S_r) V_r^T (Meng et al. 2024).

    Args:
        weight: ``[out, in]``.
    """
    u, s, vt = torch.linalg.svd(_wide(weight), full_matrices=False)
    root = torch.sqrt(s[: spec.r] / spec.scaling)
    return root[:, None] * vt[: spec.r], u[:, : spec.r] * root


@torch.no_grad()
def olora(weight: Tensor, spec: AdapterSpec) -> tuple[Tensor, Tensor]:
    """(lora_a, lora_b) = (R[:r], Q[:, :r]) of weight = Q R (Bueyuekakyuez 2024).

    Args:
        weight: ``[out, in]``.
    """
    q, r = torch.linalg.qr(_wide(weight))
    return r[: spec.r], q[:, : spec.r]


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
