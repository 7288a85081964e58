"""Whole networks as diffusers and transformers keep them: what diffusers' train_dreambooth.py leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from hiperlab.errors import UserError
from hiperlab.formats import embedding, pickles

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"
TEXT = "model.safetensors"  # in a text encoder's folder


def read(path: Path) -> dict[str, Tensor]:
    """A network's tensors, of any shape, by their names, float32, without the text model's "text_model.".

    Raises:
        UserError: the file is missing, broken, unsafe, or holds something else.
    """
    content = embedding.tensors(path) if path.suffix == ".safetensors" else pickles.load(path)
    content = pickles.named_tensors(path, content, "a network")
    return {key.removeprefix("text_model."): value.detach().float() for key, value in content.items()}


def differences(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Theirs - ours for every weight of ours, same shape, float32 on the CPU.

    Args:
        theirs: tensors of a file.
        ours: the frozen network's weights.
        name: the file's, for messages.

    Raises:
        UserError: a weight is missing, superfluous or of another shape.
    """
    extra = {key for key in theirs.keys() - ours.keys() if not key.endswith("position_ids")}  # a buffer of old files
    wrong = sorted(extra | (ours.keys() - theirs.keys()))
    wrong += [key for key in ours.keys() & theirs.keys() if ours[key].shape != theirs[key].shape]
    if wrong:
        raise UserError(
            f"{name} is another network: {', '.join(wrong[:3])} differ. Load the base model it was made for."
        )
    return {key: theirs[key] - value.detach().float().cpu() for key, value in ours.items()}


def write_unet(folder: Path, unet: Any, changed: Mapping[str, Tensor]) -> Path:
    """`unet/` as `UNet2DConditionModel.from_pretrained` reads it, some weights replaced by `changed`, same shapes."""
    path = folder / UNET
    path.parent.mkdir(parents=True, exist_ok=True)
    unet.save_config(path.parent)
    save_file(_replaced(unet, changed), path, metadata={"format": "pt"})
    return path


def write_text(folder: Path, name: str, text: Any, changed: Mapping[str, Tensor]) -> Path:
    """A text encoder's folder as transformers' `from_pretrained` reads it, some weights replaced, same shapes.

    Args:
        folder: where.
        name: the folder's in it, "text_encoder" or SDXL's "text_encoder_2".
        text: the text model.
        changed: its changed weights by its own names.
    """
    path = folder / name / TEXT
    text.save_pretrained(path.parent, state_dict=_replaced(text, changed))
    return path


def _replaced(module: Any, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    states = {**module.state_dict(), **changed}
    assert len(states) == len(module.state_dict()), "a changed weight has another name"
    return {key: value.detach().cpu().contiguous().clone() for key, value in states.items()}
