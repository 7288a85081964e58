"""One way to read a mask, whoever drew it: white where a picture may change, black where it must not."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from PIL import Image

from hiperlab.errors import UserError

log = logging.getLogger(__name__)
HALF = 128


def read_mask(path: Path, size: tuple[int, int] | None, keep_grey: bool = False) -> Image.Image:
    """A mask as black (0) and white (255), mode L.

    Where the file has transparency, that is the mask (opaque counts as white). Labels 0 and 1 mean black and white.

    Args:
        path: the file.
        size: (width, height) of the picture it belongs to; None where a benchmark's masks are of its cropped pictures.
        keep_grey: leave grey, where its authors were not sure, as it is; else it is black below the middle.

    Raises:
        UserError: unreadable, of another shape than the picture, or of one value throughout.
    """
    try:
        with Image.open(path) as image:
            image.load()
            grey = image.getchannel("A") if "A" in image.getbands() else image.convert("L")
            labels = image.mode == "P" and "transparency" not in image.info
            values = np.asarray(image if labels else grey)
    except FileNotFoundError:
        raise UserError(f"mask {path} does not exist.") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"mask {path} cannot be read ({error}).") from error
    if size is not None and values.shape != (size[1], size[0]):
        raise UserError(
            f"mask {path} has {values.shape[1]} x {values.shape[0]} pixels, its picture {size[0]} x {size[1]}: give a "
            "mask of the picture's shape."
        )
    if values.max() <= 1:
        log.info("mask %s holds 0 and 1: read as black and white", path.name)
        white = values == 1
    else:
        white = values >= HALF
    if white.all() or not white.any():
        raise UserError(f"mask {path} is {'white' if white.any() else 'black'} everywhere: it marks no part.")
    return Image.fromarray(values if keep_grey and values.max() > 1 else white.astype(np.uint8) * 255)
