"""What the U-Net reads, as a value: text states for its cross-attention, what SDXL adds, and changes of its weights.

Axes: L cross-attention layers in execution order (1 = shared by all), B batch, N tokens, D text width, P width of the
pooled row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hiperlab.model import decoupled_attention
from hiperlab.model.attention_control import Control
from hiperlab.model.decoupled_attention import DecoupledAttention
from hiperlab.model.offsets import Offsets
from hiperlab.model.row_offsets import RowOffsets, joined


@dataclass(frozen=True)
class Conditioning:
    """Text states per cross-attention layer, keys and values apart (NeTI's bypass reaches values only).

    Args:
        keys: (L, B, N, D) states that the key projections read; L is 1 (shared) or the number of layers.
        values: same shape, read by the value projections; None means the keys serve both.
        offsets: changes of U-Net weights, for all rows of the call; None leaves the bare U-Net.
        row_offsets: offsets beside the U-Net's layers, each row's own; None for none. Where both are given they are the
            same change, and a call of its own takes `offsets`, a shared one these.
        detach_first: no gradient goes through the first token's key and value (Custom Diffusion); values are the same.
        control: reads and changes the call's attention and outputs of its layers; it knows the call's rows by their
            number, so it is given to the conditioning of a whole call, last of all.
        decoupled: further tokens of the B rows with a softmax of their own; None for none.
        pooled: (B, P), the pooled row of each text, which SDXL adds to the time embedding; None for SD 1.x and 2.x.
        sizes: (B, 6), SDXL's micro-conditioning in pixels: height and width of the picture as it was, top and left of
            its crop, height and width of the result (Podell et al. 2023, section 2.2); None where there is none.
    """

    keys: Tensor
    values: Tensor | None = None
    offsets: Offsets | None = None
    detach_first: bool = False
    control: Control | None = None
    row_offsets: RowOffsets | None = None
    decoupled: DecoupledAttention | None = None
    pooled: Tensor | None = None
    sizes: Tensor | None = None

    @property
    def layers(self) -> int:
        """L: 1 when every layer reads the same states."""
        return self.keys.shape[0]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """The (B, N, D) states that layer `index` reads for its keys and for its values."""
        own = index if self.layers > 1 else 0
        keys = self.keys[own]
        return keys, keys if self.values is None else self.values[own]

    def rows(self, index: Tensor | Sequence[int]) -> Conditioning:
        """The conditioning (L, R, N, D) of R chosen batch rows, numbers in [0, B); repeats are allowed."""
        assert self.control is None, "a control belongs to the rows of a whole call"
        index = torch.as_tensor(index, dtype=torch.long, device=self.keys.device)  # of no rows, too
        values = None if self.values is None else self.values[:, index]
        row_offsets = None if self.row_offsets is None else self.row_offsets.rows(index)
        decoupled = None if self.decoupled is None else self.decoupled.rows(index)
        pooled, sizes = (None if each is None else each[index] for each in (self.pooled, self.sizes))
        return replace(
            self, keys=self.keys[:, index], values=values, row_offsets=row_offsets, decoupled=decoupled, pooled=pooled,
            sizes=sizes,
        )  # fmt: skip

    def to(self, dtype: torch.dtype) -> Conditioning:
        """The same conditioning, keys and values (L, B, N, D) in another floating type, further tokens too."""
        values = None if self.values is None else self.values.to(dtype)
        # Offsets choose their type by the weight's, controls by what they get; sizes are whole pixels, kept.
        decoupled = None if self.decoupled is None else self.decoupled.to(dtype)
        pooled = None if self.pooled is None else self.pooled.to(dtype)
        return replace(self, keys=self.keys.to(dtype), values=values, decoupled=decoupled, pooled=pooled)

    def reading(self, keys: Tensor) -> Conditioning:
        """The same conditioning with other states (L, B, N, D) for keys and values alike."""
        return replace(self, keys=keys, values=None)

    def sized(self, sizes: Tensor | None) -> Conditioning:
        """The same conditioning of pictures of other sizes (B, 6); unchanged where none are read, or none are given."""
        return self if self.sizes is None or sizes is None else replace(self, sizes=sizes.to(self.sizes))

    def zeroed(self) -> Conditioning:
        """The same conditioning of no text at all: zero states and pooled row (`FrozenStack.zero_negative`)."""
        values = None if self.values is None else torch.zeros_like(self.values)
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return replace(self, keys=torch.zeros_like(self.keys), values=values, pooled=pooled)

    def controlled(self, control: Control | None) -> Conditioning:
        """The same conditioning with a control of the call's attention."""
        return replace(self, control=control)


@dataclass(frozen=True)
class Part:
    """What one concept gives to the text of a picture that shows several; `hiperlab.base.composition` joins the parts.

    R texts; L and R may be 1 where a part is the same for all layers or texts.

    Args:
        prompts: the R texts with this concept's placeholder written its way, everything else as it came.
        vectors: (L, R, V, D) learnt input embeddings that stand, V in a row, wherever the placeholder still does.
        in_values: how the value projections see those places, from hidden states (L, P, D) before the final norm and
            the text number (P,) of each; None means as the keys.
        tail: (R, N, D) rows that replace the last N of the encoded text.
        pooled_vectors: (1, R, V, D), what the pooled row reads there, where `vectors` has one row per layer.
    """

    prompts: Sequence[str]
    vectors: Tensor | None = None
    in_values: Callable[[Tensor, Tensor], Tensor] | None = None
    tail: Tensor | None = None
    pooled_vectors: Tensor | None = None


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """Join along the batch; shared layers are repeated where another part has one state per layer.

    A U-Net call has one set of weights: parts without offsets (guidance's unconditional half) take those of the others,
    and different offsets cannot be joined. Offsets by row go along with their rows, see `row_offsets.joined`, and
    further tokens, see `decoupled_attention.joined`.
    """
    assert all(part.control is None for part in parts), "join first, then give the whole call its control"
    offsets = next((part.offsets for part in parts if part.offsets is not None), None)
    assert offsets is None or all(part.offsets is None or offsets.same(part.offsets) for part in parts), (
        "rows with different weight offsets need calls of their own"
    )
    layers = max(part.layers for part in parts)

    def spread(states: Tensor) -> Tensor:
        return states.expand(layers, *states.shape[1:])

    beside = joined([(part.row_offsets, part.keys.shape[1]) for part in parts])
    decoupled = decoupled_attention.joined([(part.decoupled, part.keys.shape[1]) for part in parts])
    keys = torch.cat([spread(part.keys) for part in parts], dim=1)
    detach_first = any(part.detach_first for part in parts)  # matters to gradients only, and joining serves sampling
    values = None
    if any(part.values is not None for part in parts):
        values = torch.cat([spread(part.keys if part.values is None else part.values) for part in parts], dim=1)
    pooled, sizes = (_joined([getattr(part, name) for part in parts]) for name in ("pooled", "sizes"))
    return Conditioning(
        keys, values, offsets, detach_first, row_offsets=beside, decoupled=decoupled, pooled=pooled, sizes=sizes
    )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Rows (B, …) of all parts, or None where no part has any: what one U-Net reads, all of its rows have."""
    present = [part for part in parts if part is not None]
    assert len(present) in (0, len(parts)), "rows with and without a pooled row or sizes are of different models"
    return torch.cat(present) if present else None
