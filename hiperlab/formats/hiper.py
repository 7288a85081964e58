"""Files of HiPer's train.py and of ShivamShrirao's train_imagic.py: bare tensors saved by torch.

Axes: N fitted text rows, D text width. `hiper_embeddings_step{k}.pt` holds the state after k + 1 updates: train.py
saves after the optimizer step of iteration k, which counts from 0.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from hiperlab import files
from hiperlab.errors import UserError
from hiperlab.formats import pickles


def read(path: Path) -> Tensor:
    """The rows (N, D), float32, of a bare tensor [1, N, D] or [N, D].

    Raises:
        UserError: there is no file, it is broken or unsafe, or it holds something else.
    """
    tensor = pickles.load(path)
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() not in (2, 3):
        found = f"a tensor {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise UserError(f"{path.name} is no embedding file: expected one tensor [1, N, D], found {found}.")
    if tensor.dim() == 3 and len(tensor) != 1:
        raise UserError(f"{path.name} holds {len(tensor)} embeddings, expected one: a tensor [1, N, D].")
    return tensor.detach().float().reshape(-1, tensor.shape[-1])


def write(path: Path, rows: Tensor) -> Path:
    """Write rows (N, D) as the authors do: a bare [1, N, D] float32 tensor on the CPU that requires grad."""
    tensor = rows.detach().float().cpu()[None].clone().requires_grad_()
    files.atomic_write(path, lambda file: torch.save(tensor, file))
    return path


def name(steps: int) -> str:
    """The authors' file name for the state after `steps` optimizer steps."""
    return f"hiper_embeddings_step{steps - 1}.pt"


def steps(path: Path) -> int | None:
    """The optimizer steps behind a file of the authors, from its name; None if it is named otherwise."""
    found = re.fullmatch(r"hiper_embeddings_step(\d+)\.pt", path.name)
    return int(found[1]) + 1 if found else None
