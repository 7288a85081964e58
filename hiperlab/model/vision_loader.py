"""Load a CLIP picture tower: transformers' layout from a folder or the hub, bare weights, a random one for checks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection
from transformers.utils import logging as transformers_logging

from hiperlab import files
from hiperlab.errors import UserError
from hiperlab.hub import hub_problem
from hiperlab.model.state import misfits
from hiperlab.model.vision_tower import MEAN, STD, VisionTower

OPEN_CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # OpenCLIP's ViT-H-14, laion2b_s32b_b79k, as transformers reads it
OPENAI_BASE = "openai/clip-vit-base-patch16"  # OpenAI's ViT-B/16
PREPARED = "preprocessor_config.json"
FOLDER = "image_encoder"  # beside a model's unet/, where diffusers keeps a picture tower
_HEAD_WIDTH = {1280: 80}  # ViT-H; all other towers of OpenAI and OpenCLIP that are around have heads of 64


def load(path: str, setting: str = "method.tower", projection: bool = False) -> VisionTower:
    """A tower in transformers' layout, float32. Safetensors only; nothing is ever unpickled.

    Args:
        path: a folder with config.json and model.safetensors, or a hub id; of a whole CLIP its tower is taken. A
            folder's preprocessor_config.json says with which mean and std it was trained, else CLIP's are meant.
        setting: what named it, for messages.
        projection: whether its projection into CLIP's common space is needed, too.

    Raises:
        UserError: nothing is there, the hub cannot be reached, or it holds no picture tower.
    """
    folder = files.expand(path)
    options: dict[str, Any] = {}
    if folder.is_dir():
        path = str(folder)
    elif path.startswith((".", "/", "~", files.SHIPPED)):
        raise UserError(f"{setting}={path} does not exist. Give a folder with config.json and model.safetensors.")
    elif reason := hub_problem():
        if not isinstance(try_to_load_from_cache(path, "config.json"), str):
            raise UserError(
                f"the picture tower {path} is not in the local hub cache and cannot be fetched ({reason}). Fetch it "
                f"where there is a connection with `hf download {path}`, or give a local folder as {setting}."
            )
        options["local_files_only"] = True
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the rest of a whole CLIP would be reported at length
    try:
        kind: Any = CLIPVisionModelWithProjection if projection else CLIPVisionModel
        loaded: Any = kind.from_pretrained(path, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        first = " ".join(str(error).split()).split(". ")[0][:200]
        raise UserError(f"{setting}={path} cannot be loaded ({first}). Give a CLIP picture tower.") from error
    finally:
        transformers_logging.set_verbosity(level)
    network, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{setting}={path} is no CLIP picture tower: it lacks {missing[0]}. Give another.")
    mean, std = _colours(folder / PREPARED)
    return VisionTower(network.float().eval(), int(network.config.image_size), mean, std)


def from_state(state: Mapping[str, Tensor]) -> VisionTower:
    """A tower of OpenCLIP's kind (exact GELU) from its tensors by transformers' names; sizes follow from them.

    Args:
        state: e.g. "embeddings.patch_embedding.weight" (D, 3, patch, patch), "encoder.layers.0. ..." and so on.

    Raises:
        UserError: tensors are missing or of other shapes.
    """
    width, _, patch, _ = _of(state, "embeddings.patch_embedding.weight").shape
    side = round((len(_of(state, "embeddings.position_embedding.weight")) - 1) ** 0.5)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(_of(state, "encoder.layers.0.mlp.fc1.bias")),
        num_hidden_layers=len({name.split(".")[2] for name in state if name.startswith("encoder.layers.")}),
        num_attention_heads=max(1, width // _HEAD_WIDTH.get(width, 64)),
        image_size=side * patch,
        patch_size=patch,
        hidden_act="gelu",
    )
    with torch.device("meta"):
        network = CLIPVisionModel(config)
    tower = VisionTower(network.to_empty(device="cpu").eval(), side * patch)
    _restore_positions(tower)
    fill(tower, state)
    return tower


def fill(tower: VisionTower, state: Mapping[str, Tensor]) -> None:
    """Replace a tower's weights by others of the same shapes, by transformers' names with or without `vision_model.`.

    Raises:
        UserError: tensors are missing or of other shapes.
    """
    network = tower.network
    own = network.state_dict()
    prefix = "vision_model." if next(iter(own)).startswith("vision_model.") else ""
    found = {f"{prefix}{name.removeprefix('vision_model.')}": value for name, value in state.items()}
    found = {name: value for name, value in found.items() if not name.endswith("position_ids")}
    if wrong := misfits(own, found):
        raise UserError(
            f"the encoder's picture tower is another than method.tower names ({wrong[0]} differs): name the one it "
            "was trained with, or null to take it as it comes."
        )
    network.load_state_dict({name: value.float() for name, value in found.items()})


def tiny_tower(seed: int, width: int = 16, projection: bool = False) -> VisionTower:
    """A tower with random weights, for checks with `model=tiny`; the global random state is left as it was."""
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4, num_attention_heads=2, image_size=32,
        patch_size=8, hidden_act="gelu", projection_dim=width,
    )  # fmt: skip
    kind = CLIPVisionModelWithProjection if projection else CLIPVisionModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTower(kind(config).eval(), 32)


def beside(base: str | None) -> str | None:
    """The tower in a model's own folder, if it has one there."""
    folder: Path | None = files.expand(base) / FOLDER if base else None
    return str(folder) if folder and (folder / "config.json").is_file() else None


def _colours(path: Path) -> tuple[list[float], list[float]]:
    """Mean and std per channel as transformers' image processors keep them, or CLIP's."""
    if not path.is_file():
        return list(MEAN), list(STD)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        mean, std = ([float(value) for value in found[key]] for key in ("image_mean", "image_std"))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} has no image_mean and image_std of three numbers ({error}). Mend or remove it."
        ) from error
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UserError(f"{path} has image_mean={mean} and image_std={std}: three numbers each are expected.")
    return mean, std


def _restore_positions(tower: VisionTower) -> None:
    """Position numbers are a buffer that no checkpoint holds."""
    for name, buffer in tower.network.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))


def _of(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise UserError(f"the encoder file holds no picture tower: {name} is missing. Name one as method.tower.")
    return state[name]
