"""Folders of tiny models in MXFP4 and FP8, as they are on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from helpers import BF16, F32
from mixture_helpers import mixture
from safetensors.torch import load_file, save_file
from torch import Tensor

WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_hidden_layers": 2}
# Kind of a model -> its format, and its own sizes.
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": ("mxfp4", {"intermediate_size": 64}),
    "qwen3_moe": ("fp8", {"moe_intermediate_size": 64}),
    "deepseek_v3": ("fp8", {"moe_intermediate_size": 64, "head_dim": 4}),
    "mixtral": ("fp8", {}),
    "llama": ("fp8", {}),
    "qwen3": ("fp8", {}),
}
BLOCK = 32


def make_folder(folder: Path, kind: str) -> Path:
    """A model's folder; half of the scales are of values that bfloat16 has."""
    method, sizes = FOLDERS[kind]
    model = mixture(kind, dtype=BF16, **{**WIDTHS, **sizes})
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    make = {"mxfp4": _in_mxfp4, "fp8": _in_fp8}[method]
    generator = torch.Generator().manual_seed(3)
    stored: dict[str, Tensor] = {}
    for name, values in load_file(file).items():
        stored |= make(name, values, generator) or {name: values}
    save_file(stored, file, metadata={"format": "pt"})
    quantization: dict[str, Any] = {"quant_method": method}
    if method == "fp8":
        quantization |= {"weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
        quantization["modules_to_not_convert"] = ["lm_head"]
    write_config(folder, quantization_config=quantization)
    return folder


def write_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _in_mxfp4(name: str, values: Tensor, generator: torch.Generator) -> dict[str, Tensor] | None:
    """gpt-oss' stacks ``[E, in, out]``: codes of rows of W, and scales about those of W."""
    if values.dim() != 3:
        return None
    count, columns, rows = values.shape
    shape = count, rows, columns // 32
    codes = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(122, 126, shape, generator=generator, dtype=torch.uint8)
    return {f"{name}_blocks": codes, f"{name}_scales": scales}


def _in_fp8(name: str, values: Tensor, generator: torch.Generator) -> dict[str, Tensor] | None:
    """Linear layers and experts, but for the head, the embedding and routers."""
    kept = ("embed", "lm_head", "norm", ".gate.weight", "router")
    if values.dim() != 2 or any(part in name for part in kept):
        return None
    scale = torch.rand([-(-size // BLOCK) for size in values.shape], generator=generator) + 0.5
    whole = scale.repeat_interleave(BLOCK, 0)[: len(values)].repeat_interleave(BLOCK, 1)
    codes = (values.to(F32) / whole[:, : values.shape[1]]).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scale}
