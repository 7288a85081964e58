"""MasaCtrl (Cao et al. 2023): edits of pose or view, whose look is looked up in the picture by mutual self-attention.

Follows TencentARC/MasaCtrl (masactrl/masactrl.py, masactrl/diffuser_utils.py, playground_real.ipynb).
Symbols: S (first step with control), L (first layer with it), T (steps).
Axes: B rows (the source and its targets), C latent channels, H, W latent sides.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar, Unpack

import numpy as np
import torch
from torch import Tensor

from hiperlab import files
from hiperlab.base.editing_method import Drawing, EditorSettings
from hiperlab.base.recorded_path_method import RecordedPathMethod
from hiperlab.data.masks import read_mask
from hiperlab.edit.edits import Edits, Rows
from hiperlab.edit.mutual_attention import GivenMasks, MutualAttention, WordMasks
from hiperlab.edit.prompt_to_prompt import PromptToPrompt, edit_calls, map_pixels, regions
from hiperlab.edit.token_alignment import word_indices, words
from hiperlab.errors import UserError
from hiperlab.model.shared_calls import Calls

log = logging.getLogger(__name__)


class MasaCtrl(RecordedPathMethod):
    """Targets keep their own queries and take keys and values of the source row, in late steps and in the decoder.

    Args:
        reference: hold the source row to the recorded path (theirs: ref_intermediate_latents); False samples it freely.
        start_step: S, counted from 0, the noisiest.
        start_layer: L, of the self-attention layers in the order of execution, the middle one included.
        control_steps: other steps than S and later ones; None for those.
        control_layers: other layers than L and later ones; None for those.
        source_text: inversion and source row read the source text; False leaves it empty.
        inverse_guidance: guidance of the inversion, where it reads a text.
        masks: two pictures, white where the source shows the thing and where the targets are to show it; None for none.
        mask_words: [source word, target word] whose cross-attention makes such masks in every step; None for none.
        mask_threshold: where these begin, of a map stretched to [0, 1].
        mask_pixels: image positions of the maps they are made of; None chooses, see `map_pixels`.
        editor: as in `EditingMethod`; nothing is fitted or random.

    Raises:
        UserError: a setting out of its range, or two that exclude one another.
    """

    fixed_settings = ("source_text", "inverse_guidance")
    sampling_settings: ClassVar[tuple[str, ...]] = (
        "cache", "reference", "start_step", "start_layer", "control_steps", "control_layers",
        "masks", "mask_words", "mask_threshold", "mask_pixels",
    )  # fmt: skip
    negates_source = False  # it reconstructs the picture
    published_crop = "square"  # load_512 in PnPInversion's run_editing_masactrl.py, beside the reference variant

    def __init__(
        self,
        reference: bool,
        start_step: int,
        start_layer: int,
        control_steps: Sequence[int] | None,
        control_layers: Sequence[int] | None,
        source_text: bool,
        inverse_guidance: float,
        masks: Sequence[str] | None,
        mask_words: Sequence[str] | None,
        mask_threshold: float,
        mask_pixels: int | None,
        **editor: Unpack[EditorSettings],
    ) -> None:
        super().__init__(PromptToPrompt.off(), **editor)
        self.reference, self.source_text = reference, source_text
        self.inverts_source = self.reads_source = source_text
        self.inverse_guidance = self.inversion_guidance = float(inverse_guidance)
        layers = self.model.self_attention
        if control_steps is None and start_step >= self.steps:
            log.warning("method.start_step=%s of %d steps: nothing is controlled.", start_step, self.steps)
        self.control_steps = _chosen("step", control_steps, start_step, self.steps, beyond=True)
        self.control_layers = [layers[k] for k in _chosen("layer", control_layers, start_layer, len(layers))]
        if mask_words is not None and masks is not None:
            raise UserError("method.masks and method.mask_words are two ways to give masks: give one of them.")
        self.masks = None if masks is None else _read_masks(masks)
        self.mask_words = None if mask_words is None else self._checked(mask_words, self.concepts[0].targets)
        if not 0 <= mask_threshold <= 1:
            raise UserError(
                f"method.mask_threshold={mask_threshold} is no share of a map's range. Choose one in [0, 1]."
            )
        self.mask_threshold = float(mask_threshold)
        self.mask_pixels = map_pixels(self.model.size // 8) if mask_pixels is None else mask_pixels

    def _checked(self, pair: Sequence[str], targets: Sequence[str]) -> tuple[str, str]:
        """The words of source and target, both of which are in a text."""
        if isinstance(pair, str) or len(pair) != 2:
            raise UserError(f"method.mask_words={pair} must be [word of the source, word of the target], or null.")
        if not self.source_text:
            raise UserError("method.mask_words looks for a word of the source text: set method.source_text=true.")
        word_indices(self.source, pair[0], self.model.tokenizer)
        if targets and not any(pair[1] in words(text) for text in targets):
            word_indices(targets[0], pair[1], self.model.tokenizer)
        return pair[0], pair[1]

    # ---- drawing -----------------------------------------------------------------------------------------------------

    def edits(self, texts: Sequence[str], side: int, guided: bool, keep: bool) -> Edits:
        """Mutual self-attention of the source and its targets; arguments as `EditingMethod.edits`."""
        masks: GivenMasks | WordMasks | None = self.masks
        if self.mask_words is not None:
            found = [regions(self.model.tokenizer, texts[0], target, self.mask_words) for target in texts[1:]]
            masks = WordMasks(found, self.mask_pixels, self.mask_threshold)
        rows = Rows(len(texts), guided, self.source_once)
        return MutualAttention(rows, self.control_layers, self.control_steps, masks, self.mask_pixels, stores=keep)

    @torch.no_grad()
    def denoise_calls(self, drawing: Drawing) -> Calls[Tensor]:
        """z_0 (B, C, H, W) of a drawing.

        An empty source text is the same in both branches of guidance, so that the source has one row: T calls of three
        rows for one target, where the authors make four.
        """
        start, conditional, unconditional, guidance, edits, watch = drawing
        pivot = self.path if self.reference else None
        return (
            yield from edit_calls(
                self.model, start, self.steps, conditional, unconditional, guidance, edits, pivot, watch,
                source_once=self.source_once,
            )
        )  # fmt: skip


def _chosen(what: str, given: Sequence[int] | None, first: int, count: int, beyond: bool = False) -> list[int]:
    """Numbers of steps or layers, those given or all from `first` on; there are `count`, numbered from 0."""

    def check(name: str, number: object, most: int | None) -> None:
        whole = isinstance(number, int) and not isinstance(number, bool)
        if not whole or number < 0 or (most is not None and number > most):  # type: ignore[operator]
            limits = "Choose 0 or more." if most is None else f"There are {count}: choose 0 to {most}."
            raise UserError(f"method.{name}={number!r} is no {what}. {limits}")

    if given is None:
        check(f"start_{what}", first, None if beyond else count - 1)
        return list(range(first, count))
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise UserError(f"method.control_{what}s={given} must be a list of {what}s, e.g. [4,5,6], or null.")
    for number in given:
        check(f"control_{what}s", number, count - 1)
    return list(given)


def _read_masks(paths: Sequence[str]) -> GivenMasks:
    """Masks (h, w) of the source and of the targets, of the square picture."""
    if isinstance(paths, str) or not isinstance(paths, Sequence) or len(paths) != 2:
        raise UserError(f"method.masks={paths} must be [mask of the source, mask of the target], two files, or null.")
    found = []
    for path in paths:
        mask = read_mask(files.expand(path), None)
        if mask.width != mask.height:
            raise UserError(f"mask {path} has {mask.width} x {mask.height} pixels: give one of the square picture.")
        found.append(torch.from_numpy(np.asarray(mask) > 0))
    return GivenMasks(*found)
