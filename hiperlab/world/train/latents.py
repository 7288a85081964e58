"""Stage latents: every training picture's posterior (mean and log-variance, float16), so the U-Net sees no pictures."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hiperlab import files
from hiperlab.world.train import vae as stage_vae
from hiperlab.world.train.pictures import Pictures, whole
from hiperlab.world.train.plan import Workshop


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> scaled mean and log-variance of the scaled latent (B, 8, H/8, W/8)."""
    scale = vae.config.scaling_factor
    with torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=pixels.is_cuda):
        moments = vae.encode(pixels).latent_dist.parameters.float()
    mean, log_variance = moments.chunk(2, dim=1)
    spread = 2 * float(np.log(scale))
    return torch.cat([mean * scale, log_variance.clamp(-20, 20) + spread], dim=1)


def work(shop: Workshop, *, batch: int) -> dict[str, Any]:
    """The stage: one file per shard of the pictures; made anew for another autoencoder."""
    vae = stage_vae.load(shop)
    main = Pictures(shop.folder("data") / "main", shop.device)
    key = vae_key(shop)
    spread = []
    for index, (start, stop) in enumerate(zip(main.starts, main.starts[1:])):
        path = shop.folder("latents") / f"{key}-{index:05d}.npy"
        if not path.is_file() or len(np.load(path, mmap_mode="r")) != stop - start:
            parts = torch.arange(int(start), int(stop)).split(batch)
            moments = torch.cat([encode(vae, main.batch(part)).half().cpu() for part in parts]).numpy()
            files.atomic_write(path, functools.partial(np.save, arr=moments))
        spread.append(float(np.load(path, mmap_mode="r")[:256, :4].astype(np.float32).std()))
    for old in shop.folder("latents").glob("*.npy"):
        if not old.name.startswith(f"{key}-"):
            old.unlink()
    check = {"pictures": len(main), "standard_deviation": round(float(np.mean(spread)), 4)}
    return {"status": "finished", "vae": key, "check": check}


def vae_key(shop: Workshop) -> str:
    """12 digits of the autoencoder's weights: latents belong to one."""
    return files.sha256(shop.weights("vae") / "diffusion_pytorch_model.safetensors")[:12]


def load(shop: Workshop) -> Tensor:
    """All moments (N, 8, h, w) float16: on a GPU in its memory, else mapped from the disk shard by shard."""
    key = vae_key(shop)
    pictures = whole(shop.folder("data") / "main")
    paths: list[Path] = [shop.folder("latents") / f"{key}-{index:05d}.npy" for index in range(len(pictures))]
    return torch.cat([torch.from_numpy(np.load(path)) for path in paths]).to(shop.device)
