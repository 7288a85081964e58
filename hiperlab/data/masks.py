"""One way to read a mask, whoever drew it: white where an edit may change a picture, or where a loss counts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hiperlab.data.images import MASK, upright_size
from hiperlab.errors import UserError

log = logging.getLogger(__name__)
HALF = 128


def masks_beside(paths: Sequence[Path]) -> tuple[Path | None, ...]:
    """OneTrainer's mask of each picture, `<name>-masklabel.png`; None for a picture without.

    Raises:
        UserError: see `read_mask`; all are read once, so that none is found wanting during training.
    """
    found = []
    for path in paths:
        beside = path.with_name(f"{path.stem}{MASK}.png")
        found.append(beside if beside.is_file() else None)
        if found[-1]:
            read_mask(beside, upright_size(path), keep_grey=True)
    return tuple(found)


def read_mask(path: Path, size: tuple[int, int] | None, keep_grey: bool = False) -> Image.Image:
    """A mask as black (0) and white (255), mode L.

    Where the file has transparency, that is the mask (opaque counts as white). Labels 0 and 1 mean black and white.

    Args:
        path: the file.
        size: (width, height) of the picture it belongs to; None where a benchmark's masks are of its cropped pictures.
        keep_grey: leave grey, a weight between none and all, as it is; else it is black below the middle.

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
