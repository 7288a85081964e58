"""A face network as an encoder of a protocol: any ArcFace-class ONNX file, run by onnxruntime (MIT); `hiperlab[face]`.

No weights come with hiperlab, and they have licences of their own: insightface's model packs (buffalo_l's
`w600k_r50.onnx` and the like) are for non-commercial research only; SFace (`face_recognition_sface_*.onnx`) of OpenCV's
model zoo is published there under Apache 2.0. Faces are found and their five points located by OpenCV's FaceDetectorYN
(Apache 2.0) with YuNet (`face_detection_yunet_*.onnx`, published there under MIT).

Checked without any published weights: the arithmetic before and after the networks, and a tiny ONNX file through
onnxruntime. Scores of real networks on real faces have not been compared with their publishers' figures.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hiperlab import files
from hiperlab.errors import UserError, near
from hiperlab.metric.encoder import EncoderConfig
from hiperlab.metric.extractor import Encoder
from hiperlab.metric.face.extractor import FaceEncoder, Found, largest
from hiperlab.metric.protocol import ImageScore
from hiperlab.metric.torchmetric import ImageSimilarity
from hiperlab.metric.weights import MissingWeightsError

ALIGN = ("detect", "centre")
CHANNELS = ("rgb", "bgr")


@dataclass(frozen=True)
class OnnxFace(EncoderConfig):
    """An ArcFace-class network in a file.

    Attributes:
        path: its .onnx: one picture (1, 3, size, size) in, one embedding out.
        align: "detect" finds the largest face and turns it upright; "centre" takes pictures that are aligned already.
        detector: YuNet's .onnx, for "detect".
        confidence: least confidence of a face, 0 to 1.
        size: side of the network's input.
        mean: subtracted from levels 0 to 255.
        std: divided by.
        channels: order that the network reads, "rgb" or "bgr".
    """

    path: str | None
    align: str
    detector: str | None
    confidence: float
    size: int
    mean: float
    std: float
    channels: str

    def __post_init__(self) -> None:
        if self.align not in ALIGN:
            raise UserError(f"align={self.align} is unknown.{near(self.align, ALIGN)}")
        if self.channels not in CHANNELS:
            raise UserError(f"channels={self.channels} is unknown.{near(self.channels, CHANNELS)}")
        if not 0 <= self.confidence <= 1 or self.size < 1 or self.std <= 0:
            raise UserError(f"{self}: needs a confidence from 0 to 1, and a size and std above 0.")

    def settings(self) -> dict[str, Any]:
        """Without the places of both files."""
        return {name: value for name, value in super().settings().items() if name != "detector"}

    def fetch(self, key: str) -> None:
        """Check that the files and the extra are here."""
        self._files(key)

    def load(self, key: str) -> Encoder:
        """Both networks, on the CPU."""
        found = self._files(key)
        weights = hashlib.sha256()
        for file in found:
            weights.update(file.read_bytes())
        embed = _network(found[0], self.size)
        find = _detector(found[1], self.confidence) if self.align == "detect" else None
        named = weights.hexdigest()[:12]
        return FaceEncoder(embed, find, self.size, self.mean, self.std, self.channels == "bgr", named)

    def _files(self, key: str) -> list[Path]:
        """The network's file, and with "detect" the detector's."""
        wanted = {"path": (self.path, "an ArcFace-class .onnx, such as w600k_r50 or SFace")}
        if self.align == "detect":
            wanted["detector"] = (self.detector, "YuNet's .onnx of OpenCV's model zoo (or align=centre)")
        found = []
        for name, (given, what) in wanted.items():
            if not given:
                raise MissingWeightsError(f"{key}.{name} is not set: download {what} and set {key}.{name}=<file>.")
            if not (file := files.expand(given)).is_file():
                raise MissingWeightsError(f"{key}.{name}={given} does not exist: give {what}.")
            found.append(file)
        modules = ("onnxruntime", "cv2") if self.align == "detect" else ("onnxruntime",)
        if lacking := [name for name in modules if importlib.util.find_spec(name) is None]:
            raise UserError(f"face scores need an extra ({lacking[0]} is missing): pip install 'hiperlab[face]'.")
        return found


@dataclass(frozen=True)
class FoundScore(ImageScore):
    """Share of pictures with a face; `scale` and `pairing` as the identity score's beside it."""

    def build(self, features: Encoder) -> ImageSimilarity:
        """The torchmetrics metric with these settings."""
        return Found(features, scale=self.scale, pairing=self.pairing)


def _network(file: Path, size: int) -> Any:
    """(1, 3, size, size) -> (1, D) by onnxruntime.

    Raises:
        UserError: onnxruntime refuses the file, or it reads something else.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no base class
        raise UserError(f"{file} cannot be read as ONNX ({str(error).splitlines()[0][:160]}).") from error
    (fed, *more), shape = session.get_inputs(), session.get_inputs()[0].shape
    sides = [side for side in shape[2:] if isinstance(side, int)]
    if more or len(shape) != 4 or shape[1] not in (3, None) or any(side != size for side in sides):
        raise UserError(f"{file} reads {shape}, expected [1, 3, {size}, {size}]: give another file, or set size.")
    return lambda pixels: session.run(None, {fed.name: pixels})[0]


def _detector(file: Path, confidence: float) -> Any:
    """RGB pixels (H, W, 3) -> five points (5, 2) of the largest face, or None.

    Raises:
        UserError: OpenCV refuses the file.
    """
    import cv2

    try:
        finder = cv2.FaceDetectorYN.create(str(file), "", (320, 320), confidence)
    except cv2.error as error:
        raise UserError(f"{file} is no YuNet that OpenCV {cv2.__version__} can read.") from error

    def find(pixels: Any) -> Any:
        finder.setInputSize((pixels.shape[1], pixels.shape[0]))
        return largest(finder.detect(np.ascontiguousarray(pixels[..., ::-1]))[1])

    return find
