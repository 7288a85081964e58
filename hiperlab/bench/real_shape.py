"""Stable Diffusion 1.x and XL in their real shapes with random weights: a step costs the same, and no file is needed.

The numbers are those of the released configs (text_encoder/config.json, vae/config.json and unet/config.json of
stable-diffusion-v1-5; the same and text_encoder_2/config.json of stable-diffusion-xl-base-1.0).
"""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from hiperlab.model.noise import SCHEDULE
from hiperlab.model.stack import FrozenStack
from hiperlab.model.tiny import untrained


def sd15(name: str, size: int) -> FrozenStack:
    """The stack, torch's own initialisation from seed 0; the global random state is left as it was.

    Args:
        name: how results call it.
        size: picture side in pixels, a multiple of 64 (512 as released).
    """
    note = "random weights in Stable Diffusion 1.5's shape: only its speed means anything"
    return untrained(parts, 0, name=name, scheduler_config=SCHEDULE, size=size, note=note)


def parts() -> tuple[CLIPTextModel, AutoencoderKL, Any]:
    """Text encoder (123 million parameters), autoencoder (84) and U-Net (860)."""
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=[320, 640, 1280, 1280], layers_per_block=2, attention_head_dim=8,
        cross_attention_dim=768, norm_num_groups=32,
    )  # fmt: skip
    return _vit_l(), _autoencoder(512, 0.18215), unet


def sdxl(name: str, size: int) -> FrozenStack:
    """SDXL's stack, as `sd15`.

    Args:
        name: how results call it.
        size: picture side in pixels, a multiple of 64 (1024 as released).
    """
    note = "random weights in SDXL's shape: only its speed means anything"
    return untrained(sdxl_parts, 0, name=name, scheduler_config=SCHEDULE, size=size, note=note)


def sdxl_parts() -> tuple[CLIPTextModel, CLIPTextModelWithProjection, AutoencoderKL, Any]:
    """SDXL's text encoders (123 and 695 million parameters), autoencoder (84) and U-Net (2567)."""
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
            projection_dim=1280, hidden_act="gelu", bos_token_id=49406, eos_token_id=49407,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=128, block_out_channels=[320, 640, 1280], layers_per_block=2, attention_head_dim=[5, 10, 20],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=[1, 2, 10], use_linear_projection=True, norm_num_groups=32,
        cross_attention_dim=2048, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    return _vit_l(), second, _autoencoder(1024, 0.13025), unet


def _vit_l() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            projection_dim=768, bos_token_id=49406, eos_token_id=49407,
        )
    )  # fmt: skip


def _autoencoder(size: int, scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4, norm_num_groups=32,
        sample_size=size, scaling_factor=scaling_factor,
    )  # fmt: skip


def vit_b16() -> CLIPVisionModel:
    """A picture tower in the shape of OpenAI's ViT-B/16 (86 million parameters), which StyleDiffusion reads with."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
            patch_size=16,
        )
    )  # fmt: skip
