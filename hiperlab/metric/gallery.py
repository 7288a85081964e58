"""Is the learnt subject found again in a gallery of others? Rank-1 rate and mean average precision.

As person re-identification is scored (Zheng et al. 2015, "Scalable person re-identification: a benchmark"): the query
is a drawn picture, the gallery holds pictures of the true subject and of others, sorted by similarity. The true
subject's are held-out ones, so that a copy of a training picture is not its own answer; `world.gallery` draws the
others where they can be drawn.
Axes: B drawn pictures, V gallery pictures of the true subject, G of all others, D embedding width.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from hiperlab import files
from hiperlab.errors import UserError
from hiperlab.metric.compare import usable
from hiperlab.metric.contract import EmbeddedPictures, Measurement, Score
from hiperlab.metric.encoder import EncoderConfig
from hiperlab.metric.extractor import Encoder
from hiperlab.metric.picture import as_pictures, open_picture
from hiperlab.metric.rows import PICTURE
from hiperlab.metric.weights import MissingWeightsError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
BATCH = 32  # pictures a pass


def rank_one(images: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """1 where the nearest picture of the gallery is the true subject's, else 0; of equally near ones the other counts.

    Args:
        images: (B, D) unit rows.
        own: (V, D) unit rows.
        others: (G, D) unit rows.

    Returns:
        (B,) of 0 and 1.
    """
    return ((images @ own.T).amax(-1) > (images @ others.T).amax(-1)).double()


def average_precision(images: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """Mean over the true subject's pictures of the share of its own among all that are at least as near.

    Args:
        images: (B, D) unit rows.
        own: (V, D) unit rows.
        others: (G, D) unit rows.

    Returns:
        (B,) in (0, 1]; its mean over pictures is mAP.
    """
    mine, theirs = (images @ own.T).sort(-1, descending=True).values, images @ others.T
    found = torch.arange(1, mine.shape[1] + 1, device=mine.device)  # own pictures down to each
    ahead = (theirs[:, None, :] >= mine[:, :, None]).sum(-1)  # (B, V) others that are as near
    return (found / (found + ahead)).double().mean(-1)


class GalleryEncoder(Encoder):
    """An encoder that has pictures of others to compare with.

    Args:
        encoder: embeds pictures.
        views: most gallery pictures of one subject, the true one included.
    """

    def __init__(self, encoder: Encoder, views: int) -> None:
        super().__init__()
        self.encoder, self.views = encoder, views
        self.weights = encoder.weights
        self._kept: dict[str, Tensor] = {}

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embed B RGB pictures (B, D)."""
        return self.encoder.images(pictures)

    def others(self, concept: str) -> Tensor | None:
        """Gallery pictures of all but a concept's subject (G, D); None where nothing is known of its kind."""
        key = self.key(concept)
        if key is None:
            return None
        if key not in self._kept:
            pictures = as_pictures(self.pictures(concept))
            parts = [self.encoder.images(pictures[at : at + BATCH]) for at in range(0, len(pictures), BATCH)]
            self._kept[key] = torch.cat(parts)
        return self._kept[key]

    @abstractmethod
    def key(self, concept: str) -> str | None:
        """Names the concept's gallery; concepts of equal keys share one. None where there is none."""

    @abstractmethod
    def pictures(self, concept: str) -> list[Image.Image]:
        """The gallery's pictures."""


@dataclass(frozen=True)
class GalleryConfig(EncoderConfig):
    """An encoder with a gallery.

    Attributes:
        encoder: embeds pictures.
        views: most gallery pictures of one subject.
    """

    encoder: EncoderConfig
    views: int

    def __post_init__(self) -> None:
        assert isinstance(self.encoder, EncoderConfig), "set _convert_: all"
        if self.views < 1:
            raise UserError(f"a gallery's views={self.views} leaves no picture: use 1 or more.")

    def fetch(self, key: str) -> None:
        """Find the encoder's files."""
        self.encoder.fetch(f"{key}.encoder")

    def settings(self) -> dict[str, Any]:
        """As of any encoder, and the inner one's."""
        own = {name: value for name, value in vars(self).items() if name not in ("encoder", "path")}
        return {"kind": type(self).__name__, **own, "encoder": self.encoder.settings()}


class _FolderGallery(GalleryEncoder):
    """See `FolderGallery`."""

    def __init__(self, encoder: Encoder, views: int, folders: dict[str, list[Path]]) -> None:
        super().__init__(encoder, views)
        self.folders = folders
        digest = hashlib.sha256(encoder.weights.encode())
        for name, paths in folders.items():
            digest.update("".join([name, *map(files.sha256, paths)]).encode())
        self.weights = digest.hexdigest()[:12]  # of the gallery, too: ranks in another one do not compare

    def key(self, concept: str) -> str | None:
        return concept if any(name != concept for name in self.folders) else None

    def pictures(self, concept: str) -> list[Image.Image]:
        return [open_picture(path) for name, paths in self.folders.items() if name != concept for path in paths]


@dataclass(frozen=True)
class FolderGallery(GalleryConfig):
    """A gallery of one's own: a folder with a sub-folder of pictures for each other subject.

    A sub-folder of the concept's own name is left out. The pictures' content is part of the rows' `weights`.

    Attributes:
        path: the folder.
    """

    path: str | None

    def load(self, key: str) -> Encoder:
        """Build the encoder and list the pictures."""
        return _FolderGallery(self.encoder.load(f"{key}.encoder"), self.views, self._folders(key))

    def fetch(self, key: str) -> None:
        """Find the encoder's files and the pictures."""
        super().fetch(key)
        self._folders(key)

    def _folders(self, key: str) -> dict[str, list[Path]]:
        what = "a folder with a sub-folder of pictures for each other subject"
        if not self.path:
            raise MissingWeightsError(f"{key}.path is not set: give {what}.")
        folder = files.expand(self.path)
        inside = sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []
        found = {each.name: sorted(p for p in each.iterdir() if p.suffix.lower() in SUFFIXES) for each in inside}
        found = {name: paths[: self.views] for name, paths in found.items() if paths}
        if not found:
            raise MissingWeightsError(f"{key}.path={self.path} holds no pictures in sub-folders: give {what}.")
        return found


@dataclass(frozen=True)
class _GalleryScore(Score):
    """What a gallery says of drawn pictures; a concept without held-out pictures or without a gallery has none."""

    needs: ClassVar[str] = "held_out"

    @abstractmethod
    def values(self, images: Tensor, own: Tensor, others: Tensor) -> Tensor:
        """(B, D), (V, D), (G, D) -> (B,)."""

    def measurements(self, pictures: EmbeddedPictures) -> Iterator[Measurement]:
        """One number per picture; one in which the encoder finds nothing finds nobody."""
        encoder = pictures.encoder
        if not isinstance(encoder, GalleryEncoder):
            raise UserError(f"{type(encoder).__name__} has no gallery: give the score an encoder with one.")
        for concept, held_out in pictures.held_out.items():
            others, own = encoder.others(concept), usable(held_out)[: encoder.views]
            if others is None or not len(own):
                continue
            numbers = pictures.of(concept)
            images = pictures.images[numbers]
            found = self.values(images.nan_to_num(), own, usable(others)).masked_fill(images.isnan().any(-1), 0.0)
            for number, value in zip(numbers, found.tolist(), strict=True):
                yield Measurement(PICTURE, value, concept, pictures.records[number])


@dataclass(frozen=True)
class RankOneScore(_GalleryScore):
    """Rank-1 rate: how often the nearest picture of the gallery is the true subject's."""

    def values(self, images: Tensor, own: Tensor, others: Tensor) -> Tensor:
        """See `rank_one`."""
        return rank_one(images, own, others)


@dataclass(frozen=True)
class AveragePrecisionScore(_GalleryScore):
    """Mean average precision of finding the true subject's pictures."""

    def values(self, images: Tensor, own: Tensor, others: Tensor) -> Tensor:
        """See `average_precision`."""
        return average_precision(images, own, others)
