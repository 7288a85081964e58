"""Stage recoded: the judges' pictures as the autoencoder gives them back, at the size that judges read.

Whatever the miniature draws has passed its decoder. A judge that has seen sharp pictures only takes the decoder's blur
for another subject: with it, a decoded picture's own subject was found at first place half as often as a true one's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hiperlab import files
from hiperlab.errors import UserError
from hiperlab.miniature import record
from hiperlab.miniature.draw_shard import JUDGING
from hiperlab.miniature.keys import stream
from hiperlab.miniature.parts import load_autoencoder
from hiperlab.miniature.pictures import Pictures, reduced, whole
from hiperlab.miniature.plan import Workshop


def to_bytes(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    return pixels.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


@torch.no_grad()
def recode(vae: Any, pixels: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1], coded to the latents' means and decoded."""
    with torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=pixels.is_cuda):
        return vae.decode(vae.encode(pixels).latent_dist.mode()).sample.to(pixels.dtype)


def work(shop: Workshop, *, batch: int, pictures: int) -> dict[str, Any]:
    """The stage: one file per shard of the pictures; what is there is kept until the stage is begun anew.

    Args:
        shop: what all stages share.
        batch: pictures at a time.
        pictures: most of each set, rounded up to whole shards; the others are read as they are.
    """
    vae = load_autoencoder(shop)
    counts: dict[str, int] = {}
    for name in (name for name in JUDGING if whole(shop.folder("data") / name)):
        source = Pictures(shop.folder("data") / name, shop.device)
        counts[name] = 0
        for index, (start, stop) in enumerate(zip(source.starts[:-1], source.starts[1:], strict=True)):
            if start >= pictures:
                break
            counts[name], path = int(stop), _path(shop, name, index)
            if not path.is_file():
                shop.signals.check(f"stopped after {index} shards of {name}")
                parts = torch.arange(int(start), int(stop)).split(batch)
                small = [to_bytes(reduced(recode(vae, source.batch(p)), shop.reading_size)).cpu() for p in parts]
                files.atomic_write(path, functools.partial(np.save, arr=torch.cat(small).numpy()))
    return {"status": "finished", "check": {"pictures": counts}}


def _path(shop: Workshop, name: str, index: int) -> Path:
    return shop.folder("recoded") / "weights" / f"{name}-{index:05d}.npy"


def _parts(pictures: Pictures) -> Sequence[Tensor]:
    return torch.arange(len(pictures)).split(500)


class Reading:
    """Sets of pictures as a judge reads them while it learns: small, a share of them recoded.

    Args:
        shop: of the training.
        names: of the sets.
        share: of every batch that is recoded, in [0, 1].

    Attributes:
        sets: the pictures with captions and labels.
        labels: as in `Pictures`, all sets one after another.

    Raises:
        UserError: a share out of its range, or stage recoded is not finished.
    """

    def __init__(self, shop: Workshop, names: tuple[str, ...], share: float) -> None:
        if not 0 <= share <= 1:
            raise UserError(f"recoded={share}: expected a share of the pictures, from 0 to 1.")
        if share and not record.done(shop.folder("recoded")):
            raise UserError(f"recoded={share} needs stage recoded, which is not finished in {shop.out}: add it, or 0.")
        self.sets = [Pictures(shop.folder("data") / name, shop.device) for name in names]
        self.share, self.device = share, shop.device
        self.labels = {
            head: torch.cat([pictures.labels[head] for pictures in self.sets]) for head in self.sets[0].labels
        }
        small = shop.reading_size
        self.sharp = torch.cat([to_bytes(each.batch(part, small)) for each in self.sets for part in _parts(each)])
        self.decoded = torch.zeros(0, dtype=torch.uint8)
        self.rows = torch.zeros(len(self), dtype=torch.long)  # of `decoded`, from 1; 0 where a picture has none
        if share:
            self._read_decoded(shop, names)

    def _read_decoded(self, shop: Workshop, names: tuple[str, ...]) -> None:
        found, first = [np.zeros((1, *self.sharp.shape[1:]), np.uint8)], 0
        for name, pictures in zip(names, self.sets):
            for index, (start, stop) in enumerate(zip(pictures.starts[:-1], pictures.starts[1:], strict=True)):
                if (path := _path(shop, name, index)).is_file():
                    count = sum(map(len, found))
                    self.rows[first + start : first + stop] = torch.arange(count, count + stop - start)
                    found.append(np.load(path))
            first += len(pictures)
        self.decoded = torch.from_numpy(np.concatenate(found)).to(shop.device)

    def __len__(self) -> int:
        return len(self.sharp)

    def batch(self, chosen: Tensor, seed: int, purpose: str, step: int) -> Tensor:
        """A step's pictures (B, 3, S, S) in [-1, 1], float32, channels last."""
        pixels = self.sharp[chosen.to(self.device)]
        if self.share:
            rows = self.rows[chosen]
            draws = torch.rand(len(chosen), generator=stream(seed, f"{purpose} recoded", step))
            wanted = ((draws < self.share) & (rows > 0)).to(self.device)
            pixels = torch.where(wanted[:, None, None, None], self.decoded[rows.to(self.device)], pixels)
        return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
