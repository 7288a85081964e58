"""From a picture to a network's input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from hiperlab.errors import UserError, near

_INTERPOLATIONS = ("bicubic", "bilinear")


@dataclass(frozen=True)
class Preprocess:
    """From an RGB picture to a network's input.

    Attributes:
        resize: pixels of the shorter side after resizing.
        crop: side of the centre square that is kept.
        interpolation: "bicubic" or "bilinear", PIL's (antialiased).
        mean: per channel, subtracted from [0, 1].
        std: per channel, divided by.
    """

    resize: int
    crop: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))  # yaml gives lists
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if self.interpolation not in _INTERPOLATIONS:
            raise UserError(
                f"interpolation={self.interpolation} is unknown.{near(self.interpolation, _INTERPOLATIONS)}"
            )
        if not 0 < self.crop <= self.resize or len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"{self}: needs 0 < crop <= resize, three means and three positive stds.")


def make_transform(preprocess: Preprocess) -> Callable[[Image.Image], Tensor]:
    """Resize the shorter side, crop the centre, normalise: on PIL, as the published evaluators do."""
    return Compose(
        [
            Resize(preprocess.resize, interpolation=InterpolationMode(preprocess.interpolation)),
            CenterCrop(preprocess.crop),
            ToTensor(),
            Normalize(preprocess.mean, preprocess.std),
        ]
    )
