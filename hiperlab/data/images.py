"""Reading any real photograph, and the one way pictures become training pixels.

Axes: H, W pixels. What reading guarantees: RGB, 8 bit, upright, opaque, between 16 px a side and 50 MP.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Literal, overload

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps
from torch import Tensor

from hiperlab.clock import Clock
from hiperlab.errors import UserError

log = logging.getLogger(__name__)

MAX_PIXELS = 50_000_000
MIN_SIDE = 16
SECONDS_BETWEEN_LINES = 5.0
MAX_NAMED = 10  # bad files listed one by one before a count
BACKGROUND = (255, 255, 255)  # white: what shows through transparent pixels

# Photograph formats only: Pillow's full list includes formats that start other programs (EPS) or cannot hold a photo.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM", "HEIF")
_SUFFIXES = (
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .tif .tiff .bmp .gif .avif .jp2 .j2k .ppm .pgm .pnm .heic .heif"
)
SUFFIXES = frozenset(_SUFFIXES.split(" "))
MASK = "-masklabel"  # end of a mask's name in OneTrainer's layout
OnBad = Literal["stop", "skip"]
# How a picture that is not square becomes one: "squeeze" resizes it straight to the square; "square" cuts the largest
# centred square first (both bicubic, NeTI's training/dataset.py); "middle" and "random" resize the short side,
# bilinear, then cut there (torchvision's Resize, CenterCrop, RandomCrop in DreamBooth's and HiPer's scripts);
# "random_cubic" is "random" with bicubic resizing (datasets.py of DTI's authors).
Crop = Literal["squeeze", "square", "middle", "random", "random_cubic"]
RANDOM: tuple[Crop, ...] = ("random", "random_cubic")


class ImageProblem(ValueError):
    """Why one file cannot be used; the message does not repeat the file's name."""


class Photographs(Sequence[Image.Image]):
    """Pictures that are read when they are looked at: five hundred of a telephone's would take 18 GB decoded.

    Args:
        paths: files that `read_image` has read before.
        digests: of their pixels, see `digest`.
    """

    def __init__(self, paths: Sequence[Path], digests: Sequence[str]) -> None:
        assert len(paths) == len(digests), "one digest each"
        self.paths, self.digests = tuple(paths), tuple(digests)

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Photographs: ...
    def __getitem__(self, index: int | slice) -> Image.Image | Photographs:
        """A picture, read anew, or some of them.

        Raises:
            UserError: its file is gone or broken since.
        """
        if isinstance(index, slice):
            return Photographs(self.paths[index], self.digests[index])
        try:
            return read_image(self.paths[index], notices=False)
        except (ImageProblem, OSError) as problem:
            raise UserError(f"{self.paths[index]} could be read when the run began: {problem}.") from problem


def digest(picture: Image.Image) -> str:
    """16 hex digits of a picture's pixels."""
    return hashlib.sha256(f"{picture.mode}{picture.size}".encode() + picture.tobytes()).hexdigest()[:16]


def digests(views: Sequence[Image.Image]) -> tuple[str, ...]:
    """The `digest` of each picture, without reading those of `Photographs` again."""
    return views.digests if isinstance(views, Photographs) else tuple(map(digest, views))


def read_folder(folder: Path, on_bad_image: OnBad, max_views: int | None) -> tuple[Photographs, list[str]]:
    """Read the pictures directly in `folder`, in the order of their names.

    Hidden files and files that are no pictures by name and by content (notes, thumbnails' data bases) are passed over.

    Args:
        folder: an existing folder.
        on_bad_image: "stop" names all unusable pictures in one error; "skip" warns and goes on without them.
        max_views: at most so many pictures (the first usable ones), or None for all.

    Returns:
        the pictures (RGB, see `read_image`), which are read again when they are looked at, and their file names.

    Raises:
        UserError: unusable pictures with "stop", or none left.
    """
    if on_bad_image not in ("stop", "skip"):
        raise UserError(f"on_bad_image={on_bad_image} is unknown: use stop or skip.")
    if max_views is not None and max_views < 1:
        raise UserError(f"max_views={max_views} leaves no picture: use 1 or more, or null for all.")
    found: dict[Path, str] = {}
    bad: list[str] = []
    paths, clock = picture_files(folder), Clock(SECONDS_BETWEEN_LINES)
    for number, path in enumerate(paths):
        if max_views is not None and len(found) == max_views:
            break
        if clock.due():
            log.info("read %d of %d pictures", number, len(paths))
        try:
            found[path] = digest(read_image(path))
        except ImageProblem as problem:
            bad.append(f"{path.name}: {problem}")
    if bad and on_bad_image == "stop":
        remedy = "Mend or remove them, or set data.on_bad_image=skip."
        raise UserError(f"{_count(len(bad), 'unusable picture')} in {folder}:\n{_some(bad)}\n{remedy}")
    if bad:
        log.warning("skipped %s in %s:\n%s", _count(len(bad), "unusable picture"), folder, _some(bad))
    if not found:
        raise UserError(f"no usable picture in {folder}: put at least one photograph (e.g. .jpg, .png) there.")
    return Photographs(list(found), list(found.values())), [path.name for path in found]


def picture_files(folder: Path) -> list[Path]:
    """The files directly in `folder` that are pictures by name, or nameless ones that are by content; sorted."""
    files = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".") and not p.stem.endswith(MASK))
    found = [p for p in files if p.suffix.lower() in SUFFIXES or (not p.suffix and _opens(p))]
    return sorted(found, key=lambda p: (p.name.casefold(), p.name))  # the same order on every file system


def read_image(path: Path, notices: bool = True) -> Image.Image:
    """Read one photograph as an upright, opaque RGB picture in its original size.

    Colours: CMYK goes through its embedded profile where there is one; RGB profiles are ignored, as the papers' loaders
    do. 16-bit greys are scaled by 255/65535. Animated files give their first frame, with a notice.

    Args:
        path: the file.
        notices: whether to say what is odd about it; a second reading need not.

    Raises:
        ImageProblem: the reason in a few words.
    """
    level = logging.WARNING if notices else logging.DEBUG
    try:
        if path.stat().st_size == 0:
            raise ImageProblem("the file is empty (0 bytes)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, lower limit follows
            with Image.open(path, formats=_formats()) as image:
                _check_size(image.size)
                _notice_frames(image, path, level)
                image.load()
                return _to_rgb(_upright(image, path, level), path, level)
    except ImageProblem:
        raise
    except Image.DecompressionBombError as error:
        raise ImageProblem(f"more than {MAX_PIXELS / 1e6:.0f} megapixels; scale it down") from error
    except Image.UnidentifiedImageError as error:
        heic = path.suffix.lower() in (".heic", ".heif")
        reason = "HEIC cannot be read; export it as JPEG" if heic else "not a picture, or in an unknown format"
        raise ImageProblem(reason) from error
    except Exception as error:  # decoders raise anything on damaged data (OSError, SyntaxError, struct.error, ...)
        raise ImageProblem(f"broken ({error})".replace("\n", " ")) from error


def to_pixels(image: Image.Image, size: int, crop: Crop, flip: bool) -> Tensor:
    """Training pixels of a picture, as in the authors' loaders, see `Crop`.

    Args:
        image: RGB.
        size: side of the result in pixels.
        crop: how it becomes square; where it is random, the middle is cut.
        flip: mirror left and right (after resizing, as the authors do).

    Returns:
        float32 (3, size, size) in [-1, 1], x / 127.5 - 1.
    """
    pixels = in_range(cut(to_levels(image, size, crop), size))
    return (pixels.flip(-1) if flip else pixels).contiguous()


def in_range(levels: Tensor) -> Tensor:
    """Levels uint8 (3, H, W) as float32 in [-1, 1]: float64, then rounded once, bit-equal to the authors'."""
    return (levels.double() / 127.5 - 1.0).float()


def to_levels(image: Image.Image, size: int, crop: Crop) -> Tensor:
    """A picture scaled as `crop` says, uint8 (C, H, W): its short side is `size`, the long one is not `cut` yet."""
    w, h = image.size
    if crop in ("middle", *RANDOM):
        long = int(size * max(w, h) / min(w, h))  # as torchvision's Resize
        how = Image.Resampling.BICUBIC if crop == "random_cubic" else Image.Resampling.BILINEAR
        image = image.resize((size, long) if w <= h else (long, size), how)
    else:
        if crop == "square":
            side = min(w, h)
            left, top = (w - side) // 2, (h - side) // 2
            image = image.crop((left, top, left + side, top + side))
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1).contiguous()


def cut(levels: Tensor, size: int, offset: int | None = None) -> Tensor:
    """A square (C, size, size) of scaled levels (C, H, W), from `offset` on along the long side; None: the middle."""
    starts = [
        0 if side == size else round((side - size) / 2.0) if offset is None else offset for side in levels.shape[1:]
    ]
    top, left = starts
    return levels[:, top : top + size, left : left + size]


def corner(picture: tuple[int, int], size: int, crop: Crop, offset: int | None, flip: bool) -> tuple[int, int]:
    """Top and left of what `to_levels` and `cut` keep, in pixels of the whole picture scaled as they scale it.

    Args:
        picture: its width and height.
        size: side of the result.
        crop: how it becomes square.
        offset: where a random crop begins along the long side; None for the middle.
        flip: whether it is mirrored, which a corner is given for as if it had been done first.
    """
    if crop == "squeeze":
        return 0, 0
    w, h = picture
    long = size * max(w, h) / min(w, h) if crop == "square" else int(size * max(w, h) / min(w, h))
    start = (long - size) / 2.0 if offset is None else offset
    start = round(long - size - start if flip and w > h else start)
    return (0, start) if w > h else (start, 0)


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture that `read_image` has read, from the head of its file."""
    with Image.open(path, formats=_formats()) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (image.height, image.width) if turned else image.size


def _formats() -> list[str]:
    """The wanted formats this Pillow can open (HEIF only with a plug-in, AVIF since 11.3)."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _opens(path: Path) -> bool:
    """Whether a file without a suffix is a picture by its first bytes."""
    try:
        with Image.open(path, formats=_formats()):
            return True
    except Image.DecompressionBombError:
        return True  # a picture, and read_image will say what is wrong with it
    except (OSError, ValueError, SyntaxError):
        return False


def _check_size(size: tuple[int, int]) -> None:
    """Refuse pictures too small to show anything or too large to hold."""
    w, h = size
    if w * h > MAX_PIXELS:
        raise ImageProblem(f"{w}x{h} is more than {MAX_PIXELS / 1e6:.0f} megapixels; scale it down")
    if min(w, h) < MIN_SIDE:
        raise ImageProblem(f"{w}x{h} is too small; each side needs at least {MIN_SIDE} pixels")


def _notice_frames(image: Image.Image, path: Path, level: int) -> None:
    """Say that only the first frame or page is used (a phone's MPO holds the same photo twice: no notice)."""
    if image.format != "MPO" and getattr(image, "is_animated", False):
        log.log(level, "%s holds several frames; the first one is used", path.name)
        image.seek(0)


def _upright(image: Image.Image, path: Path, level: int) -> Image.Image:
    """Turn the picture as its EXIF orientation says."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # damaged EXIF raises anything; the pixels are sound
        log.log(level, "%s: EXIF data cannot be read (%s); taken as upright", path.name, error)
        return image


def _to_rgb(image: Image.Image, path: Path, level: int) -> Image.Image:
    """Any Pillow mode to opaque 8-bit RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        return _deep_grey(image)
    if image.mode == "CMYK":
        return _cmyk(image, path, level)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (*BACKGROUND, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """One channel of 16-bit integers (0..65535) or floats (0..1) to RGB; other ranges have no agreed white."""
    grey = np.asarray(image).astype(np.float64)
    white = 1.0 if image.mode == "F" else 65535.0
    if not np.isfinite(grey).all() or grey.min() < 0 or grey.max() > white:
        raise ImageProblem(
            f"grey values from {grey.min():g} to {grey.max():g}, expected 0 to {white:g}; save it as 8 bit"
        )
    return Image.fromarray(np.rint(grey * (255.0 / white)).astype(np.uint8)).convert("RGB")


def _cmyk(image: Image.Image, path: Path, level: int) -> Image.Image:
    """CMYK to RGB by the embedded profile, else by Pillow's plain formula.

    Adobe writes JPEG inks inverted; Pillow already turns every CMYK JPEG round (as browsers do), so 0 is no ink.
    """
    profile = image.info.get("icc_profile")
    if profile:
        try:
            rgb = ImageCms.profileToProfile(image, BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB")
            assert rgb is not None, "a new picture was asked for"
            return rgb
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            log.log(level, "%s: its colour profile cannot be used (%s); plain CMYK conversion", path.name, error)
    return image.convert("RGB")


def _count(number: int, noun: str) -> str:
    """Count in words: "1 picture", "2 pictures"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _some(lines: Iterable[str]) -> str:
    """At most ten lines, then how many more."""
    lines = list(lines)
    more = [f"  and {len(lines) - MAX_NAMED} more"] if len(lines) > MAX_NAMED else []
    return "\n".join([f"  {line}" for line in lines[:MAX_NAMED]] + more)
