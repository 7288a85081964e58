"""The controls of one drawing of a source and its targets, step by step, and the cross-attention maps they have seen.

Axes: B texts (0 the source, 1 .. B-1 its targets), R rows of a call, T steps, S = s s image positions, N tokens, C
latent channels, H, W latent sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hiperlab.edit.attention_maps import square
from hiperlab.errors import UserError
from hiperlab.model.attention_control import Control, Layer, through_map


@dataclass(frozen=True)
class Rows:
    """Where the rows of B texts, the source first, stand in one call: guidance's unconditional ones in front.

    Attributes:
        texts: B.
        guided: whether there are unconditional rows.
        source_once: the source has one row, because both of its rows would read the same text: the B unconditional
            rows, its own among them, are followed by the conditional rows of the targets alone.
    """

    texts: int
    guided: bool
    source_once: bool = False

    @property
    def conditional(self) -> list[int]:
        """Of each text, its conditional row (B)."""
        if not self.guided:
            return list(range(self.texts))
        if self.source_once:
            return [0, *range(self.texts, 2 * self.texts - 1)]
        return list(range(self.texts, 2 * self.texts))

    @property
    def sources(self) -> list[int]:
        """Of each row of the call, the source's row in the same branch (R)."""
        first = self.conditional[0]
        return [0] * self.texts + [first] * (len(self) - self.texts)

    def target(self, number: int) -> list[int]:
        """The rows of target 0 .. B-2, the unconditional one first where there is one."""
        return [number + 1, self.conditional[number + 1]] if self.guided else [number + 1]

    def __len__(self) -> int:
        """R."""
        return (2 * self.texts - self.source_once) if self.guided else self.texts


class Edits:
    """The controls of one drawing; these leave every row alone and keep maps where asked.

    Args:
        rows: of each call.
        pixels: image positions of the cross-attention maps that are added up.
        stores: whether they are.

    Attributes:
        sums: the conditional rows' cross-attention maps (B, heads, S, N) by layer, added up over the steps so far.
    """

    remedy = "pictures of maps need the square of a side that the U-Net has"

    def __init__(self, rows: Rows, pixels: int, stores: bool) -> None:
        self.rows, self.pixels, self.stores = rows, pixels, stores
        self.sums: dict[Layer, Tensor] = {}

    def at(self, step: int) -> Control:
        """The control of the call at sampling step 0 .. T-1."""
        return StepControl(self)

    def is_stored(self, layer: Layer, pixels: int) -> bool:
        """Whether maps of this layer, with S = `pixels` image positions, are added up."""
        return self.stores and layer.cross and pixels == self.pixels and layer.place != "mid"

    def store(self, layer: Layer, maps: Tensor) -> None:
        """Add up the conditional rows' maps (B, heads, S, N) of a layer over the steps."""
        self.sums[layer] = maps + self.sums[layer] if layer in self.sums else maps.clone()

    def blend(self, step: int, latents: Tensor) -> Tensor:
        """What z (B, C, H, W) becomes after a step, same shape."""
        return latents

    def maps(self) -> Tensor:
        """The sums of maps, (B, G, s, s, N) with G layers times heads.

        Raises:
            UserError: the U-Net has no maps of this size.
        """
        if not self.sums:
            raise UserError(f"no cross-attention map has {self.pixels} positions: {self.remedy}.")
        return square(torch.cat(list(self.sums.values()), dim=1))


class StepControl(Control):
    """`Edits` in one call: keeps cross-attention maps, changes nothing."""

    def __init__(self, edits: Edits) -> None:
        self.edits = edits

    def wants(self, layer: Layer, pixels: int) -> bool:
        """The cross-attention layers whose maps are kept."""
        return self.edits.is_stored(layer, pixels)

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `Control`; the map is handed to `look`."""
        return through_map(query, key, value, partial(self.look, layer))

    def look(self, layer: Layer, probabilities: Tensor) -> Tensor:
        """Keep the map `probabilities` (R, heads, S, N) where it is to be, and return it unchanged."""
        assert len(probabilities) == len(self.edits.rows), "a call of other rows"
        if self.edits.is_stored(layer, probabilities.shape[2]):
            self.edits.store(layer, probabilities[self.edits.rows.conditional])
        return probabilities
