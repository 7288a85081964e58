"""Face identity without published weights: alignment, preparation, missing faces; a tiny ONNX file if that can run."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hiperlab.errors import UserError
from hiperlab.metric.face.extractor import SIDE, TEMPLATE, FaceEncoder, Found, aligned, centred, largest, similarity
from hiperlab.metric.face.recipe import OnnxFace
from hiperlab.metric.torchmetric import Identity
from hiperlab.metric.weights import MissingWeightsError
from tests.metric.conftest import load_protocol, plain

SETTINGS = {"align": "centre", "detector": None, "confidence": 0.9, "size": 4, "mean": 127.5, "std": 127.5}


def placed(turn: float, scale: float, shift: tuple[float, float]) -> np.ndarray:
    """The template turned by `turn` degrees, scaled and shifted."""
    angle = np.deg2rad(turn)
    matrix = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return TEMPLATE @ matrix.T + shift


def dots(points: np.ndarray, size: int = 400) -> Image.Image:
    """Five white dots of nine pixels on black, at whole pixels."""
    pixels = np.zeros((size, size, 3), np.uint8)
    for x, y in points.round().astype(int):
        pixels[y - 4 : y + 5, x - 4 : x + 5] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("turn", "scale"), [(0, 1), (30, 2.5), (-170, 0.4)])
def test_alignment_finds_turn_scale_and_shift(turn, scale) -> None:
    points = placed(turn, scale, (37.0, -5.5))
    there = similarity(points, TEMPLATE)
    np.testing.assert_allclose(points @ there[:, :2].T + there[:, 2], TEMPLATE, atol=1e-9)
    np.testing.assert_allclose(np.linalg.det(there[:, :2]), scale**-2)


def test_alignment_never_mirrors_and_is_nearest() -> None:
    mirrored = TEMPLATE * [-1, 1]
    there = similarity(mirrored, TEMPLATE)
    assert np.linalg.det(there[:, :2]) > 0
    error = np.square(mirrored @ there[:, :2].T + there[:, 2] - TEMPLATE).sum()
    for index in np.ndindex(2, 3):
        for step in (-1e-3, 1e-3):
            turn = there.copy()
            turn[index] += step
            if index[1] < 2:  # stay a turn and scale: [[a, -b], [b, a]]
                turn[1 - index[0], 1 - index[1]] += step if index[0] == index[1] else -step
            assert np.square(mirrored @ turn[:, :2].T + turn[:, 2] - TEMPLATE).sum() >= error


@pytest.mark.parametrize("side", [112, 56])
def test_a_turned_face_lands_on_the_template(side) -> None:
    """The dots' centres of gravity lie where the template says, to a fifth of a pixel: pixel centres are right."""
    points = placed(25, 2.0, (160, 60)).round()
    face = aligned(dots(points), points, side)
    assert face.size == (side, side)
    levels = np.asarray(face, dtype=np.float64)[..., 0]
    there = similarity(points, TEMPLATE * side / SIDE)
    rows, columns = np.mgrid[:side, :side]
    for x, y in points @ there[:, :2].T + there[:, 2]:
        near = (np.abs(columns - x) < side / 14) & (np.abs(rows - y) < side / 14)
        weight = levels * near
        found = (columns * weight).sum() / weight.sum(), (rows * weight).sum() / weight.sum()
        np.testing.assert_allclose(found, (x, y), atol=0.2)


def test_centre_square() -> None:
    wide = Image.fromarray(np.tile(np.arange(12, dtype=np.uint8)[None, :, None] * 20, (4, 1, 3)))
    np.testing.assert_array_equal(np.asarray(centred(wide, 4))[..., 0], np.tile([80, 100, 120, 140], (4, 1)))


def test_largest_face() -> None:
    assert largest(None) is None and largest(np.zeros((0, 15), np.float32)) is None
    faces = np.arange(30, dtype=np.float32).reshape(2, 15)
    faces[0, 2:4] = 100
    np.testing.assert_array_equal(largest(faces), faces[0, 4:14].reshape(5, 2))


def features(find, bgr: bool = False) -> FaceEncoder:
    """A network that gives the mean of each channel it reads."""
    return FaceEncoder(lambda x: x.mean((2, 3)), find, side=112, mean=127.5, std=127.5, bgr=bgr, weights="fake")


def dark_is_no_face(pixels: np.ndarray) -> np.ndarray | None:
    return TEMPLATE if pixels.any() else None


def test_what_the_network_reads() -> None:
    red = plain((255, 0, 51), 112)
    whole = torch.tensor([1.0, -1.0, -0.6])
    torch.testing.assert_close(features(None).images([red])[0], whole / whole.norm())
    torch.testing.assert_close(features(None, bgr=True).images([red])[0], whole.flip(0) / whole.norm())
    assert features(None).prepared(red).shape == (1, 3, 112, 112)


def test_a_picture_without_a_face_is_missing_never_scored() -> None:
    judge = features(dark_is_no_face)
    found = judge.images([plain((0, 0, 0)), plain((255, 0, 0)), plain((0, 0, 0))])
    assert found.isnan().all(1).tolist() == [True, False, True]
    assert judge.images([plain((0, 0, 0))]).shape == (1, 3)
    reference = judge.images([plain((255, 0, 0))])
    dropped = Identity(judge, "cosine", "mean", "drop").measure(found, reference)
    assert dropped.isnan().tolist() == [True, False, True] and dropped[1] == pytest.approx(1)
    assert Identity(judge, "cosine", "mean", "zero").measure(found, reference).tolist() == pytest.approx([0, 1, 0])
    rate = Found(judge, "cosine", "mean")
    assert rate.measure(found, reference).tolist() == [0, 1, 0]
    assert rate.ceiling(found).tolist() == [0, 1, 0] and len(rate.ceiling(found, "max")) == 0


def test_the_preset_names_what_is_missing(tmp_path) -> None:
    protocol = load_protocol("face")
    with pytest.raises(MissingWeightsError, match=r"metric.encoders.face.path is not set: download an ArcFace-class"):
        protocol.load("face")
    (tmp_path / "face.onnx").write_bytes(b"")
    given = {"face": {"path": str(tmp_path / "face.onnx")}}
    with pytest.raises(MissingWeightsError, match=r"face.detector is not set: download YuNet"):
        load_protocol("face", encoders=given).load("face")
    given["face"]["detector"] = str(tmp_path / "absent.onnx")
    with pytest.raises(MissingWeightsError, match=r"absent\.onnx does not exist"):
        load_protocol("face", encoders=given).load("face")
    assert load_protocol("face", encoders=given).hash == protocol.hash, "places move no number"
    assert load_protocol("face", encoders={"face": {"align": "centre"}}).hash != protocol.hash


@pytest.mark.parametrize(("name", "value"), [("align", "eyes"), ("channels", "rbg"), ("confidence", 2), ("std", 0)])
def test_settings_are_checked(name, value) -> None:
    with pytest.raises(UserError, match=name):
        OnnxFace(**{**SETTINGS, "path": None, "channels": "rgb", name: value})


# ---- a tiny ONNX file: the mean of each channel ----------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, value: bytes | str | int) -> bytes:
    """One protobuf field: a number, or bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name: str, *sides: int) -> bytes:
    """ValueInfoProto of a float tensor."""
    shape = b"".join(field(1, field(1, side)) for side in sides)
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, shape)))


def write_onnx(path: Path, side: int) -> Path:
    """ModelProto (IR 8, opset 13) with one node GlobalAveragePool: (1, 3, side, side) -> (1, 3, 1, 1)."""
    node = field(1, "x") + field(2, "y") + field(4, "GlobalAveragePool")
    ends = field(11, tensor("x", 1, 3, side, side)) + field(12, tensor("y", 1, 3, 1, 1))
    graph = field(1, node) + field(2, "g") + ends
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13)))
    return path


def test_an_onnx_file_through_onnxruntime(tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    file = write_onnx(tmp_path / "face.onnx", 4)
    judge = OnnxFace(**SETTINGS, path=str(file), channels="rgb").load("metric.encoders.face")
    whole = torch.tensor([1.0, -1.0, -0.6])
    torch.testing.assert_close(judge.images([plain((255, 0, 51))] * 2)[1], whole / whole.norm())
    (tmp_path / "two.onnx").write_bytes(file.read_bytes())
    again = OnnxFace(**SETTINGS, path=str(tmp_path / "two.onnx"), channels="rgb").load("metric.encoders.face")
    assert again.weights == judge.weights, "named by content"
    with pytest.raises(UserError, match=r"reads \[1, 3, 4, 4\], expected \[1, 3, 112, 112\]"):
        OnnxFace(**{**SETTINGS, "size": 112}, path=str(file), channels="rgb").load("metric.encoders.face")
    (tmp_path / "bad.onnx").write_bytes(struct.pack("8B", *range(8)))
    with pytest.raises(UserError, match="cannot be read as ONNX"):
        OnnxFace(**SETTINGS, path=str(tmp_path / "bad.onnx"), channels="rgb").load("metric.encoders.face")


def test_a_file_that_is_no_detector(tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("cv2")
    file, bad = write_onnx(tmp_path / "face.onnx", 4), tmp_path / "bad.onnx"
    bad.write_bytes(b"no network")
    settings = {**SETTINGS, "align": "detect", "detector": str(bad), "path": str(file), "channels": "rgb"}
    with pytest.raises(UserError, match="is no YuNet"):
        OnnxFace(**settings).load("metric.encoders.face")
