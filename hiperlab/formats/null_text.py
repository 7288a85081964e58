"""Null-text embeddings as the public notebooks hold them: a list of T tensors (1, N, D), one per sampling step.

Axes: T timesteps, N text tokens, D text width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hiperlab import files
from hiperlab.errors import UserError
from hiperlab.formats import pickles


def read(path: Path) -> Tensor:
    """The embeddings (T, N, D), float32, of a list of [1, N, D] or of one tensor [T, N, D] or [T, 1, N, D].

    Raises:
        UserError: there is no file, it is broken or unsafe, or it holds something else.
    """
    content = pickles.load(path)
    if isinstance(content, list) and content and all(isinstance(each, Tensor) for each in content):
        shapes = sorted({tuple(each.shape) for each in content})
        if len(shapes) > 1:
            raise UserError(f"{path.name} holds embeddings of different shapes: {shapes[0]} and {shapes[1]}.")
        content = torch.stack(content)
    if isinstance(content, Tensor) and content.dim() == 4 and content.shape[1] == 1:
        content = content[:, 0]
    if not isinstance(content, Tensor) or not content.is_floating_point() or content.dim() != 3:
        raise UserError(f"{path.name} is no list of embeddings: expected one tensor [1, N, D] per timestep.")
    return content.detach().float()


def write(path: Path, embeddings: Tensor) -> Path:
    """Write embeddings (T, N, D) as a list of T tensors [1, N, D], float32, in sampling order."""
    rows = [each.detach().float().cpu()[None].clone() for each in embeddings]
    files.atomic_write(path, lambda file: torch.save(rows, file))
    return path
