"""Where the authors' numbers are. Everything a test needs to know comes from the folder's own files."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hiperlab.model.load import pretrained
from hiperlab.model.stack import FrozenStack
from hiperlab.model.tiny import tiny

ROOT = Path(__file__).parents[2]
SLICE = Path(__file__).parent / "slice"  # committed, made by make_slice.py: the core numbers for a fresh clone
WORST: dict[str, float] = {}  # item -> largest relative error, printed at the end by conftest


def place(name: str) -> Path:
    """`$HIPERLAB_GOLDEN/<name>`, by default in a folder of recorded numbers beside the checkout; it may be absent."""
    return Path(os.environ.get("HIPERLAB_GOLDEN", ROOT.parent / "shared" / "golden")) / name


def folder(name: str) -> Path:
    """`place`, for a test: skips where it is absent."""
    path = place(name)
    if not path.is_dir():
        pytest.skip(f"golden folder {name!r} is absent: set HIPERLAB_GOLDEN to the folder that holds it")
    return path


class _Tensors(dict):
    """A golden file's tensors; asking for one that the slice leaves out skips the test."""

    def __missing__(self, name: str) -> Tensor:
        pytest.skip(f"{name} is not in the committed slice; the full golden folder has it")


@functools.cache
def tensors(path: Path) -> dict[str, Tensor]:
    return _Tensors(load_file(path))


@functools.cache
def config(path: Path) -> dict:
    return json.loads(path.read_text())


@functools.cache
def twin(size: int, source: str) -> FrozenStack:
    """The golden twin; of the slice only its text encoder is the authors', with the rows that golden prompts use."""
    if source == "golden":
        return pretrained("twin", str(folder("tiny-sd14")), size=size)
    stack = tiny(seed=0, size=size)
    state = load_file(SLICE / "text_encoder" / "model.safetensors")
    ids, rows = state.pop("ids"), state.pop("rows")
    text = stack.text.state_dict()
    name = next(name for name in text if name.endswith("token_embedding.weight"))
    prefix = name.removesuffix("embeddings.token_embedding.weight")
    text.update({f"{prefix}{key.removeprefix('text_model.')}": value for key, value in state.items()})
    text[name][ids] = rows
    stack.text.load_state_dict(text)
    return stack


def numbers(names: Iterable[str], pattern: str) -> list[int]:
    """The different numbers, ascending, that names hold where the pattern has its one group."""
    found = (re.fullmatch(pattern, name) for name in names)
    return sorted({int(match[1]) for match in found if match})


def close(item: str, ours: Tensor, theirs: Tensor, limit: float, absolute: bool = False) -> None:
    """Compare as the golden README does: largest difference over largest reference (or absolute), with a limit."""
    assert ours.shape == theirs.shape, f"{item}: shape {tuple(ours.shape)}, golden {tuple(theirs.shape)}"
    scale = 1.0 if absolute else max(float(theirs.double().abs().max()), 1e-30)
    error = float((ours.detach().double() - theirs.double()).abs().max()) / scale
    WORST[item] = max(error, WORST.get(item, 0.0))
    assert error <= limit, f"{item}: error {error:.2e} exceeds {limit:.0e}"


def pick(everything: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it; skips where the slice leaves them all out."""
    found = {name.removeprefix(prefix): value for name, value in everything.items() if name.startswith(prefix)}
    return found or everything[f"{prefix}*"]  # type: ignore[return-value]


torch.manual_seed(0)
