"""Load a Stable Diffusion from a folder, the hub or one file. Safetensors only; nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import try_to_load_from_cache
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from hiperlab import files
from hiperlab.errors import UserError
from hiperlab.hub import first_line, hub_problem
from hiperlab.model.kind import XL, file_has_two, folder_has_two, hub_index, index
from hiperlab.model.stack import FrozenStack
from hiperlab.model.text_towers import side_by_side


def pretrained(
    name: str,
    path: str,
    size: int,
    revision: str | None = None,
    variant: str | None = None,
    config: str | None = None,
    note: str = "",
    pooled_at: str = "end",
) -> FrozenStack:
    """Load tokenizers, text encoders, VAE, U-Net and schedule of one Stable Diffusion in float32.

    Whether it is SDXL is read from the folder (`model_index.json`) or from the file's names.

    Args:
        name: how artifacts and results call the base, e.g. "sd14".
        path: a folder in diffusers' layout ("hiperlab:weights/mini" is the shipped one), a hub id such as
            "CompVis/stable-diffusion-v1-4", or a single file of the original layout (.safetensors).
        size: picture side in pixels (512; 768 for SD 2.1, 1024 for SDXL).
        revision: branch or commit on the hub.
        variant: "fp16" to load the half-precision files.
        config: of a single file: the folder or hub id whose tokenizer, schedule and shapes it has; None lets diffusers
            guess from its weights.
        note: one line shown with every result.
        pooled_at: where SDXL's pooled row is taken, see `text_towers.pooled_places`.

    Raises:
        UserError: nothing is there, the hub cannot be reached, the weights are not safetensors, or the model is not
            of the kind of Stable Diffusion 1.x, 2.x or XL.
    """
    file = files.expand(path)
    if config and not file.is_file():
        raise UserError(f"model.config={config} is of a single file, and model.path={path} is none: leave it out.")
    parts = _single_file(file, config) if file.is_file() else _layout(path, revision, variant)
    vae, unet = parts["vae"].float(), parts["unet"].float()
    texts: list[Any] = [each.float() for each in parts["texts"]]
    for tokenizer, text in zip(parts["tokenizers"], texts, strict=True):
        limit = text.config.max_position_embeddings
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)  # 1e30 if unsaid
    width = sum(text.config.hidden_size for text in texts)
    added = "text_time" if len(texts) > 1 else None
    reads = (unet.config.in_channels, unet.config.cross_attention_dim, unet.config.addition_embed_type)
    if reads != (4, width, added):
        raise UserError(
            f"model.path={path!r} is no text-to-image Stable Diffusion 1.x, 2.x or XL: its U-Net takes {reads[0]} "
            f"channels and text of width {reads[1]} (text encoders: {width}). Choose such a model, e.g. model=sd15."
        )
    return FrozenStack(
        name=name,
        towers=side_by_side(parts["tokenizers"], texts),
        vae=vae,
        unet=unet,
        scheduler_config=parts["scheduler"],
        size=size,
        pooled_at=pooled_at,
        zero_negative=parts["zero_negative"],
        note=note,
    )


def _layout(path: str, revision: str | None, variant: str | None) -> dict[str, Any]:
    """The parts of a folder or of a repository on the hub."""
    folder = files.expand(path)
    options: dict[str, Any] = {}
    if folder.exists() or path.startswith((".", "/", "~", files.SHIPPED)):
        said, two = index(folder), folder_has_two(folder)
        _check_folder(folder, two)
        path = str(folder)
    else:
        if revision:
            options["revision"] = revision
        if reason := hub_problem():  # the parts may lie in the local cache; its client would retry for a minute
            if not isinstance(try_to_load_from_cache(path, "unet/config.json", revision=revision), str):
                raise UserError(
                    f"model.path={path} is not in the local hub cache and cannot be fetched ({reason}). Fetch it where "
                    f"there is a connection with `hf download {path}`, or give a local folder in diffusers' layout."
                )
            options["local_files_only"] = True
        said = hub_index(path, revision)
        two = XL in said

    def part(loader: Callable[..., Any], subfolder: str, **extra: Any) -> Any:
        try:
            return loader(path, subfolder=subfolder, **options, **extra)
        except (OSError, ValueError) as error:
            raise UserError(_explain(path, subfolder, error)) from error

    weights: dict[str, Any] = {"use_safetensors": True} | ({"variant": variant} if variant else {})
    tokenizers = [part(AutoTokenizer.from_pretrained, f"tokenizer{end}") for end in (("", "_2") if two else ("",))]
    texts = [part(CLIPTextModel.from_pretrained, "text_encoder", **weights)]
    if two:
        texts.append(part(CLIPTextModelWithProjection.from_pretrained, XL, **weights))
    return {
        "scheduler": part(_scheduler_config, "scheduler"),
        "tokenizers": tokenizers,
        "texts": texts,
        "zero_negative": two and bool(said.get("force_zeros_for_empty_prompt", True)),
        "vae": part(AutoencoderKL.from_pretrained, "vae", **weights),
        "unet": part(UNet2DConditionModel.from_pretrained, "unet", **weights),
    }


def _single_file(file: Path, config: str | None) -> dict[str, Any]:
    """The parts of a checkpoint in the original layout, as diffusers converts it."""
    if file.suffix.lower() != ".safetensors":
        raise UserError(
            f"model.path={file} is a pickle, which may run code. Save its tensors as .safetensors, or convert it once "
            "with diffusers' StableDiffusionPipeline.from_single_file(…).save_pretrained(<folder>)."
        )
    known = files.expand(config) if config else None
    problem = None if known and known.is_dir() else hub_problem()
    two = file_has_two(file)
    kind: Any = StableDiffusionXLPipeline if two else StableDiffusionPipeline
    try:
        pipeline = kind.from_single_file(
            str(file),
            config=str(known) if known and known.is_dir() else config,
            local_files_only=problem is not None or bool(known and known.is_dir()),
            **({} if two else {"safety_checker": None}),
        )
    except Exception as error:  # its reader raises whatever the first odd tensor leads to
        raise UserError(
            f"model.path={file} cannot be loaded as a single file ({first_line(error)}). "
            + (f"Its configuration may be missing ({problem}). " if problem else "")
            + "Name a folder or hub id of the same kind with model.config=…, e.g. one of SD 1.5."
        ) from error
    return {
        "scheduler": dict(pipeline.scheduler.config),
        "tokenizers": [pipeline.tokenizer, *([pipeline.tokenizer_2] if two else [])],
        "texts": [pipeline.text_encoder, *([pipeline.text_encoder_2] if two else [])],
        "zero_negative": two and bool(pipeline.config.get("force_zeros_for_empty_prompt", True)),
        "vae": pipeline.vae,
        "unet": pipeline.unet,
    }


def _scheduler_config(path: str, subfolder: str, **options: Any) -> dict[str, Any]:
    return dict(DDPMScheduler.load_config(path, subfolder=subfolder, **options))


def _check_folder(folder: Path, two: bool) -> None:
    if not folder.is_dir():
        raise UserError(f"model.path={folder} does not exist. Give a folder in diffusers' layout or a hub id.")
    parts = ["scheduler", "tokenizer", "text_encoder", "vae", "unet", *(["tokenizer_2", XL] if two else [])]
    missing = [name for name in parts if not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"model.path={folder} lacks {', '.join(missing)}/: it must be in diffusers' layout ({', '.join(parts)}). "
            "A single-file checkpoint is named itself: model.path=<file>.safetensors."
        )


def _explain(path: str, part: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "safetensors" in text and Path(path).exists():
        return f"model.path={path}: {part} has no safetensors weights (others are not loaded). Convert them first."
    first = text.split(". ")[0][:200]
    return (
        f"model.path={path}: cannot load {part} ({first}). Download the model once with network access "
        "(huggingface-cli download), or give model.path=<folder in diffusers' layout>."
    )
