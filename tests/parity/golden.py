"""Where the authors' numbers are. Everything a test needs to know comes from the folder's own files."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[2]


def folder(name: str) -> Path:
    """`$HIPERLAB_GOLDEN/<name>` (default: ../shared/golden beside the checkout); skips the test where it is absent."""
    path = Path(os.environ.get("HIPERLAB_GOLDEN", ROOT.parent / "shared" / "golden")) / name
    if not path.is_dir():
        pytest.skip(f"golden folder {name!r} is absent: set HIPERLAB_GOLDEN to the folder that holds it")
    return path


@functools.cache
def tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


@functools.cache
def config(path: Path) -> dict:
    return json.loads(path.read_text())


WORST: dict[str, float] = {}  # item -> largest relative error, printed at the end by conftest


def close(item: str, ours: Tensor, theirs: Tensor, limit: float, absolute: bool = False) -> None:
    """Compare as the golden README does: largest difference over largest reference (or absolute), with a limit."""
    assert ours.shape == theirs.shape, f"{item}: shape {tuple(ours.shape)}, golden {tuple(theirs.shape)}"
    scale = 1.0 if absolute else max(float(theirs.double().abs().max()), 1e-30)
    error = float((ours.detach().double() - theirs.double()).abs().max()) / scale
    WORST[item] = max(error, WORST.get(item, 0.0))
    assert error <= limit, f"{item}: error {error:.2e} exceeds {limit:.0e}"


def pick(everything: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in everything.items() if name.startswith(prefix)}


torch.manual_seed(0)
