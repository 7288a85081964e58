"""The world's own judges: one small network in two roles, who is it (identity) and what is seen (attributes).

A convolutional network because judges are trained in minutes: at equal time it reads colours, coats and poses better
than a transformer that starts from nothing. A folder holds `config.json` and `model.safetensors`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as as_bytes
from torch import Tensor, nn

from hiperlab import files
from hiperlab.errors import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Shape:
    """What a judge is built from.

    Attributes:
        size: side of the pictures it was trained on.
        channels: widths, each at half the side of the one before; divisible by 8.
        heads: name -> number of outputs: {"embedding": 64}, or one entry per attribute.
        labels: attribute -> its values in order; empty for an identity encoder.
    """

    size: int
    channels: tuple[int, ...]
    heads: Mapping[str, int]
    labels: Mapping[str, tuple[str, ...]]


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut; the first one halves the side."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(8, after)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        self.last = nn.GroupNorm(8, after)
        self.shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H/2, W/2)."""
        short = self.shortcut(F.avg_pool2d(x, 2))
        x = F.silu(self.norm(self.first(x)))
        return F.silu(self.last(self.second(x)) + short)


class Judge(nn.Module):
    """Pictures in, one vector per head out.

    Args:
        shape: its widths and heads.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        widths = [3, *shape.channels]
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in itertools.pairwise(widths)))
        # mean and maximum: how much of a colour there is, and whether a small thing is there at all
        self.heads = nn.ModuleDict({name: nn.Linear(2 * widths[-1], n) for name, n in shape.heads.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> head -> (B, outputs)."""
        x = self.blocks(pixels)
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)
        return {name: head(pooled) for name, head in self.heads.items()}


def save(judge: Judge, folder: Path) -> None:
    """Write a judge in half precision."""
    tensors = {key: value.detach().half().cpu().contiguous() for key, value in judge.state_dict().items()}
    files.atomic_write(folder / WEIGHTS, as_bytes(tensors))
    files.write_json(folder / CONFIG, asdict(judge.shape))


def load(folder: Path) -> Judge:
    """Read a judge in float32, frozen.

    Raises:
        UserError: the folder does not hold one.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        shape = Shape(
            size=int(config["size"]),
            channels=tuple(config["channels"]),
            heads=dict(config["heads"]),
            labels={name: tuple(values) for name, values in config["labels"].items()},
        )
        judge = Judge(shape)
        judge.load_state_dict({key: value.float() for key, value in load_file(folder / WEIGHTS).items()})
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no judge ({CONFIG} and {WEIGHTS}): {error.filename} is missing.") from error
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(f"{folder} does not hold a usable judge ({reason}): train or fetch it again.") from error
    return judge.eval().requires_grad_(False)


def begin_with(judge: Judge, folder: Path, said: str) -> None:
    """Copy the weights of another judge of the same widths; heads that it lacks, or that differ, stay as they are.

    Args:
        judge: changed in place.
        folder: of the other one.
        said: how the setting is written, for the error.

    Raises:
        UserError: it has other widths.
    """
    earlier = load(folder)
    if earlier.shape.channels != judge.shape.channels:
        raise UserError(f"{said} holds a judge of widths {earlier.shape.channels}, not {judge.shape.channels}.")
    own = judge.state_dict()
    judge.load_state_dict(
        {k: v for k, v in earlier.state_dict().items() if k in own and v.shape == own[k].shape}, strict=False
    )


def split(shape: Shape, values: Sequence[str]) -> dict[str, slice]:
    """Where the outputs of each named head lie when all heads stand side by side in the shape's order."""
    places, start = {}, 0
    for name, count in shape.heads.items():
        places[name] = slice(start, start + count)
        start += count
    return {name: places[name] for name in values}
