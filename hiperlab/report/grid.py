"""Pictures side by side with labels; pixels are never resampled, small pictures are enlarged by a whole factor."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hiperlab import files

if TYPE_CHECKING:
    from torch import Tensor  # grids are cut without it, too

_PAPER, _INK, _EMPTY = (255, 255, 255), (40, 40, 40), (236, 236, 236)
_GAP = 6
_LOOKABLE = 128  # pixels; smaller pictures are enlarged to about this


def to_pil(images: Tensor) -> list[Image.Image]:
    """Pictures (B, 3, H, W) in [0, 1] -> B RGB pictures, rounded to the nearest of 256 levels."""
    levels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(each)) for each in levels]


def grid(
    images: Sequence[Sequence[Image.Image | None]],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    title: str = "",
) -> Image.Image:
    """Lay out pictures with labels to the left and above.

    Args:
        images: a list of rows; None leaves a place empty, rows may differ in length.
        rows: a label per row, or none.
        columns: a label per column, or none.
        title: a line above all.

    Raises:
        ValueError: no picture at all, or more labels than places.
    """
    present = [image for row in images for image in row if image is not None]
    width_in_cells = max((len(row) for row in images), default=0)
    if not present or len(rows) > len(images) or len(columns) > width_in_cells:
        raise ValueError(
            f"a grid of {len(images)} x {width_in_cells} places with {len(present)} pictures cannot carry "
            f"{len(rows)} row and {len(columns)} column labels."
        )
    factor = max(1, _LOOKABLE // max(max(image.size) for image in present))
    images = [[None if image is None else _enlarge(image, factor) for image in row] for row in images]
    cell_w, cell_h = (factor * max(image.size[axis] for image in present) for axis in (0, 1))
    font = _font(max(11, min(18, cell_w // 14)))
    left = [_wrap(label, font, max(cell_w, 90)) for label in rows]
    above = [_wrap(label, font, cell_w) for label in columns]
    head = _wrap(title, font, width_in_cells * (cell_w + _GAP)) if title else []
    line = sum(font.getmetrics()) + 2
    x0 = _GAP + max((int(font.getlength(text)) + _GAP for label in left for text in label), default=0)
    title_h = len(head) * line + (_GAP if head else 0)
    y0 = _GAP + title_h + max((len(label) * line for label in above), default=0)
    size = (x0 + width_in_cells * (cell_w + _GAP), y0 + len(images) * (cell_h + _GAP))
    canvas = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(canvas)
    _text(draw, head, _GAP, _GAP, line, font)
    for column, label in enumerate(above):
        _text(draw, label, x0 + column * (cell_w + _GAP), y0 - len(label) * line - 1, line, font)
    for number, row in enumerate(images):
        y = y0 + number * (cell_h + _GAP)
        if number < len(left):
            _text(draw, left[number], _GAP, y + max(0, (cell_h - len(left[number]) * line) // 2), line, font)
        for column, image in enumerate(row):
            x = x0 + column * (cell_w + _GAP)
            if image is None:
                draw.rectangle((x, y, x + cell_w - 1, y + cell_h - 1), fill=_EMPTY)
            else:
                canvas.paste(image, (x, y))
    return canvas


def first_row(canvas: Image.Image, rows: int, below: Image.Image) -> list[Image.Image | None]:
    """The pictures in the first row of a `grid`, cut out again: grids hold references and truths that no file has.

    Args:
        canvas: a grid whose rows have labels.
        rows: how many it has.
        below: its picture in the second row, first place, all pictures being of this size.

    Returns:
        The first row in the original size, None for an empty place, without what is beyond its end. Empty where
        `below` is not found at its place: then it is another grid.
    """
    factor = max(1, _LOOKABLE // max(below.size))
    width, height = (side * factor for side in below.size)
    canvas = canvas.convert("RGB")
    across, y0 = (canvas.width - _GAP - 1) // (width + _GAP), canvas.height - rows * (height + _GAP)
    # Labels are at most as wide as a picture, so that one number of columns fits.
    x0 = canvas.width - across * (width + _GAP)

    def at(row: int, column: int) -> Image.Image:
        x, y = x0 + column * (width + _GAP), y0 + row * (height + _GAP)
        return canvas.crop((x, y, x + width, y + height)).resize(below.size, Image.Resampling.NEAREST)

    if rows < 2 or across < 1 or y0 < 0 or at(1, 0).tobytes() != below.convert("RGB").tobytes():
        return []
    found: list[Image.Image | None] = []
    for column in range(across):
        picture = at(0, column)
        colours = picture.getcolors(1)
        found.append(None if colours and colours[0][1] in (_PAPER, _EMPTY) else picture)
    while found and found[-1] is None:
        found.pop()
    return found


def strip(images: Sequence[Image.Image | None], labels: Sequence[str] = ()) -> Image.Image:
    """One row of pictures with a label above each."""
    return grid([images], columns=labels)


def save_png(image: Image.Image, path: str | Path) -> None:
    """Write a PNG whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    files.atomic_write(path, buffer.getvalue())


def _enlarge(image: Image.Image, factor: int) -> Image.Image:
    """Every pixel as a square of `factor` x `factor`."""
    if factor == 1:
        return image
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans from matplotlib's own files: the same letters on every machine."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def _text(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], x: int, y: int, height: int, font: ImageFont.FreeTypeFont
) -> None:
    for number, text in enumerate(lines):
        draw.text((x, y + number * height), text, fill=_INK, font=font)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int = 4) -> list[str]:
    """Break at spaces, inside a word only if it alone is too long; more than `most` lines end in an ellipsis."""
    lines = [""]
    for word in text.split():
        if font.getlength(f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = f"{lines[-1]} {word}".strip()
            continue
        lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    lines = [each for each in lines if each]
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: most - 1], last + "…"]
