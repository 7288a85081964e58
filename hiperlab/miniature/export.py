"""Stage export: one folder in diffusers' layout, half precision, the judges inside, a card beside; weighed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPVisionModelWithProjection

from hiperlab import files
from hiperlab.errors import UserError
from hiperlab.miniature import card, clip, record, unet
from hiperlab.miniature import tokenizer as words
from hiperlab.miniature import vae as stage_vae
from hiperlab.miniature.plan import ORDER, PRODUCTS, Workshop

SHARD = "15MB"  # largest file of weights
JUDGES = {"scorer": "clip", "identity": "identity", "reader": "attributes"}  # stage -> folder in judges/


def megabytes(folder: Path) -> float:
    """Size of all files, in units of 10**6 bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def pipeline(shop: Workshop) -> Any:
    """The trained parts as diffusers' pipeline, float16."""
    learnt = str(shop.weights("unet"))
    model: Any = UNet2DConditionModel.from_pretrained(learnt, subfolder="unet", local_files_only=True)
    text: Any = CLIPTextModel.from_pretrained(learnt, subfolder="text_encoder", local_files_only=True)
    vae = stage_vae.load_last(shop).cpu().half()
    vae.register_to_config(sample_size=shop.size)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text.half(),
        tokenizer=words.load(shop.weights("tokenizer")),
        unet=model.half(),
        scheduler=DDIMScheduler(**unet.SCHEDULE),
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
    _image_encoder(shop, draft)
    names = {key: value.half() for key, value in load_file(shop.weights("unet") / unet.NAMER).items()}
    save_file(names, draft / unet.NAMER)
    for part in ("text_encoder", "image_encoder"):
        _load_in_float32(draft / part / "config.json")
    for part in ("unet", "vae"):
        _forget_where(draft / part / "config.json")
    records = {stage: found for stage in ORDER if (found := record.read(shop.folder(stage))) and stage not in PRODUCTS}
    missing = []
    for stage, name in JUDGES.items():
        if record.done(shop.folder(stage)):
            shutil.copytree(shop.weights(stage), draft / "judges" / name)
        else:
            missing.append(name)
    card.write(shop, draft, records, missing)
    weight = megabytes(draft)
    parts = {path.name: round(megabytes(path), 2) for path in sorted(draft.iterdir()) if path.is_dir()}
    if weight > limit_mb:
        raise UserError(
            f"the export weighs {weight:.1f} MB ({parts}), more than export.limit_mb={limit_mb}: train narrower "
            "networks (unet.channels, …) or raise the limit."
        )
    shutil.rmtree(final, ignore_errors=True)
    draft.rename(final)
    check = {"megabytes": round(weight, 2), "parts": parts, "missing_judges": missing}
    return {"status": "finished", "check": check}


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


def _image_encoder(shop: Workshop, folder: Path) -> None:
    """The conditioning CLIP's picture tower, so that the report can measure retrieval from the folder alone."""
    source = shop.weights("clip") / "image_encoder"
    tower: Any = CLIPVisionModelWithProjection.from_pretrained(str(source), local_files_only=True)
    tower.half().save_pretrained(folder / "image_encoder")
    reads = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # pixels in [-1, 1], not CLIP's own statistics
    files.write_json(folder / "image_encoder" / "preprocessor_config.json", reads)
    tensors = {key: value.half() for key, value in load_file(source / clip.PROJECTION).items()}
    save_file(tensors, folder / "image_encoder" / clip.PROJECTION)
