"""Stage data: draw every picture once, in shards, with all cores; and read them back.

Drawing needs skia-python. On a machine without it (and without network) carry its wheel, or draw elsewhere and copy
the folder `data/`: a training finds its pictures finished and never draws.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hiperlab import files
from hiperlab.clock import Clock
from hiperlab.errors import UserError
from hiperlab.miniature import parts
from hiperlab.miniature.draw_shard import HEADS, Shard, Source, draw
from hiperlab.miniature.plan import Workshop

# in the order they are drawn: a short budget shortens the last
SETS = ("held", "pairs", "calm", "two", "main", "judge", "judge_two")


def shards(
    shop: Workshop, name: str, *, pictures: int, views: int, shard: int, wordings: int, seed: int
) -> list[Shard]:
    """The shards of one set."""
    source = Source(name, seed, views)
    folder = shop.folder("data") / name
    return [
        Shard(source, start, min(start + shard, pictures), shop.size, wordings, folder, index)
        for index, start in enumerate(range(0, pictures, shard))
    ]


def work(
    shop: Workshop,
    *,
    minutes: float | None,
    processes: int | None,
    shard: int,
    wordings: int,
    sets: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    """The stage.

    Args:
        shop: what all stages share.
        minutes: budget; what is not drawn by then is left out, whole shards only.
        processes: drawing processes; null = one per core.
        shard: pictures a shard; a multiple of every set's views.
        wordings: captions of each picture.
        sets: per set: pictures and views; no pictures, no set.

    Raises:
        UserError: skia is not installed and pictures are missing; views do not divide the shard.
    """
    wanted: list[Shard] = []
    names = [name for name in SETS if sets[name]["pictures"]]
    for name in names:
        if shard % sets[name]["views"] or sets[name]["pictures"] % sets[name]["views"]:
            raise UserError(
                f"data.sets.{name}.views={sets[name]['views']} must divide data.shard={shard} and pictures."
            )
        wanted += shards(shop, name, **sets[name], shard=shard, wordings=wordings, seed=shop.seed)
    missing = [s for s in wanted if not (s.labels.is_file() and s.pictures.is_file())]
    if missing and importlib.util.find_spec("skia") is None:
        raise UserError(
            f"{len(missing)} of {len(wanted)} shards are not drawn and skia-python is not installed. Install it, or "
            f"draw on another machine (stages=[data]) and copy {shop.folder('data')} here."
        )
    start = time.monotonic()
    drawn = _draw_all(shop, missing, processes or os.cpu_count() or 1, None if minutes is None else 60 * minutes)
    seconds = time.monotonic() - start
    counts = {name: _count(shop.folder("data") / name) for name in names}
    fresh = sum(s.stop - s.start for s in missing[:drawn])
    for name in names:
        if not counts[name]:
            raise UserError(f"no shard of set {name} was drawn within {minutes} minutes: raise data.minutes.")
    status = "finished" if drawn == len(missing) else "budget"
    check = {"pictures": counts, "per_second": round(fresh / seconds, 1) if fresh else None}
    return {"status": status, "seconds": round(seconds, 1), "check": check}


def _draw_all(shop: Workshop, missing: list[Shard], processes: int, budget: float | None) -> int:
    """Draw shards in order; returns how many were finished when the time was up."""
    clock, done = Clock(shop.say_every), 0
    for _ in _pool(missing, min(processes, len(missing))):
        done += 1
        if clock.due():
            left = clock.left(done, len(missing)) or 0.0
            print(f"data {done}/{len(missing)} shards  {left / 60:.1f} min left", file=sys.stderr, flush=True)
        if budget is not None and clock.elapsed > budget:
            break
    return done


def _pool(missing: list[Shard], processes: int) -> Iterable[int]:
    """The shards' numbers as they are finished, in order; alone without further processes."""
    if processes <= 1:
        yield from map(draw, missing)
        return
    # spawn: torch's threads do not survive a fork
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(draw, missing)


def _count(folder: Path) -> int:
    return sum(len(np.load(path, mmap_mode="r")) for path in whole(folder))


def whole(folder: Path) -> list[Path]:
    """Picture files of the shards that are complete, in order, up to the first gap."""
    found = []
    for index, path in enumerate(sorted(folder.glob("[0-9]*.npy"))):
        if path.stem != f"{index:05d}" or not path.with_suffix(".json").is_file():
            break
        found.append(path)
    return found


class Pictures:
    """A set of pictures with captions and attributes.

    Args:
        folder: `data/<set>` of a training.
        device: where batches are wanted.
        cache: keep all pictures on that device.

    Attributes:
        labels: head -> LongTensor (N,), values as in `draw_shard.HEADS`; "identity": number of the subject, from 0.
        captions: per picture its wordings; named: per picture the wording that has a name in it.
    """

    def __init__(self, folder: Path, device: torch.device, cache: bool = False) -> None:
        self.folder, self.device = folder, device
        paths = whole(folder)
        if not paths:
            raise UserError(f"{folder} holds no pictures: run stages=[data] first.")
        self.shards = [np.load(path, mmap_mode="r") for path in paths]
        self.starts = np.cumsum([0, *(len(shard) for shard in self.shards)])
        columns = [json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) for path in paths]
        self.captions: list[list[str]] = [texts for column in columns for texts in column["captions"]]
        self.named: list[str] = [text for column in columns for text in column["named"]]
        self.labels = {
            head: torch.tensor([value for column in columns for value in column[head]]) for head in (*HEADS, "identity")
        }
        self.labels["identity"] -= self.labels["identity"].min()
        self.cached = self._all() if cache else None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _all(self) -> Tensor:
        whole_set = torch.empty(len(self), *self.shards[0].shape[1:], dtype=torch.uint8, device=self.device)
        for shard, start in zip(self.shards, self.starts):
            whole_set[start : start + len(shard)] = torch.from_numpy(np.array(shard)).to(self.device)
        return whole_set

    def batch(self, rows: Tensor, size: int | None = None) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], float32, channels last, on the device; reduced to `size` pixels a side."""
        if self.cached is not None:
            pixels = self.cached[rows.to(self.device)]
        else:
            which = np.searchsorted(self.starts, rows.numpy(), side="right") - 1
            arrays = [self.shards[s][row - self.starts[s]] for s, row in zip(which, rows.tolist())]
            pixels = torch.from_numpy(np.stack(arrays)).to(self.device)
        pixels = pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)  # stays channels last in memory
        return reduced(pixels, size or pixels.shape[-1])

    def tokens(self, tokenizer: Any, named: bool = False) -> Tensor:
        """Token ids (N, wordings, 77) int16 on the device, cached beside the pictures for this tokenizer.

        Args:
            tokenizer: of the miniature.
            named: of the captions with names, one a picture, instead.
        """
        captions = [[text] for text in self.named] if named else self.captions
        path = self.folder / f"{'named' if named else 'tokens'}-{parts.name_of(tokenizer)}.npy"
        if not path.is_file() or len(np.load(path, mmap_mode="r")) != len(self):
            flat = [text for texts in captions for text in texts]
            encoded = [parts.encode_texts(tokenizer, flat[i : i + 20000]) for i in range(0, len(flat), 20000)]
            ids = np.concatenate(encoded).reshape(len(self), -1, parts.LENGTH).astype(np.int16)
            files.atomic_write(path, lambda file: np.save(file, ids))
        return torch.from_numpy(np.load(path)).to(self.device)  # int16: made long where used


def reduced(pixels: Tensor, size: int) -> Tensor:
    """Pictures (B, 3, H, W) at `size` pixels a side, every pixel the mean of a square."""
    factor = pixels.shape[-1] // size
    return pixels if factor == 1 else torch.nn.functional.avg_pool2d(pixels, factor)


def soften(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """What a decoder does to pictures: some blurred, all a little noisy. A judge must not mind it.

    Args:
        pixels: (B, 3, H, W) in [-1, 1].
        generator: on the pixels' device.
    """
    shape = (len(pixels), 1, 1, 1)
    blurred = torch.nn.functional.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
    share = torch.rand(shape, generator=generator, device=pixels.device)
    amount = 0.1 * torch.rand(shape, generator=generator, device=pixels.device)
    noise = torch.randn(pixels.shape, generator=generator, device=pixels.device)
    return torch.lerp(pixels, blurred, share) + amount * noise
