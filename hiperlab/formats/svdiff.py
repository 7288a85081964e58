"""Files of spectral shifts, as train_svdiff.py of mkshing/svdiff-pytorch writes them: one for each changed network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hiperlab.errors import UserError
from hiperlab.formats import embedding

UNET = "spectral_shifts.safetensors"
TEXT = "spectral_shifts_te.safetensors"
END = ".delta"
PREFIX = "text_model."  # transformers of 2023 called the text model's layers so


def write(folder: Path, unet: Mapping[str, Tensor], text: Mapping[str, Tensor]) -> list[Path]:
    """Write shifts (r,) by layer; the text encoder's file only if it has any.

    Args:
        folder: where; must exist.
        unet: of the U-Net.
        text: of the text encoder, layers without "text_model.".
    """
    parts = [(UNET, "", unet), *([(TEXT, PREFIX, text)] if text else [])]
    for name, prefix, shifts in parts:
        states = {f"{prefix}{layer}{END}": value.detach().float().cpu().clone() for layer, value in shifts.items()}
        save_file(states, folder / name)
    return [folder / name for name, _, _ in parts]


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Shifts (r,) by layer of the U-Net and of the text encoder; the second are none without their file.

    Args:
        path: either of the two, which lie side by side; a lone file may have any name and is the U-Net's.

    Raises:
        UserError: the file is missing, broken, or holds something else.
    """
    if path.name == TEXT:
        path = path.with_name(UNET)
    beside = path.with_name(TEXT)
    text = _shifts(beside) if path.name == UNET and beside.is_file() else {}
    return _shifts(path), {layer.removeprefix(PREFIX): value for layer, value in text.items()}


def fitted(found: Mapping[str, Tensor], ours: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """A file's shifts for every layer of ours, same shape.

    Args:
        found: by layer.
        ours: shifts of the network, by layer.
        name: the file's, for messages.

    Raises:
        UserError: a layer is missing, superfluous or of another shape.
    """
    wrong = sorted(found.keys() ^ ours.keys())
    wrong += [layer for layer in found.keys() & ours.keys() if found[layer].shape != ours[layer].shape]
    if wrong:
        raise UserError(
            f"{name} is of another network: {', '.join(wrong[:3])} differ. Load the base model it was made for."
        )
    return {layer: found[layer] for layer in ours}


def _shifts(path: Path) -> dict[str, Tensor]:
    found = embedding.tensors(path)
    strange = [key for key, value in found.items() if not key.endswith(END) or value.dim() != 1]
    if strange or not found:
        raise UserError(f"{path.name} holds no spectral shifts: {strange[0] if strange else 'it is empty'}.")
    return {key.removesuffix(END): value.to(torch.float32) for key, value in found.items()}
