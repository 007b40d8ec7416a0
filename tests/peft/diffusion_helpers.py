"""Transformers and a UNet of diffusers, small and of random weights, with two adapters of PEFT."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft_helpers import randomize
from torch import Tensor, nn

import lora_ext


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    sizes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
    sizes |= {"attention_head_dim": 16, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    return FluxTransformer2DModel(patch_size=1, in_channels=4, axes_dims_rope=[4, 4, 8], **sizes)


def _sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    sizes = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8}
    sizes |= {"joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 64}
    return SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, **sizes
    )


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def _wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 32}
    sizes |= {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 64}
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), cross_attn_norm=True, rope_max_seq_len=32, **sizes
    )


# Model -> (maker, what has adapters, shapes of one sample's inputs, shapes of inputs of all).
MODELS: dict[str, tuple[Any, list[str], dict[str, tuple], dict[str, tuple]]] = {
    "flux": (
        _flux,
        ["to_q", "to_v", "to_out.0", "proj_mlp"],
        {
            "hidden_states": (16, 4),
            "encoder_hidden_states": (8, 32),
            "pooled_projections": (32,),
            "timestep": (),
        },
        {"img_ids": (16, 3), "txt_ids": (8, 3)},
    ),
    "sd3": (
        _sd3,
        ["to_q", "to_v", "to_out.0", "add_k_proj"],
        {
            "hidden_states": (4, 8, 8),
            "encoder_hidden_states": (8, 32),
            "pooled_projections": (64,),
            "timestep": (),
        },
        {},
    ),
    "unet": (
        _unet,
        ["to_q", "to_v", "to_out.0", "conv1"],
        {"sample": (4, 8, 8), "timestep": (), "encoder_hidden_states": (6, 16)},
        {},
    ),
    "wan": (
        _wan,
        ["to_q", "to_k", "to_out.0", "ffn.net.2"],
        {"hidden_states": (4, 2, 8, 8), "timestep": (), "encoder_hidden_states": (12, 16)},
        {},
    ),
}


def adapted(name: str, seed: int = 0) -> nn.Module:
    """A model with adapters a and b, of which b is active."""
    make, targets, _, _ = MODELS[name]
    torch.manual_seed(1)
    model = make().eval()
    model.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=targets), "a")
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets), "b")
    return randomize(model, seed)


def both(name: str) -> tuple[nn.Module, nn.Module]:
    """(as diffusers and PEFT compute it, accelerated)."""
    return adapted(name), lora_ext.accelerate(adapted(name))


def inputs(name: str, batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    _, _, each, shared = MODELS[name]
    shapes = {key: (batch, *shape) for key, shape in each.items()} | shared
    found = {
        key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()
    }
    return found | {"timestep": torch.linspace(100, 900, batch)}


def twice(name: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch of classifier-free guidance: all samples, and then all of them again."""
    shared = MODELS[name][3]
    return {key: x if key in shared else torch.cat([x, x * 0.7]) for key, x in given.items()}


@torch.no_grad()
def output(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return model(**given, return_dict=False)[0]
