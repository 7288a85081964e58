"""Diffusers' own pipeline around a stack's parts: what plain users draw our files with."""

from __future__ import annotations

import copy

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from hiperlab.model.stack import FrozenStack


def pipeline(stack: FrozenStack) -> StableDiffusionPipeline:
    """Around copies: its adapters change modules in place."""
    parts = copy.deepcopy(stack)
    pipe = StableDiffusionPipeline(
        parts.vae, parts.text, parts.tokenizer, parts.unet, DDIMScheduler.from_config(parts.scheduler_config),
        None, None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: StableDiffusionPipeline, prompt: str, seed: int, size: int) -> torch.Tensor:
    """One picture (1, 3, size, size) in [0, 1] of three steps with guidance 7.5."""
    return pipe(
        prompt, num_inference_steps=3, guidance_scale=7.5, height=size, width=size, output_type="pt",
        generator=torch.Generator().manual_seed(seed),
    ).images  # fmt: skip
