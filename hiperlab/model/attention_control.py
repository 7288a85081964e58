"""Attention in a control's hands: it gets a layer's queries, keys and values, or its map, or a named layer's output.

The processors keep nothing. A control belongs to one U-Net call and travels in its `Conditioning`; Prompt-to-Prompt
(Hertz et al. 2022, algorithm 1) is one that changes maps.
Axes: B rows of the call, H heads of width d, S image positions (pixels of the layer's map), N keys (tokens, or
positions again).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hiperlab.model.layer_hooks import hooked

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


class Control:
    """Reads and changes what attention layers, and other named layers, do in one U-Net call; this one leaves all alone.

    Under gradient checkpointing an attention layer runs twice; a control that keeps anything must overwrite, never
    append.
    """

    def wants(self, layer: Layer, pixels: int) -> bool:
        """Whether this layer, with S = `pixels` image positions, is asked of `attend`; others keep their own way."""
        return False

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What the layer attends to (B, H, S, d), from `query` (B, H, S, d), `key` and `value` (B, H, N, d)."""
        return F.scaled_dot_product_attention(query, key, value)

    def outputs(self) -> Collection[str]:
        """Paths in the U-Net of the layers (convolutions, …) whose output `output` replaces; only without gradients."""
        return ()

    def output(self, name: str, states: Tensor) -> Tensor:
        """What stands for the output `states` (B, …) of the layer `name`, same shape."""
        return states


class MapControl(Control, ABC):
    """A control of attention maps: each wanted one is made, in float32 or float64, and handed over."""

    @abstractmethod
    def __call__(self, layer: Layer, probabilities: Tensor) -> Tensor:
        """The map to use in place of `probabilities` (B, heads, S, N), float32 or float64; rows need not sum to 1."""

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `Control`, through the map."""
        return through_map(query, key, value, partial(self, layer))


def through_map(query: Tensor, key: Tensor, value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """softmax(Q K^T / sqrt d) V (Vaswani et al. 2017, eq. 1), with the map changed between; shapes as `attend`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * query.shape[-1] ** -0.5
    return (change(scores.softmax(dim=-1)) @ value.to(dtype)).to(value.dtype)


def replaced_outputs(control: Control, unet: nn.Module) -> AbstractContextManager[None]:
    """While inside, the outputs that the control names are replaced; the U-Net itself is not changed."""
    names = control.outputs()
    # A block that is replayed for its gradient runs when these are gone.
    assert not names or not torch.is_grad_enabled(), "outputs are replaced in calls without gradients"
    return hooked(unet, [(name, partial(_replace, control, name)) for name in names])


def _replace(control: Control, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return control.output(name, output)


class Record(MapControl):
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
