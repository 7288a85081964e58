"""Files of E4T's public reimplementation: weight_offsets.pt, encoder.pt, unet.pt, config.json.

They are written and read by e4t/utils.py and tuning_e4t.py (mkshing/e4t-diffusion).
Names here are ours: offsets "<attention>.to_q.linear1.weight", the encoder's head as in `hiperlab.layer.image_encoder`,
the tower as in transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hiperlab import files
from hiperlab.errors import UserError
from hiperlab.formats import open_clip, pickles

OFFSETS, ENCODER, UNET, CONFIG, PICTURE = "weight_offsets.pt", "encoder.pt", "unet.pt", "config.json", "domain.png"
MOST_BYTES = 8 * 1024**3  # SD 1.x: 3.7 GiB for the U-Net, 3.2 GiB for the encoder
_OFFSET = re.compile(r"(.+\.attn[12])\.wo_([qkv])\.(.+)")
_FIRST = re.compile(r"first_linears\.(\d+)\.(weight|bias)")


@dataclass(frozen=True)
class Found:
    """A folder of the reimplementation.

    Args:
        config: config.json; of a tuned concept its own settings over those of the pre-training.
        kind: "patch_tokens" or "cls_layers" (the reimplementation's first weeks).
        offsets: by our names.
        head: by our names.
        tower: by transformers' names; empty where the file has none.
        unet: the U-Net's own weights; None where they are the base model's.
        picture: the one it was tuned on, or None.
    """

    config: dict[str, Any]
    kind: str
    offsets: dict[str, Tensor]
    head: dict[str, Tensor]
    tower: dict[str, Tensor]
    unet: dict[str, Tensor] | None
    picture: Path | None


def read(folder: Path) -> Found:
    """Read a pre-trained or a tuned checkpoint.

    Raises:
        UserError: files are missing, broken, or hold other things than this.
    """
    tuned = (folder / UNET).is_file()
    config = _config(folder / CONFIG)
    encoder = _tensors(folder / ENCODER)
    whole = _tensors(folder / (UNET if tuned else OFFSETS))
    offsets = {_ours(name): value for name, value in whole.items() if _OFFSET.fullmatch(name)}
    base = {name: value for name, value in whole.items() if not _OFFSET.fullmatch(name)}
    if not offsets or (base and not tuned):
        raise UserError(f"{folder / (UNET if tuned else OFFSETS)} holds no weight offsets of E4T.")
    picture = folder / PICTURE if (folder / PICTURE).is_file() else None
    kind, head, tower = _split(encoder, folder / ENCODER)
    return Found(config, kind, offsets, head, tower, base if tuned else None, picture)


def write(
    folder: Path,
    config: Mapping[str, Any],
    offsets: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    tower: Mapping[str, Tensor],
    unet: Mapping[str, Tensor] | None,
    picture: Tensor,
) -> list[Path]:
    """Write what `read` reads; returns the files.

    Args:
        folder: where to.
        config: settings by the reimplementation's names.
        offsets: by our names.
        head: by our names.
        tower: by transformers' names.
        unet: the U-Net's own weights, or None if they are the base model's.
        picture: (3, H, W) in [-1, 1].
    """
    theirs = {_theirs(name): value for name, value in offsets.items()}
    encoder = {f"clip_vision.{name}": value for name, value in open_clip.to_open_clip(tower).items()}
    for name, value in head.items():
        if name.startswith("first_"):
            part = name.removeprefix("first_")
            encoder |= {f"first_linears.{number}.{part}": each for number, each in enumerate(value)}
        else:
            encoder[name] = value
    weights = OFFSETS if unet is None else UNET
    _save(folder / weights, {**(unet or {}), **theirs})
    _save(folder / ENCODER, encoder)
    settings = {**config, "library_versions": {name: version(name) for name in ("hiperlab", "torch", "diffusers")}}
    files.write_json(folder / CONFIG, settings)
    levels = ((picture.detach().cpu().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    image = Image.fromarray(levels.permute(1, 2, 0).numpy())
    files.atomic_write(folder / PICTURE, lambda file: image.save(file, format="PNG"))
    return [folder / weights, folder / ENCODER, folder / CONFIG, folder / PICTURE]


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist. Give the folder that holds {CONFIG}, {ENCODER} and {OFFSETS}.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}). Fetch the checkpoint again.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no settings. Fetch the checkpoint again.")
    return {**found.get("pretrained_args", {}), **found}


def _tensors(path: Path) -> dict[str, Tensor]:
    return pickles.named_tensors(path, pickles.load(path, most=MOST_BYTES), "a file of E4T")


def _ours(name: str) -> str:
    """Of "<attention>.wo_q.v": "<attention>.to_q.v". Matched whole, as other names may contain "wo"."""
    return _OFFSET.sub(r"\1.to_\2.\3", name)


def _theirs(name: str) -> str:
    return re.sub(r"(.+\.attn[12])\.to_([qkv])\.(.+)", r"\1.wo_\2.\3", name)


def _split(encoder: dict[str, Tensor], path: Path) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """The head's form, the head and the tower of an encoder.pt."""
    vision = {name.removeprefix("clip_vision."): v for name, v in encoder.items() if name.startswith("clip_vision.")}
    rest = {name: value for name, value in encoder.items() if not name.startswith("clip_vision.")}
    whole = "vision_model.post_layernorm.weight" in vision  # transformers' tower, in the first weeks
    try:
        plain = {name.removeprefix("vision_model."): value for name, value in vision.items()}
        tower = plain if whole else open_clip.to_transformers(vision)
    except UserError as error:
        raise UserError(f"{path} holds another tower: {error}") from error
    if "linear.weight" in rest:
        renamed = {re.sub(r"^linear\.", "vision_linear.", name): value for name, value in rest.items()}
        return "cls_layers", renamed, tower
    numbers = sorted({int(match[1]) for name in rest if (match := _FIRST.fullmatch(name))})
    if not numbers or numbers != list(range(len(numbers))):
        raise UserError(f"{path} holds no encoder of E4T: first_linears.0, 1, ... are missing.")
    head = {name: value for name, value in rest.items() if not _FIRST.fullmatch(name)}
    for part in ("weight", "bias"):
        each = [rest.get(f"first_linears.{number}.{part}") for number in numbers]
        if len({None if value is None else value.shape for value in each}) != 1 or each[0] is None:
            raise UserError(f"{path} holds no encoder of E4T: first_linears.*.{part} are missing or of several shapes.")
        head[f"first_{part}"] = torch.stack([value for value in each if value is not None])
    return "patch_tokens", head, tower


def _save(path: Path, state: Mapping[str, Tensor]) -> None:
    whole = {name: value.detach().float().cpu().contiguous().clone() for name, value in state.items()}
    files.atomic_write(path, lambda file: torch.save(whole, file))
