"""Any real photograph reads to upright, opaque RGB; whatever cannot be read is named."""

import logging
import struct
import zlib
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from hiperlab.data import images
from hiperlab.data.images import (
    Crop,
    ImageProblem,
    cut,
    digests,
    in_range,
    picture_files,
    read_folder,
    read_image,
    to_levels,
    to_pixels,
)
from hiperlab.errors import UserError

RED = (200, 30, 40)


def picture(width: int = 40, height: int = 24) -> Image.Image:
    """Red, with a blue upper left quarter, so that turning and mirroring show."""
    image = Image.new("RGB", (width, height), RED)
    image.paste((20, 40, 220), (0, 0, width // 2, height // 2))
    return image


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def close(image: Image.Image, other: Image.Image, tolerance: float = 1.0) -> bool:
    a, b = np.asarray(image, dtype=float), np.asarray(other, dtype=float)
    return a.shape == b.shape and np.abs(a - b).max() <= tolerance


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp"])
def test_lossless_formats(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    got = read_image(save(picture(), tmp_path / f"a.{suffix}", **options))
    assert got.mode == "RGB" and close(got, picture(), 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_becomes_upright(tmp_path: Path, orientation: int) -> None:
    """Store the picture turned the way a camera would; reading must undo it."""
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    image = picture() if stored is None else picture().transpose(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = read_image(save(image, tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0))
    assert close(got, picture(), 6)


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (20, 20), (*RED, 0))
    rgba.paste((*RED, 255), (0, 0, 10, 20))
    rgba.paste((0, 0, 0, 127), (0, 0, 5, 20))
    got = read_image(save(rgba, tmp_path / "a.png"))
    assert got.getpixel((15, 5)) == (255, 255, 255) and got.getpixel((7, 5)) == RED
    assert got.getpixel((2, 5)) == pytest.approx((128, 128, 128), abs=1)


def test_grey_alpha_palette_and_bilevel(tmp_path: Path) -> None:
    la = Image.new("LA", (20, 20), (100, 0))
    la.paste((100, 255), (0, 0, 10, 20))
    got = read_image(save(la, tmp_path / "la.png"))
    assert got.getpixel((5, 5)) == (100, 100, 100) and got.getpixel((15, 5)) == (255, 255, 255)
    palette = picture().quantize(4)
    assert close(read_image(save(palette, tmp_path / "p.png")), picture(), 2)
    transparent = read_image(save(palette, tmp_path / "pt.png", transparency=palette.getpixel((39, 23))))
    assert transparent.getpixel((39, 23)) == (255, 255, 255) and close(
        transparent.crop((0, 0, 20, 12)), picture().crop((0, 0, 20, 12)), 2
    )
    keyed = read_image(save(picture(), tmp_path / "trns.png", transparency=RED))
    assert keyed.getpixel((39, 23)) == (255, 255, 255) and keyed.getpixel((0, 0)) == (20, 40, 220)
    assert read_image(save(Image.new("1", (20, 20), 1), tmp_path / "one.png")).getpixel((3, 3)) == (255, 255, 255)
    assert read_image(save(Image.new("L", (20, 20), 7), tmp_path / "l.jpg")).getpixel((3, 3)) == (7, 7, 7)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_is_scaled_not_cut(tmp_path: Path, suffix: str) -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (20, 1))
    got = np.asarray(read_image(save(Image.fromarray(ramp), tmp_path / f"a.{suffix}")))
    assert got.shape == (20, 64, 3) and np.abs(got[0, :, 0] - ramp[0] / 257.0).max() <= 0.51


@pytest.mark.parametrize("alpha", [False, True])
def test_16_bit_colour_png(tmp_path: Path, alpha: bool) -> None:
    """Pillow cannot write these, so the file is put together here: one row repeated, filter 0."""
    colours = np.array([[65535, 257 * 30, 0, 65535], [0, 32768, 65535, 0]] * 16, dtype=">u2")[:, : 4 if alpha else 3]
    row = b"\0" + colours.tobytes()
    header = struct.pack(">IIBBBBB", 32, 20, 16, 6 if alpha else 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(row * 20)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    got = read_image(tmp_path / "a.png")
    assert got.getpixel((0, 0)) == (255, 30, 0)
    assert got.getpixel((1, 0)) == ((255, 255, 255) if alpha else (0, 128, 255))


def test_float_grey_is_scaled_or_refused(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 1, 32, dtype=np.float32), (20, 1))
    got = np.asarray(read_image(save(Image.fromarray(ramp), tmp_path / "a.tiff")))
    assert np.abs(got[0, :, 1] - ramp[0] * 255).max() <= 0.51
    with pytest.raises(ImageProblem, match="expected 0 to 1"):
        read_image(save(Image.fromarray(ramp * 300), tmp_path / "b.tiff"))


@pytest.mark.parametrize("suffix", ["jpg", "tiff"])
def test_cmyk_keeps_its_colours(tmp_path: Path, suffix: str) -> None:
    """JPEG stores CMYK inverted with an Adobe marker: read without care, red comes out as cyan."""
    path = save(picture().convert("CMYK"), tmp_path / f"a.{suffix}", **({"quality": 100} if suffix == "jpg" else {}))
    assert suffix != "jpg" or b"Adobe" in path.read_bytes()
    assert close(read_image(path), picture(), 8)


def test_cmyk_profile_that_is_none_falls_back_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # an RGB profile does not fit CMYK
    path = save(picture().convert("CMYK"), tmp_path / "a.tiff", icc_profile=srgb)
    assert close(read_image(path), picture(), 1) and "colour profile cannot be used" in caplog.text


def test_animated_gives_its_first_frame_with_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (20, 20), RED), Image.new("RGB", (20, 20), (0, 255, 0))]
    for suffix in ("gif", "png", "webp", "tiff"):
        path = tmp_path / f"a.{suffix}"
        options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        caplog.clear()
        assert close(read_image(path), frames[0], 2)
        assert f"{path.name} holds several frames" in caplog.text


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_the_picture_usable(tmp_path: Path) -> None:
    path = save(picture(), tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03")
    assert read_image(path).size == (40, 24)


def bad_folder(folder: Path) -> Path:
    """One good picture and one of every kind of bad file."""
    save(picture(), folder / "good.png")
    whole = save(picture(400, 300), folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    png = bytearray(save(Image.effect_noise((64, 64), 90), folder / "flipped.png").read_bytes())
    png[len(png) // 2] ^= 0xFF
    (folder / "flipped.png").write_bytes(bytes(png))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpeg").write_text("no picture at all")
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    save(picture(1, 300), folder / "thin.png")
    save(Image.new("1", (8000, 7000)), folder / "huge.png")
    return folder


BAD = ["truncated.jpg", "flipped.png", "empty.jpg", "text.jpeg", "phone.heic", "thin.png", "huge.png"]


def test_all_bad_files_are_named_in_one_error(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_folder(bad_folder(tmp_path), "stop", None)
    message = str(error.value)
    assert message.startswith("7 unusable pictures in ") and "good.png" not in message
    for name in BAD:
        assert message.count(name + ":") == 1, message
    assert "empty (0 bytes)" in message and "8000x7000 is more than 50 megapixels" in message
    assert "1x300 is too small" in message and "export it as JPEG" in message and "on_bad_image=skip" in message
    assert len(message.splitlines()) == 9


def test_skip_warns_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    views, names = read_folder(bad_folder(tmp_path), "skip", None)
    assert names == ["good.png"] and close(views[0], picture(), 0)
    assert all(name in caplog.text for name in BAD)
    (tmp_path / "good.png").unlink()
    with pytest.raises(UserError, match="no usable picture"):
        read_folder(tmp_path, "skip", None)


def test_more_than_ten_bad_files_are_counted(tmp_path: Path) -> None:
    for i in range(25):
        (tmp_path / f"{i:02}.jpg").write_bytes(b"x")
    with pytest.raises(UserError) as error:
        read_folder(tmp_path, "stop", None)
    assert "25 unusable" in str(error.value) and "and 15 more" in str(error.value)
    assert len(str(error.value).splitlines()) == 13


def test_a_bomb_is_refused_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(Image.new("1", (8000, 7000)), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # now Pillow itself refuses at opening
    with pytest.raises(ImageProblem, match="more than 50 megapixels"):
        read_image(tmp_path / "a.png")


def test_only_pictures_count_and_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.png", "C.png"):
        save(picture(), tmp_path / name, format="PNG")
    save(picture(), tmp_path / "nosuffix", format="PNG")
    for name in (".DS_Store", ".hidden.png", "notes.txt", "Thumbs.db", "README"):
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in picture_files(tmp_path)] == ["a.png", "b.PNG", "C.png", "nosuffix"]
    assert read_folder(tmp_path, "stop", 2)[1] == ["a.png", "b.PNG"]


@pytest.mark.parametrize(("settings", "said"), [(("ignore", None), "stop or skip"), (("stop", 0), "max_views=0")])
def test_wrong_settings(tmp_path: Path, settings: tuple, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_folder(tmp_path, *settings)


def test_pixels_range_shape_and_flip() -> None:
    pixels = to_pixels(picture(64, 32), 16, "squeeze", flip=False)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1
    torch.testing.assert_close(pixels[:, -1, -1], torch.tensor(RED) / 127.5 - 1)
    assert torch.equal(to_pixels(picture(64, 32), 16, "squeeze", True), pixels.flip(-1))
    extremes = to_pixels(Image.fromarray(np.array([[[0, 127, 255]] * 16] * 16, dtype=np.uint8)), 16, "squeeze", False)
    torch.testing.assert_close(extremes[:, 0, 0], torch.tensor([-1.0, 127 / 127.5 - 1, 1.0]))


def test_crop_takes_the_middle_and_no_crop_squeezes() -> None:
    wide = Image.new("RGB", (48, 16), (0, 0, 0))
    wide.paste((255, 255, 255), (16, 0, 32, 16))
    assert to_pixels(wide, 16, "square", False).min() == 1
    squeezed = to_pixels(wide, 48, "squeeze", False)
    assert squeezed[:, :, 20:28].min() == 1 and squeezed[:, :, :12].max() == -1


def test_formats_that_start_other_programs_are_not_opened(tmp_path: Path) -> None:
    assert "EPS" not in images._formats()
    save(picture(), tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(ImageProblem):
        read_image(tmp_path / "a.png")


def test_logger_is_the_room_s_own() -> None:
    assert images.log is logging.getLogger("hiperlab.data.images")


def test_photographs_are_read_when_they_are_looked_at(tmp_path: Path) -> None:
    """Their pixels are not kept, their content is named without reading them again, and a lost one is one line."""
    for number in range(3):
        Image.new("RGB", (40 + number, 30), (number, 0, 0)).save(tmp_path / f"{number}.png")
    views, names = read_folder(tmp_path, "stop", None)
    assert len(views) == 3 and names == ["0.png", "1.png", "2.png"]
    assert [view.size for view in views] == [(40, 30), (41, 30), (42, 30)] and views[1] is not views[1]
    assert digests(views) == digests(list(views)) and digests(views[1:]) == digests(views)[1:]
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png could be read when the run began"):
        views[1]


def test_levels_are_the_pixels(tmp_path: Path) -> None:
    """A quarter of the memory, the same numbers to the last bit."""
    image = Image.effect_noise((50, 37), 80).convert("RGB")
    for crop in get_args(Crop):
        levels = cut(to_levels(image, 32, crop), 32)
        assert levels.dtype == torch.uint8
        expected = (levels.numpy() / 127.5 - 1.0).astype(np.float32)
        assert np.array_equal(in_range(levels).numpy(), expected)
        assert np.array_equal(to_pixels(image, 32, crop, flip=False).numpy(), expected)
