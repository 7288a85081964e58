"""Stage export: one folder in diffusers' layout, half precision, the judges inside, a card beside; weighed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from hiperlab import files
from hiperlab.errors import UserError
from hiperlab.miniature import card, record, unet
from hiperlab.miniature.parts import load_autoencoder, load_tokenizer
from hiperlab.miniature.plan import ORDER, PRODUCTS, Workshop

SHARD = "15MB"  # largest file of weights
JUDGES = {"scorer": "clip", "identity": "identity", "reader": "attributes"}  # stage -> folder in judges/


def megabytes(folder: Path) -> float:
    """Size of all files, in units of 10**6 bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def pipeline(shop: Workshop) -> Any:
    """The last trained parts as diffusers' pipeline, float16; what was not trained here is the base's."""
    trained = record.done(shop.folder("unet"))
    learnt = str(shop.weights("unet") if trained else shop.base)
    model: Any = UNet2DConditionModel.from_pretrained(learnt, subfolder="unet", local_files_only=True)
    text: Any = CLIPTextModel.from_pretrained(learnt, subfolder="text_encoder", local_files_only=True)
    earlier: Any = DDIMScheduler.from_pretrained(str(shop.base), subfolder="scheduler", local_files_only=True)
    vae = load_autoencoder(shop).cpu().half()
    vae.register_to_config(sample_size=8 * model.config.sample_size)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text.half(),
        tokenizer=load_tokenizer(shop.base),
        unet=model.half(),
        scheduler=DDIMScheduler(**unet.SCHEDULE) if trained else earlier,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def work(shop: Workshop, *, limit_mb: float) -> dict[str, Any]:
    """The stage. The folder appears whole: it is written beside its place and renamed.

    Args:
        shop: what all stages share.
        limit_mb: most 10**6 bytes the folder may weigh; the repository must travel.

    Raises:
        UserError: it weighs more.
    """
    final = shop.weights("export")
    draft = final.with_name("draft")
    shutil.rmtree(draft, ignore_errors=True)
    pipeline(shop).save_pretrained(draft, safe_serialization=True, max_shard_size=SHARD)
    names = shop.weights("unet") / unet.NAMER if record.done(shop.folder("unet")) else shop.base / unet.NAMER
    if names.is_file():
        save_file({key: value.half() for key, value in load_file(names).items()}, draft / unet.NAMER)
    kept = ["image_encoder", *([] if record.done(shop.folder("unet")) else ["e4t"])]  # a domain belongs to its U-Net
    for part in kept:
        if (shop.base / part).is_dir():
            shutil.copytree(shop.base / part, draft / part)
    _load_in_float32(draft / "text_encoder" / "config.json")
    for part in ("unet", "vae"):
        _forget_where(draft / part / "config.json")
    records = {stage: found for stage in ORDER if (found := record.read(shop.folder(stage))) and stage not in PRODUCTS}
    for stage, name in JUDGES.items():
        trained = record.done(shop.folder(stage))
        shutil.copytree(shop.weights(stage) if trained else shop.base / "judges" / name, draft / "judges" / name)
    card.write(shop, draft, records)
    weight = megabytes(draft)
    parts = {path.name: round(megabytes(path), 2) for path in sorted(draft.iterdir()) if path.is_dir()}
    if weight > limit_mb:
        raise UserError(
            f"the export weighs {weight:.1f} MB ({parts}), more than export.limit_mb={limit_mb}: train narrower "
            "networks (unet.channels, …) or raise the limit."
        )
    shutil.rmtree(final, ignore_errors=True)
    draft.rename(final)
    return {"status": "finished", "check": {"megabytes": round(weight, 2), "parts": parts}}


def _load_in_float32(config: Path) -> None:
    """Say float32 where transformers wrote float16: it loads in the stored type unless told, diffusers in float32.

    Without this, a plain `StableDiffusionPipeline.from_pretrained(folder)` would mix the two and fail.
    """
    values = json.loads(config.read_text(encoding="utf-8"))
    values["dtype"] = "float32"
    files.write_json(config, values)


def _forget_where(config: Path) -> None:
    """Take out the folder that diffusers notes: an export travels, folders do not."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("_name_or_path", None)
    files.write_json(config, values)
