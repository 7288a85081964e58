"""Stage latents: every training picture's posterior (mean and log-variance, float16), so the U-Net sees no pictures."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hiperlab import files
from hiperlab.miniature import record
from hiperlab.miniature.parts import encoder_key, load_autoencoder
from hiperlab.miniature.pictures import Pictures, whole
from hiperlab.miniature.plan import Workshop

SETS = ("main", "calm", "two")  # the sets that the U-Net learns from; only main must be there


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
    """The stage: one file per shard of the pictures; made anew for another encoder."""
    vae = load_autoencoder(shop)
    key = encoder_key(vae)
    spread: list[float] = []
    counts: dict[str, int] = {}
    for name in (name for name in SETS if name == "main" or whole(shop.folder("data") / name)):
        pictures = Pictures(shop.folder("data") / name, shop.device)
        counts[name] = len(pictures)
        for path, start, stop in zip(_paths(shop, key, name), pictures.starts[:-1], pictures.starts[1:], strict=True):
            if not path.is_file() or len(np.load(path, mmap_mode="r")) != stop - start:
                parts = torch.arange(int(start), int(stop)).split(batch)
                moments = torch.cat([encode(vae, pictures.batch(part)).half().cpu() for part in parts]).numpy()
                files.atomic_write(path, functools.partial(np.save, arr=moments))
            spread.append(float(np.load(path, mmap_mode="r")[:256, :4].astype(np.float32).std()))
    for old in shop.folder("latents").glob("*.npy"):
        if not old.name.startswith(f"{key}-"):
            old.unlink()
    check = {"pictures": counts, "standard_deviation": round(float(np.mean(spread)), 4)}
    return {"status": "finished", "encoder": key, "check": check}


def _paths(shop: Workshop, key: str, name: str) -> list[Path]:
    """One file per shard of a set; those of "main" bear no set's name."""
    stem = key if name == "main" else f"{key}-{name}"
    count = len(whole(shop.folder("data") / name))
    return [shop.folder("latents") / f"{stem}-{index:05d}.npy" for index in range(count)]


def load(shop: Workshop, name: str = "main") -> Tensor:
    """All moments of a set (N, 8, h, w) float16, on the device."""
    known: Any = record.read(shop.folder("latents"))
    paths = _paths(shop, known["encoder"], name)
    return torch.cat([torch.from_numpy(np.load(path)) for path in paths]).to(shop.device)
