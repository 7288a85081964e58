"""Whether a model is of SDXL's kind, told from the names of its parts, before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from hiperlab import files
from hiperlab.hub import hub_problem

INDEX = "model_index.json"  # of a folder in diffusers' layout: which parts there are
XL = "text_encoder_2"  # the part that SDXL has and earlier ones lack
XL_KEY = "conditioner.embedders.1."  # the same in a single file of the original layout


def config_is_sdxl(model: Mapping[str, Any]) -> bool:
    """Whether a composed config of the group model asks for such a model; False where it cannot be told yet."""
    if str(model.get("_target_")).rpartition(".")[2].endswith("sdxl"):
        return True  # built in code
    return "path" in model and is_sdxl(str(model["path"]), model.get("revision"))


def is_sdxl(path: str, revision: str | None = None) -> bool:
    """Whether a model is of SDXL's kind; False where it cannot be told yet.

    Args:
        path: a folder, a single file or a hub id, as `hiperlab.model.load.pretrained` takes them.
        revision: branch or commit on the hub.
    """
    place = files.expand(path)
    if place.is_file():
        return file_has_two(place)
    if place.exists() or path.startswith((".", "/", "~", files.SHIPPED)):
        return folder_has_two(place)
    return XL in hub_index(path, revision)


def folder_has_two(folder: Path) -> bool:
    """Whether a folder in diffusers' layout holds SDXL's second text encoder."""
    return (folder / XL).is_dir() or XL in index(folder)


def file_has_two(file: Path) -> bool:
    """Whether a single file of the original layout holds SDXL's second text encoder."""
    try:
        with safe_open(file, "pt") as content:
            return any(key.startswith(XL_KEY) for key in content.keys())  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError):
        return False  # the reader says what is wrong with it


def index(folder: Path) -> Mapping[str, Any]:
    """What a folder's `model_index.json` says; empty where there is none, as in many copies."""
    try:
        found = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def hub_index(path: str, revision: str | None) -> Mapping[str, Any]:
    """The same of a repository on the hub, from the local cache where the hub cannot be asked."""
    try:
        found = hf_hub_download(path, INDEX, revision=revision, local_files_only=hub_problem() is not None)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return {}
    return index(Path(found).parent)
