"""Take finished parts from an exported miniature, so that one part can be trained on without training the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as as_bytes

from hiperlab import files
from hiperlab.errors import UserError
from hiperlab.miniature import record
from hiperlab.miniature.plan import Workshop

PARTS = {  # stage -> folders of an export that are its weights, with their names among them
    "tokenizer": {"tokenizer": ""},
    "vae": {"vae": ""},
    "clip": {"text_encoder": "text_encoder", "image_encoder": "image_encoder"},
    "identity": {"judges/identity": ""},
    "reader": {"judges/attributes": ""},
    "scorer": {"judges/clip": ""},
}


def adopt(shop: Workshop, export: Path, asked: Sequence[str]) -> list[str]:
    """Put an export's parts in place of stages that are neither asked for nor there; half precision becomes float32.

    Args:
        shop: the training.
        export: the folder, e.g. `hiperlab/weights/mini`.
        asked: stages that will be trained here.

    Returns:
        The adopted stages.

    Raises:
        UserError: it is no exported miniature.
    """
    try:
        card: Any = json.loads((export / "card.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"parts_from={export} is no exported miniature: its card.json cannot be read.") from error
    taken = []
    for stage, folders in PARTS.items():
        if stage in asked or record.read(shop.folder(stage)) or not (export / next(iter(folders))).is_dir():
            continue
        for source, name in folders.items():
            _copy(export / source, shop.weights(stage) / name)
        earlier = card["stages"].get(stage, {})
        keep = {key: earlier[key] for key in ("settings", "samples", "check") if key in earlier}
        known = {"status": "finished", "digest": "adopted", "inputs": {}, "adopted": True}
        record.write(shop.folder(stage), stage=stage, **known, **keep)
        taken.append(stage)
    return taken


def _copy(source: Path, target: Path) -> None:
    """A folder's files; floating tensors in float32."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            tensors = {
                key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()
            }
            files.atomic_write(target / path.name, as_bytes(tensors, {"format": "pt"}))
        else:
            shutil.copyfile(path, target / path.name)
