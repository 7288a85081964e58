"""Stable Diffusion 1.x in its real shape with random weights: a step costs the same, and no file is needed.

The numbers are those of the released configs (text_encoder/config.json, vae/config.json and unet/config.json of
stable-diffusion-v1-5).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from hiperlab.model.noise import SCHEDULE
from hiperlab.model.stack import FrozenStack
from hiperlab.model.text_towers import TextTower
from hiperlab.model.tiny import clip_tokenizer


def sd15(name: str, size: int) -> FrozenStack:
    """The stack, torch's own initialisation from seed 0; the global random state is left as it was.

    Args:
        name: how results call it.
        size: picture side in pixels, a multiple of 64 (512 as released).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text, vae, unet = parts()
    return FrozenStack(
        name=name,
        towers=[TextTower(clip_tokenizer(), text)],
        vae=vae,
        unet=unet,
        scheduler_config=SCHEDULE,
        size=size,
        trained=False,
        note="random weights in Stable Diffusion 1.5's shape: only its speed means anything",
    )


def parts() -> tuple[CLIPTextModel, AutoencoderKL, Any]:
    """Text encoder (123 million parameters), autoencoder (84) and U-Net (860)."""
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            projection_dim=768, bos_token_id=49406, eos_token_id=49407,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4, norm_num_groups=32,
        sample_size=512, scaling_factor=0.18215,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=[320, 640, 1280, 1280], layers_per_block=2, attention_head_dim=8,
        cross_attention_dim=768, norm_num_groups=32,
    )  # fmt: skip
    return text, vae, unet


def vit_b16() -> CLIPVisionModel:
    """A picture tower in the shape of OpenAI's ViT-B/16 (86 million parameters), which StyleDiffusion reads with."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
            patch_size=16,
        )
    )  # fmt: skip
