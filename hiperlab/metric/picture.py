"""Pictures as the judges take them: upright 8-bit RGB PIL images, whatever form they arrive in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor

from hiperlab.errors import UserError

_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_SLACK = 0.01  # rounding of a half-precision decoder, not another range


def as_pictures(images: Tensor | Sequence[Image.Image]) -> list[Image.Image]:
    """Turn a batch into PIL images, because tensor resizing scores up to 0.05 (normalised units) off.

    Args:
        images: (B, 3, H, W) in [0, 1], or PIL images of any 8-bit mode.

    Raises:
        UserError: a tensor of another shape or range.
    """
    if isinstance(images, Sequence):
        return [image if image.mode == "RGB" else image.convert("RGB") for image in images]
    if images.ndim != 4 or images.shape[1] != 3:
        raise UserError(f"images of shape {tuple(images.shape)}: a metric takes (B, 3, H, W) in [0, 1].")
    if images.numel() and not (images.min() >= -_SLACK and images.max() <= 1 + _SLACK):  # also catches NaN
        low, high = images.min().item(), images.max().item()
        raise UserError(f"images in [{low:.2f}, {high:.2f}]: a metric takes [0, 1]; map [-1, 1] by (x + 1) / 2 first.")
    bytes_ = images.detach().float().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in bytes_]


def open_picture(path: Path) -> Image.Image:
    """Read one picture from disk as RGB, upright (EXIF applied).

    Raises:
        UserError: the file is missing, broken, or holds more than 8 bits per channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in _EIGHT_BIT:
                raise UserError(f"{path} has mode {image.mode}: convert it to 8 bits per channel before scoring.")
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: sample again, or leave its line out of the list to score.") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL raises SyntaxError for broken PNGs
        raise UserError(f"{path} cannot be read as a picture ({error}): replace or remove it.") from error
