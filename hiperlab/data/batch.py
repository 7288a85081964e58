"""The value a method's training step receives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One micro batch on one rank. Axes: R = concepts * micro batch rows, H and W pixels.

    Rows are concept-major: all rows of concept 0, then all of concept 1, ...; every concept has the same number of
    rows and the same sample numbers, so that a concept sees the same draws alone and among others.

    Attributes:
        pixels: pictures in [-1, 1], float32 (R, 3, H, W).
        prompts: R training prompts, the placeholder filled in.
        concept: index of the concept, int64 (R,).
        sample: global sample number k of that concept, int64 (R,); the key of every further draw for the row.
        view: index of the reference picture, int64 (R,).
        flip: whether it was mirrored, bool (R,).
        offset: where a random crop begins along the picture's long side, in pixels, int64 (R,); None without one.
        mask: weights of the loss in [0, 1], float32 (R, 1, H, W), laid out as `pixels`; None where all count alike.
        sizes: height and width of the picture as read, top and left of its crop after it was scaled, height and width
            of `pixels`, float32 (R, 6): what SDXL is told of a picture; None where nobody says.
    """

    pixels: Tensor
    prompts: list[str]
    concept: Tensor
    sample: Tensor
    view: Tensor
    flip: Tensor
    offset: Tensor | None = None
    mask: Tensor | None = None
    sizes: Tensor | None = None

    def after(self, row: int) -> Batch:
        """The rows from number `row` on."""
        return self._cut(slice(row, None))

    def before(self, row: int) -> Batch:
        """The rows in front of number `row`."""
        return self._cut(slice(row))

    def _cut(self, rows: slice) -> Batch:
        return Batch(*(None if values is None else values[rows] for values in self))  # type: ignore[arg-type]
