"""What the world's judges see: unit vectors of identity, one-hot attributes, pictures beside their rendered truths."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hiperlab.metric.edit.distance import perceptual_distance
from hiperlab.metric.extractor import Encoder, VisionEncoder, content
from hiperlab.metric.preprocess import Preprocess, make_transform
from hiperlab.metric.world.attributes import read_attributes, said_attributes
from hiperlab.metric.world.distance import pack, truths
from hiperlab.metric.world.network import Judge, split
from hiperlab.world.identity import Identity
from hiperlab.world.subjects import EDITS, SEEDS, edit, held_out, subject

WORLD = "world-2"  # raise it when the world draws otherwise


def prepared(size: int) -> Preprocess:
    """How a judge of this size takes pictures: its own side, [-1, 1]."""
    return Preprocess(resize=size, crop=size, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)


def subject_in(text: str) -> tuple[str, str] | None:
    """(placeholder, name) of the one `<name>` in a prompt; None without any, and where several are in one picture."""
    names = set(re.findall(r"<([A-Za-z0-9][\w.-]*)>", text))
    return (f"<{name}>", name) if len(names) == 1 and (name := names.pop()) else None


class IdentityEncoder(VisionEncoder):
    """Who is in a picture: unit vectors."""

    def __init__(self, judge: Judge) -> None:
        super().__init__(judge, make_transform(prepared(judge.shape.size)))

    def _encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        return self.network(pixels)["embedding"]

    def maps(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """The blocks' feature maps, (B, C, H, W) each, from fine to coarse."""
        network: Any = self.network
        x, found = torch.stack([self.transform(picture) for picture in pictures]).to(self._device()), []
        with torch.no_grad():
            for block in network.blocks:
                x = block(x)
                found.append(x)
        return found

    def patches(self, pictures: Sequence[Image.Image]) -> Tensor:
        """B pictures -> (B, N, D): the map at an eighth of the side, as DINO's patches are."""
        return self.maps(pictures)[2].flatten(2).mT

    def perceptual(self, pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> Tensor:
        """Distance of all maps, without learnt weights: (B,)."""
        return perceptual_distance(self.maps(pictures), self.maps(others)).cpu()


class ReaderEncoder(Encoder):
    """What is in a picture, and what a prompt says: the same one-hot vectors, all attributes side by side.

    Attributes:
        labels: attribute -> its values; places: attribute -> where it lies in a vector.
    """

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.network = judge
        self.transform = make_transform(prepared(judge.shape.size))
        self.labels = dict(judge.shape.labels)
        self.places = split(judge.shape, tuple(self.labels))
        self.weights = content(judge, repr(self.transform))

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """B pictures -> (B, D), one 1 per attribute."""
        device = next(self.network.parameters()).device
        pixels = torch.stack([self.transform(picture) for picture in pictures]).to(device)
        return self._vectors(read_attributes(self.network, pixels)).to(device)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """B prompts -> (B, D), nothing where an attribute is not named."""
        device = next(self.network.parameters()).device
        return self._vectors([said_attributes(text) for text in texts]).to(device)

    def _vectors(self, said: Sequence[dict[str, str]]) -> Tensor:
        out = torch.zeros(len(said), sum(map(len, self.labels.values())))
        for row, values in enumerate(said):
            for name, place in self.places.items():
                if values.get(name) in self.labels[name]:
                    out[row, place.start + self.labels[name].index(values[name])] = 1
        return out


class TruthEncoder(Encoder):
    """Pictures as pixels, prompts as what the world draws for them under every camera.

    Prompts must hold a subject the world knows: `<cats>` (a named one) or `<world-17>`, `<world-17-cat>` (held out).

    Args:
        size: side of the comparison.
        shifts, zooms: of the cameras.
    """

    def __init__(self, size: int, shifts: Sequence[float], zooms: Sequence[float]) -> None:
        super().__init__()
        self.size, self.shifts, self.zooms = size, tuple(shifts), tuple(zooms)
        self.weights = WORLD
        self._drawn: dict[str, Tensor | None] = {}

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """B pictures -> (B, 3 * size * size) in [0, 1]."""
        small = [np.asarray(p.resize((self.size, self.size), Image.Resampling.BOX)) for p in pictures]
        return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).flatten(1).float() / 255

    def texts(self, texts: Sequence[str]) -> Tensor:
        """B prompts -> (B, M), packed truths (see `distance.pack`), short rows padded; NaN without a subject."""
        rows = [self._one(text) for text in texts]
        longest = max((len(row) for row in rows if row is not None), default=1)
        out = torch.full((len(rows), longest), torch.nan)
        for i, row in enumerate(rows):
            if row is not None:
                out[i, : len(row)] = row
        return out

    def _one(self, text: str) -> Tensor | None:
        if text not in self._drawn:
            found = subject_in(text)
            who = known_subject(found[1]) if found else None
            self._drawn[text] = (
                None if who is None or found is None
                else pack(truths(who, text, found[0], self.size, self.shifts, self.zooms))
            )  # fmt: skip
        return self._drawn[text]


def known_subject(name: str) -> Identity | None:
    """The subject a placeholder's name stands for, or None if the world does not know it."""
    if name in SEEDS:
        return subject(name).who
    parts = name.split("-")
    if parts[0] in EDITS and all(part.isdigit() for part in parts[1:]):  # "standing_dog-2": the edit's third target
        return edit(parts[0]).who
    if parts[0] == "world" and len(parts) in (2, 3) and parts[1].isdigit():
        return held_out(int(parts[1]), parts[2] if len(parts) == 3 else None)
    return None
