"""Prior preservation (Ruiz et al. 2022, eq. 2): pictures of the bare class, which the frozen model draws, are kept.

Details follow diffusers' examples/dreambooth/train_dreambooth.py (PromptDataset and main).
Axes: R rows of the batch as it came (with class rows behind them 2 R), C latent channels, H, W latent sides.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hiperlab import files
from hiperlab.clock import Clock
from hiperlab.data.batch import Batch
from hiperlab.data.concept import SLOT, fill
from hiperlab.data.images import ImageProblem, corner, read_folder, read_image, to_pixels
from hiperlab.data.module import view_order
from hiperlab.errors import UserError
from hiperlab.loss.diffusion import denoising_loss
from hiperlab.model.plain import draw_plain
from hiperlab.model.sampler import ddim
from hiperlab.model.stack import FrozenStack, weights_digest

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 10.0


def preserved(prediction: Tensor, target: Tensor, weight: float) -> dict[str, Tensor]:
    """Losses of instance rows and class rows: two means, the second weighted (Ruiz et al. 2022, eq. 2).

    Args:
        prediction: (2 R, C, H, W), instance rows first.
        target: same shape.
        weight: w, of the class rows.

    Returns:
        "" and "prior", (R,) each; their means add up to the loss.
    """
    instance, prior = denoising_loss(prediction, target).chunk(2)
    return {"": instance, "prior": weight * prior}


class Prior:
    """The pictures that hold the class, and their part in a step; with weight 0 none are drawn or read.

    Drawn pictures are kept by content (model, caption, sampler, size): another run of the same settings finds them,
    and one that wants more draws only what is missing.

    Args:
        weight: w, the class rows' share in the loss; 0 switches all of this off.
        count: number of class pictures.
        prompt: their caption, "{}" stands for the class noun.
        folder: where drawn pictures are kept, one folder per content; None keeps them in memory.
        real: folder of real pictures of the class to use instead, or None.
        steps: denoising steps of a drawn picture (DDIM).
        guidance: classifier-free guidance scale of a drawn picture.
        batch_size: pictures drawn at a time.
    """

    def __init__(
        self,
        weight: float,
        count: int,
        prompt: str,
        folder: str | None,
        real: str | None,
        steps: int,
        guidance: float,
        batch_size: int,
    ) -> None:
        if weight < 0:
            raise UserError(f"method.prior.weight={weight} is negative. Use 0 for none, 1 as published.")
        if count < 1:
            raise UserError(f"method.prior.count={count} gives no class picture. Use 1 or more, or prior.weight=0.")
        if SLOT not in prompt:
            raise UserError(f"method.prior.prompt={prompt!r} lacks '{SLOT}', the class noun's slot.")
        self.weight, self.count, self.prompt = float(weight), count, prompt
        self.folder = Path(folder).expanduser() if folder else None
        self.real = Path(real).expanduser() if real else None
        self.steps, self.guidance, self.batch_size = steps, float(guidance), batch_size
        self._kept: dict[str, list[Path | Image.Image]] = {}

    def prepare(self, model: FrozenStack, word: str, trainer: Any) -> None:
        """Before training: the first process draws what is missing, the others find it."""
        if not self.weight:
            return
        if trainer.is_global_zero:
            self.pictures(model, word)
        trainer.strategy.barrier()
        self.pictures(model, word)

    def extend(self, batch: Batch, model: FrozenStack, words: Sequence[str], seed: int) -> Batch:
        """The batch with R class rows behind its own R; with weight 0 the batch itself.

        A class row's sample number is -1 - k for the instance row's k: draws of its own, the same in any micro batch.

        Args:
            batch: instance rows.
            model: draws the class pictures.
            words: class noun of each concept.
            seed: of the order of the class pictures.
        """
        if not self.weight:
            return batch
        nouns = [words[concept] for concept in batch.concept.tolist()]
        kept = [self.pictures(model, noun) for noun in nouns]
        chosen = [
            view_order(seed, [sample], len(pictures))[0]
            for sample, pictures in zip(batch.sample.tolist(), kept, strict=True)
        ]
        rows = [self._pixels(pictures[number], model.size) for pictures, number in zip(kept, chosen, strict=True)]
        pixels, own = torch.stack([row for row, _ in rows]), torch.tensor([sizes for _, sizes in rows])
        views = torch.tensor(chosen, device=batch.view.device)
        offset, mask, sizes = batch.offset, batch.mask, batch.sizes
        return Batch(
            pixels=torch.cat([batch.pixels, pixels.to(batch.pixels)]),
            prompts=[*batch.prompts, *(fill(self.prompt, noun) for noun in nouns)],
            concept=batch.concept.repeat(2),
            sample=torch.cat([batch.sample, -1 - batch.sample]),
            view=torch.cat([batch.view, -1 - views]),  # negative: the instance's pictures count from 0
            flip=torch.cat([batch.flip, torch.zeros_like(batch.flip)]),
            offset=None if offset is None else torch.cat([offset, torch.zeros_like(offset)]),
            mask=None if mask is None else torch.cat([mask, torch.ones_like(mask)]),
            sizes=None if sizes is None else torch.cat([sizes, own.to(sizes)]),  # its own, not the instance's
        )

    def losses(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Losses (R,) by name of the rows (2 R, C, H, W) that `extend` gave, see `preserved`; weight 0: plain loss."""
        return preserved(prediction, target, self.weight) if self.weight else {"": denoising_loss(prediction, target)}

    def pictures(self, model: FrozenStack, word: str) -> list[Path | Image.Image]:
        """The class pictures: read from `real`, found, or drawn by the frozen model with seeds 0, 1, ...

        Raises:
            UserError: `real` is no folder, or holds no usable picture.
        """
        if word not in self._kept:
            self._kept[word] = self._real() if self.real else self._drawn(model, word)
        return self._kept[word]

    def _real(self) -> list[Path | Image.Image]:
        assert self.real
        if not self.real.is_dir():
            raise UserError(
                f"method.prior.real={self.real} is no folder. Give the one that holds pictures of the class."
            )
        found, _ = read_folder(self.real, "stop", self.count)
        if len(found) < self.count:
            log.warning(
                "method.prior.real=%s holds %d pictures, method.prior.count asks for %d: none are drawn beside them.",
                self.real, len(found), self.count,
            )  # fmt: skip
        return list(found.paths)

    def _drawn(self, model: FrozenStack, word: str) -> list[Path | Image.Image]:
        caption = fill(self.prompt, word)
        found: dict[int, Path | Image.Image] = {}
        folder = self.folder / f"{_file_name(word)}-{self._content(model, caption)}" if self.folder else None
        if folder:
            found = {n: path for n in range(self.count) if (path := folder / f"{n:05d}.png").is_file()}
        missing = [number for number in range(self.count) if number not in found]
        if missing:
            log.info(
                "%d of %d class pictures %r are drawn%s",
                len(missing), self.count, caption, f", kept in {folder}" if folder else "",
            )  # fmt: skip
        clock = Clock(SECONDS_BETWEEN_LINES)
        for start in range(0, len(missing), self.batch_size):
            if clock.due():
                log.info("class picture %d of %d", start, len(missing))
            seeds = missing[start : start + self.batch_size]
            for number, picture in zip(seeds, self._draw(model, caption, seeds), strict=True):
                found[number] = picture
                if folder:
                    found[number] = path = folder / f"{number:05d}.png"
                    with files.atomic_open(path) as file:
                        picture.save(file, format="PNG")
        return [found[number] for number in range(self.count)]

    def _draw(self, model: FrozenStack, caption: str, seeds: list[int]) -> list[Image.Image]:
        pictures = draw_plain(model, [caption] * len(seeds), seeds, ddim(self.steps, self.guidance), None)
        levels = (pictures.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
        return [Image.fromarray(picture) for picture in levels]

    def _content(self, model: FrozenStack, caption: str) -> str:
        """Names everything a drawn picture depends on; the U-Net by the beginnings of its weights."""
        weights = weights_digest((model.text, model.unet, model.vae.decoder))
        settings = [caption, model.size, self.steps, self.guidance, model.scheduler_config, weights]
        return hashlib.sha256(json.dumps(settings, default=str, sort_keys=True).encode()).hexdigest()[:12]

    def _pixels(self, picture: Path | Image.Image, size: int) -> tuple[Tensor, tuple[int, ...]]:
        """(3, size, size) in [-1, 1], and its six numbers of `Batch.sizes`; files are read when they are needed."""
        if isinstance(picture, Path):
            try:
                picture = read_image(picture)
            except (ImageProblem, OSError) as error:
                raise UserError(
                    f"class picture {picture} cannot be read ({error}). Delete it: it is drawn anew."
                ) from error
        top, left = corner(picture.size, size, "square", None, flip=False)
        return to_pixels(picture, size, "square", flip=False), (picture.height, picture.width, top, left, size, size)


def _file_name(word: str) -> str:
    """A class noun as part of a file name: "my dog" -> "my-dog"."""
    return "".join(letter if letter.isalnum() else "-" for letter in word)
