"""Who is in a portrait: the largest face, upright on ArcFace's template, as a unit vector of such a network.

Axes: H, W a picture's sides, S the network's input side, D the embedding's width. Points are (x, y) in pixels, whole
numbers at pixel centres.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hiperlab.metric.compare import unit
from hiperlab.metric.extractor import Encoder
from hiperlab.metric.torchmetric import ImageSimilarity

Points = NDArray[np.float64]
Pixels = NDArray[np.uint8]

SIDE = 112  # the template's
# Eye on the left, eye on the right, nose, mouth corners left and right, as they lie in the picture: the template that
# the ArcFace family (Deng et al. 2019) is trained on.
TEMPLATE: Points = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


def similarity(source: Points, target: Points) -> Points:
    """The turn, scale and shift (2, 3) that brings points nearest to others (Umeyama 1991, eq. 40 to 42).

    Args:
        source: (n, 2), not all equal.
        target: (n, 2).
    """
    centre, aim = source.mean(0), target.mean(0)
    away, wanted = source - centre, target - aim
    u, values, vt = np.linalg.svd(wanted.T @ away / len(source))
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])  # a mirrored face is no turned one
    turn = u @ np.diag(sign) @ vt
    scale = (values * sign).sum() / away.var(0).sum()
    return np.column_stack([scale * turn, aim - scale * turn @ centre])


def aligned(picture: Image.Image, points: Points, side: int) -> Image.Image:
    """The face with these five points (5, 2), upright on the template, (side, side), black where the picture ends."""
    there = similarity(points, TEMPLATE * (side / SIDE))
    back = np.linalg.inv(np.vstack([there, [0, 0, 1]]))[:2]
    back[:, 2] += 0.5 - back[:, :2] @ [0.5, 0.5]  # PIL has whole numbers at pixel corners
    return picture.transform((side, side), Image.Transform.AFFINE, tuple(back.flatten()), Image.Resampling.BILINEAR)


def centred(picture: Image.Image, side: int) -> Image.Image:
    """The largest centred square, resized: for pictures that are aligned portraits already."""
    short = min(picture.size)
    left, top = ((length - short) / 2 for length in picture.size)
    box = (left, top, left + short, top + short)
    return picture.resize((side, side), Image.Resampling.BILINEAR, box=box, reducing_gap=None)


def largest(faces: NDArray[np.float32] | None) -> Points | None:
    """Five points (5, 2) of the face with the largest box, or None without a face.

    Args:
        faces: rows (n, 15) of OpenCV's FaceDetectorYN: box x, y, w, h, five points, confidence.
    """
    if faces is None or not len(faces):
        return None
    face = max(faces, key=lambda row: row[2] * row[3])
    return face[4:14].reshape(5, 2).astype(np.float64)


class FaceEncoder(Encoder):
    """Unit vectors of faces; NaN where no face is found, which a protocol's `missing` rule then settles.

    Args:
        embed: the network, (1, 3, S, S) float32 -> (1, D) of any length.
        find: five points (5, 2) in RGB pixels (H, W, 3), or None; None instead of it takes the centre of every picture.
        side: S.
        mean: subtracted from levels 0 to 255.
        std: divided by.
        bgr: whether the network reads blue first.
        weights: 12 hex digits naming both networks.
    """

    def __init__(
        self,
        embed: Callable[[NDArray[np.float32]], NDArray[np.float32]],
        find: Callable[[Pixels], Points | None] | None,
        side: int,
        mean: float,
        std: float,
        bgr: bool,
        weights: str,
    ) -> None:
        super().__init__()
        self.embed, self.find, self.side = embed, find, side
        self.mean, self.std, self.bgr, self.weights = mean, std, bgr, weights

    def face(self, picture: Image.Image) -> Image.Image | None:
        """The upright face (side, side), or None."""
        if self.find is None:
            return centred(picture, self.side)
        points = self.find(np.asarray(picture))
        return None if points is None else aligned(picture, points, self.side)

    def prepared(self, face: Image.Image) -> NDArray[np.float32]:
        """What the network reads (1, 3, S, S)."""
        levels = (np.asarray(face, dtype=np.float32) - self.mean) / self.std
        return np.ascontiguousarray((levels[..., ::-1] if self.bgr else levels).transpose(2, 0, 1)[None], np.float32)

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """B RGB pictures -> (B, D) on the CPU; one at a time, many ONNX files hold a batch of one."""
        faces = [self.face(picture) for picture in pictures]
        rows = [None if face is None else np.ravel(self.embed(self.prepared(face))) for face in faces]
        width = next((len(row) for row in rows if row is not None), self.width)
        empty = np.full(width, np.nan, np.float32)
        return unit(torch.from_numpy(np.stack([empty if row is None else row for row in rows])))

    @property
    def width(self) -> int:
        """D, asked of the network with a black picture."""
        return np.ravel(self.embed(np.zeros((1, 3, self.side, self.side), np.float32))).size


class Found(ImageSimilarity):
    """Whether anything was found in a picture, 0 or 1: an identity score says nothing without this rate."""

    def measure(self, embeddings: Tensor, targets: Tensor) -> Tensor:
        """(B, D), (R, D) -> (B,)."""
        return (~embeddings.isnan().any(-1)).float()

    def copies(self, embeddings: Tensor, targets: Tensor) -> Tensor:
        """Nothing is compared: NaN (B,)."""
        return torch.full((len(embeddings),), torch.nan)

    def ceiling(self, targets: Tensor, pairing: str | None = None) -> Tensor:
        """The same of the R references; of the copy detector nothing."""
        return self.measure(targets, targets) if pairing is None else targets.new_zeros(0)
