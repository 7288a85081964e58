"""Attention maps as values: a control gets a layer's map after the softmax and returns the one to use instead.

The processors keep nothing. A control belongs to one U-Net call and travels in its `Conditioning`; Prompt-to-Prompt
(Hertz et al. 2022, algorithm 1) is one.
Axes: B rows of the call, S image positions (pixels of the layer's map), N keys (tokens, or positions again).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

PLACES = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}


@dataclass(frozen=True)
class Layer:
    """One attention layer of the U-Net.

    Attributes:
        name: its path, e.g. "mid_block.attentions.0.transformer_blocks.0.attn2".
        place: "down", "mid" or "up".
        cross: whether it reads text (attn2) or the picture itself (attn1).
    """

    name: str
    place: str
    cross: bool


def layer_of(name: str) -> Layer:
    """The layer at a path of the U-Net."""
    return Layer(name, PLACES[name.split(".")[0]], name.endswith(".attn2"))


class Control(Protocol):
    """Reads and changes attention maps during one U-Net call.

    Under gradient checkpointing a layer runs twice; a control that keeps maps must overwrite, never append.
    """

    def wants(self, layer: Layer, pixels: int) -> bool:
        """Whether this layer, with S = `pixels` image positions, is called; all others keep their fused kernel."""

    def __call__(self, layer: Layer, probabilities: Tensor) -> Tensor:
        """The map to use in place of `probabilities` (B, heads, S, N), float32 or float64; rows need not sum to 1."""


class Record:
    """Keeps the maps of chosen layers, unchanged, and their gradients' graph.

    Args:
        wanted: (layer, pixels) -> whether to keep its map.

    Attributes:
        maps: (B, heads, S, N) by layer, in the order of execution.
    """

    def __init__(self, wanted: Callable[[Layer, int], bool]) -> None:
        self.wanted = wanted
        self.maps: dict[Layer, Tensor] = {}

    def wants(self, layer: Layer, pixels: int) -> bool:
        """Whether this layer, with S = `pixels` image positions, is one of those to keep."""
        return self.wanted(layer, pixels)

    def __call__(self, layer: Layer, probabilities: Tensor) -> Tensor:
        """Keep the map `probabilities` (B, heads, S, N) and return it unchanged."""
        self.maps[layer] = probabilities
        return probabilities


def cross_maps(pixels: int) -> Callable[[Layer, int], bool]:
    """Chooses the cross-attention maps of `pixels` positions in the down and up blocks, not in the middle one.

    As LocalBlend of the authors' prompt-to-prompt_stable.ipynb.
    """
    return lambda layer, size: layer.cross and size == pixels and layer.place != "mid"
