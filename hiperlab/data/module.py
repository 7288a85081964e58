"""Concepts to training batches, each batch a pure function of (seed, micro step, rank, world size).

Letters: m micro step, W world size, r rank, b rows per concept and micro batch, j row, k global sample number,
    k = (m W + r) b + j, the same numbers for every concept.
So a run may be killed, resumed, split over ranks or worker processes, or hold more concepts, and the rows of a concept
stay the same (tests/data/test_module.py, tests/run/test_resume.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hiperlab.data.batch import Batch
from hiperlab.data.concept import Concept, fill
from hiperlab.data.dataset import DataSet
from hiperlab.data.images import RANDOM, corner, cut, in_range, to_levels
from hiperlab.data.masks import read_mask
from hiperlab.draws import generator, integers, uniform
from hiperlab.errors import UserError

CACHE_BYTES = 1_000_000_000  # pixels kept per process; 512 px: 1271 pictures


class ConceptData(pl.LightningDataModule):
    """One endless epoch of micro batches that starts where the trainer's step count says.

    Use with `Trainer(use_distributed_sampler=False, max_steps=...)`: rank and world size are in the sample numbers.
    """

    def __init__(
        self, dataset: DataSet, seed: int, size: int, micro_batch_size: int, accumulate: int, num_workers: int = 0
    ) -> None:
        """Keep the settings; nothing is read or drawn yet.

        Args:
            dataset: the concepts and their preprocessing, which is settled (its crop and flip are not None).
            seed: the run's seed.
            size: side of the training pictures in pixels.
            micro_batch_size: rows per concept, rank and micro batch (b).
            accumulate: micro batches per optimizer step.
            num_workers: loader processes; they change the speed only.

        Raises:
            UserError: a number out of range.
        """
        super().__init__()
        for key, value, least in (
            ("size", size, 8),
            ("micro_batch_size", micro_batch_size, 1),
            ("accumulate", accumulate, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise UserError(f"{key}={value} is too small: use {least} or more.")
        self.dataset, self.seed, self.size = dataset, seed, size
        self.micro_batch_size, self.accumulate, self.num_workers = micro_batch_size, accumulate, num_workers

    def train_dataloader(self) -> DataLoader:
        """Ready-made batches from the micro step on that follows the trainer's last optimizer step (0 without one)."""
        trainer = self.trainer
        first = trainer.global_step * self.accumulate if trainer else 0
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        stream = MicroBatches(self.dataset, self.seed, self.size, self.micro_batch_size, rank, world)
        return DataLoader(
            stream,
            sampler=_Count(first),
            batch_size=None,  # the stream's items are batches already
            num_workers=self.num_workers,
            generator=torch.Generator(),  # else the loader draws its workers' seeds from the global one
        )


class MicroBatches(Dataset[Batch]):
    """Micro batch m of one rank at index m, for every m >= 0 (no length: it never ends)."""

    def __init__(self, dataset: DataSet, seed: int, size: int, rows: int, rank: int, world: int) -> None:
        assert dataset.crop is not None and dataset.flip is not None, "the method's published ones go in first"
        self.dataset, self.seed, self.size = dataset, seed, size
        self.rows, self.rank, self.world = rows, rank, world
        self.random_crop, self.flip = dataset.crop in RANDOM, dataset.flip
        self.masked = any(concept.masks for concept in dataset.concepts)
        self.cache = _PixelCache(dataset, size)

    def __getitem__(self, m: int) -> Batch:
        """The batch of micro step m: `rows` rows per concept, concept-major."""
        start = (m * self.world + self.rank) * self.rows
        samples = list(range(start, start + self.rows))
        flips = uniform(self.seed, "flip", samples) < self.flip
        views = [view_order(self.seed, samples, len(concept.views)) for concept in self.dataset.concepts]
        prompts = [
            training_prompts(self.seed, samples, *pair) for pair in zip(self.dataset.concepts, views, strict=True)
        ]
        return self._batch(samples, flips, views, prompts)

    def in_turn(self, rows: int) -> Batch:
        """A batch that is no training step's: row j shows view j and says template j, each modulo their number.

        Args:
            rows: of each concept.
        """
        samples, concepts = list(range(rows)), self.dataset.concepts
        flips = uniform(self.seed, "fixed flip", samples) < self.flip
        views = [[sample % len(concept.views) for sample in samples] for concept in concepts]
        prompts = [
            _texts(concept, [sample % len(concept.templates) for sample in samples], shown)
            for concept, shown in zip(concepts, views, strict=True)
        ]
        return self._batch(samples, flips, views, prompts)

    def _batch(
        self, samples: list[int], flips: Tensor, views: Sequence[list[int]], prompts: Sequence[list[str]]
    ) -> Batch:
        """Rows with the sample numbers and flips of all concepts, and each concept's views and prompts."""
        pixels: list[Tensor] = []
        masks: list[Tensor] = []
        offsets: list[int] = []
        sizes: list[tuple[int, ...]] = []
        for index, shown in enumerate(views):
            for sample, view, flip in zip(samples, shown, flips.tolist(), strict=True):
                offset = self._offset(sample, index, view)
                offsets.append(offset or 0)
                pixels.append(in_range(self.cache.picture(index, view, offset, flip)))
                width, height = self.cache.size_of(index, view)
                top, left = corner((width, height), self.size, self.dataset.crop or "squeeze", offset, flip)
                sizes.append((height, width, top, left, self.size, self.size))
                if self.masked:
                    masks.append(self.cache.mask(index, view, offset, flip) / 255.0)
        count = len(self.dataset.concepts)
        return Batch(
            pixels=torch.stack(pixels),
            prompts=[prompt for said in prompts for prompt in said],
            concept=torch.arange(count).repeat_interleave(len(samples)),
            sample=torch.tensor(samples).repeat(count),
            view=torch.tensor([view for shown in views for view in shown]),
            flip=flips.repeat(count),
            offset=torch.tensor(offsets) if self.random_crop else None,
            mask=torch.stack(masks) if self.masked else None,
            sizes=torch.tensor(sizes, dtype=torch.float32),
        )

    def _offset(self, sample: int, concept: int, view: int) -> int | None:
        """Where a random crop begins, a pure function of seed and sample number; None for the middle."""
        if not self.random_crop:
            return None
        room = self.cache.long_side(concept, view) - self.size + 1
        return int(integers(self.seed, "crop", [sample], room))


def view_order(seed: int, samples: Sequence[int], num_views: int) -> list[int]:
    """The view each sample shows: one permutation of all views after another, epoch k // num_views."""
    orders = {e: generator(seed, "order", e).permutation(num_views) for e in {k // num_views for k in samples}}
    return [int(orders[k // num_views][k % num_views]) for k in samples]


def training_prompts(seed: int, samples: Sequence[int], concept: Concept, views: Sequence[int]) -> list[str]:
    """The caption of the view that a sample shows, else a template drawn uniformly; the placeholder filled in."""
    return _texts(concept, integers(seed, "template", samples, len(concept.templates)).tolist(), views)


def _texts(concept: Concept, picks: Sequence[int], views: Sequence[int]) -> list[str]:
    captions = concept.captions or ("",) * len(concept.views)
    return [
        fill(captions[view] or concept.templates[i], concept.placeholder) for i, view in zip(picks, views, strict=True)
    ]


class _PixelCache:
    """Scaled pictures and masks by (concept, view), worked out once while they fit."""

    def __init__(self, dataset: DataSet, size: int) -> None:
        self.dataset, self.size = dataset, size
        self.kept: dict[tuple[int, int, bool], Tensor] = {}  # as levels 0 to 255: a quarter of the numbers' size
        self.sizes: dict[tuple[int, int], tuple[int, int]] = {}
        self.room = CACHE_BYTES

    def picture(self, concept: int, view: int, offset: int | None, flip: bool) -> Tensor:
        """Levels uint8 (3, size, size) of a picture, cut at `offset` (None: in the middle) and mirrored."""
        return self._cut(self._scaled(concept, view, mask=False), offset, flip)

    def mask(self, concept: int, view: int, offset: int | None, flip: bool) -> Tensor:
        """Levels uint8 (1, size, size) of a picture's mask, cut and mirrored like it; white for one without."""
        masks = self.dataset.concepts[concept].masks
        if not masks or masks[view] is None:
            return torch.full((1, self.size, self.size), 255, dtype=torch.uint8)
        return self._cut(self._scaled(concept, view, mask=True), offset, flip)

    def size_of(self, concept: int, view: int) -> tuple[int, int]:
        """Width and height of a picture as it was read."""
        if (concept, view) not in self.sizes:
            self.sizes[concept, view] = self.dataset.concepts[concept].views[view].size
        return self.sizes[concept, view]

    def long_side(self, concept: int, view: int) -> int:
        """Of a scaled picture, in pixels."""
        return max(self._scaled(concept, view, mask=False).shape)

    def _cut(self, levels: Tensor, offset: int | None, flip: bool) -> Tensor:
        levels = cut(levels, self.size, offset)
        return levels.flip(-1) if flip else levels

    def _scaled(self, concept: int, view: int, mask: bool) -> Tensor:
        levels = self.kept.get((concept, view, mask))
        if levels is None:
            levels = to_levels(self._read(concept, view, mask), self.size, self.dataset.crop or "squeeze")
            if levels.numel() <= self.room:
                self.room -= levels.numel()
                self.kept[(concept, view, mask)] = levels
        return levels

    def _read(self, concept: int, view: int, mask: bool) -> Image.Image:
        if not mask:
            picture = self.dataset.concepts[concept].views[view]
            self.sizes[concept, view] = picture.size
            return picture
        path = self.dataset.concepts[concept].masks[view]
        assert path, "only masks that are there are read"
        return read_mask(path, None, keep_grey=True)


class _Count(Sampler[int]):
    """first, first + 1, first + 2, ... without end."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[int]:
        m = self.first
        while True:
            yield m
            m += 1
