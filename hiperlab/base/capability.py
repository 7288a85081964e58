"""What only some methods can do: a method takes a capability up by inheriting it beside `Method`.

Axes: R rows of a call, L cross-attention layers, N tokens, D text width, H, W picture sides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from torch import Tensor

from hiperlab.base.method import Step
from hiperlab.model.conditioning import Part
from hiperlab.model.offsets import Offsets


class ReadsPicture(ABC):
    """Looks at each concept's first picture before training, and not only through the batches.

    Attributes:
        one_picture: whether it trains on that picture alone, not mirrored.
    """

    one_picture: bool = True

    @abstractmethod
    def set_reference(self, index: int, picture: Tensor) -> None:
        """Take concept `index`'s first picture (3, H, W) in [-1, 1]."""


class EditsPicture:
    """Learns one picture together with its plain source text, and draws target texts of it.

    Attributes:
        seeded: whether a picture depends on its seed; if not, one per prompt is drawn.
        per_target: whether a fit serves one target text only.
    """

    seeded: ClassVar[bool] = True
    per_target: ClassVar[bool] = False


class ChangedWeights(NamedTuple):
    """Changes of the stack's weights while a concept is drawn.

    Attributes:
        unet: of the U-Net, or None.
        text: of the text encoder (`FrozenStack.text_module`), or None.
    """

    unet: Offsets | None = None
    text: Offsets | None = None


class Composable(ABC):
    """Can be drawn together with concepts of other methods (`hiperlab.base.composition`).

    Attributes:
        variants: the method's, see `Method`; the first one is drawn.
    """

    variants: tuple[str, ...]

    @abstractmethod
    def composition_part(self, step: Step) -> Part:
        """What its one concept gives to texts of several concepts, see `Part`."""

    def changed_weights(self, variant: str) -> ChangedWeights:
        """What drawing changes in the weights besides; by default nothing."""
        return ChangedWeights()


class Exportable(ABC):
    """Writes and reads the files that other tools use for such a concept."""

    @abstractmethod
    def export(self, index: int, folder: Path, steps: int) -> list[Path]:
        """Write concept `index` after `steps` optimizer steps; returns the files, none where a setting says so."""

    def exports_at(self, steps: int) -> bool:
        """Whether the state after `steps` optimizer steps is exported on the way; by default only the last one is."""
        return False

    @abstractmethod
    def load_foreign(self, index: int, path: Path) -> None:
        """Load concept `index` from another tool's file.

        Raises:
            UserError: the file does not fit this method, its settings or the base model.
        """


@dataclass(frozen=True)
class WordMaps:
    """Where the words of a text looked while its picture was drawn.

    Args:
        text: the text, as a person would write it.
        picture: what was drawn (3, H, W) in [0, 1].
        words: its words in order.
        maps: one map (s, s) per word, sums of probabilities; only their proportions mean anything.
    """

    text: str
    picture: Tensor
    words: tuple[str, ...]
    maps: Tensor


class ShowsAttention(ABC):
    """Edits by attention maps and can show them.

    Attributes:
        keeps_maps: whether the next drawings keep the maps of their first texts, so that `attention_maps` need not
            draw them again. For a method that is not trained any more.
    """

    keeps_maps: bool = False

    @abstractmethod
    def attention_maps(self, prompts: Sequence[str], seed: int, *, guidance: float) -> list[WordMaps]:
        """Attention of pictures of one concept, none where a text's words cannot be told apart.

        Args:
            prompts: texts with placeholders in place.
            seed: of the pictures.
            guidance: classifier-free guidance scale.
        """
