"""SVDiff (Han et al. 2023): shifts of all weights' singular values, tied to a rare word.

The authors released no code; this follows the public reimplementation mkshing/svdiff-pytorch (train_svdiff.py).
Axes: K concepts (always 1 here), R rows, N tokens, D text width, r singular values of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hiperlab.base.capability import ChangedWeights
from hiperlab.base.method import Step, Subject
from hiperlab.base.rare_token_method import RareTokenMethod, RareTokenSettings
from hiperlab.base.variants import DrawnAtStrengths
from hiperlab.errors import UserError
from hiperlab.formats import svdiff as files
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.offsets import Offsets
from hiperlab.model.spectral import Shifted, Spectra, shifts, spectra
from hiperlab.model.stack import FrozenStack
from hiperlab.model.text import check_identifier


class SVDiff(DrawnAtStrengths, RareTokenMethod):
    """One shift per singular value of every layer; prompts say "sks dog" for the placeholder.

    No call is shared with other trainings (`why_alone`): each has a U-Net of its own.

    Args:
        model: the frozen stack.
        concepts: what is personalised.
        optimizer: parameters -> optimizer; AdamW's decay acts on the shifts, that is towards the frozen weights.
        seed: of the draws.
        norm_lr: rate of the norm layers' shifts, one number each; all others take the optimizer's.
        text_encoder: whether the text encoder's layers are shifted too, both embedding tables among them.
        identifier: rare word that stands before the class noun in the placeholder's place.
        strength: s, factor of the shifts in sampling; several draw one picture for each, the first is the plain one.
        shared: see `RareTokenSettings`.
    """

    why_alone = "all weights of its U-Net change, so that no other training can use its passes"
    sampling_settings = (*RareTokenMethod.sampling_settings, *DrawnAtStrengths.sampling_settings)
    published_crop = "random"  # without --center_crop
    published_flip = 0.0

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
        norm_lr: float,
        text_encoder: bool,
        identifier: str,
        strength: Sequence[float],
        **shared: Unpack[RareTokenSettings],
    ) -> None:
        identifier = check_identifier(model.tokenizer, identifier)
        super().__init__(model, concepts, optimizer, seed, identifier, **shared)
        self.set_strengths(strength)
        if norm_lr <= 0:
            raise UserError(f"method.norm_lr={norm_lr}: expected above 0 (published: 1e-6).")
        self.norm_lr = norm_lr
        self.unet_spectra = Spectra(spectra(model.unet))
        self.text_spectra = Spectra(spectra(model.text_module) if text_encoder else {})
        self.unet_shifts = shifts(self.unet_spectra.names, self.unet_spectra)
        self.text_shifts = shifts(self.text_spectra.names, self.text_spectra)

    def param_groups(self) -> list[dict[str, Any]]:
        """The shifts of matrices, then those of norm layers, told by "norm" in their names as train_svdiff.py does."""
        every = [*self.unet_shifts.items(), *self.text_shifts.items()]
        return [
            {"params": [shift for name, shift in every if "norm" not in name]},
            {"params": [shift for name, shift in every if "norm" in name], "lr": self.norm_lr},
        ]

    def condition(self, step: Step) -> Conditioning:
        """The text with "sks dog" in the placeholder's place, and the changed weights: (1, R, N, D)."""
        changed = self._changed(1.0 if step.samples is not None else self.strength_of(step.variant))
        return replace(self._encode(self.texts(step), changed), offsets=changed.unet)

    def changed_weights(self, variant: str) -> ChangedWeights:
        """The shifted weights of the U-Net and of the text encoder, at the variant's strength."""
        return self._changed(self.strength_of(variant))

    def negative_condition(self, text: str, variant: str, concepts: Sequence[int]) -> Conditioning:
        """The negative text (1, 1, N, D) through the shifted text encoder, as in the tuned pipeline."""
        return self._encode([text], self.changed_weights(variant))

    def _changed(self, strength: float) -> ChangedWeights:
        return ChangedWeights(
            _offsets(self.unet_spectra, self.unet_shifts, strength),
            _offsets(self.text_spectra, self.text_shifts, strength),
        )

    def _encode(self, texts: Sequence[str], changed: ChangedWeights) -> Conditioning:
        if not self.text_shifts:
            return self.plain_text.condition(texts)
        return self.model.condition_text(texts, changed.text)

    # ---- files of the reimplementation -------------------------------------------------------------------------------

    def export(self, index: int, folder: Path, steps: int) -> list[Path]:
        """`spectral_shifts.safetensors`, and `spectral_shifts_te.safetensors` if the text encoder is shifted."""
        return files.write(folder, _by_layer(self.unet_shifts), _by_layer(self.text_shifts))

    @torch.no_grad()
    def load_foreign(self, index: int, path: Path) -> None:
        """What `export` wrote, or train_svdiff.py; without the second file the text encoder is the frozen one.

        Raises:
            UserError: it is of another network, or the text encoder's shifts would be left aside.
        """
        unet, text = files.read(path)
        if text and not self.text_shifts:
            raise UserError(f"{path.name} comes with {files.TEXT}: set method.text_encoder=true, or move that away.")
        wanted = []  # both networks' are looked at before anything is taken
        for found, own, name in ((unet, self.unet_shifts, path.name), (text, self.text_shifts, files.TEXT)):
            ours = _by_layer(own)
            theirs = files.fitted(found, ours, name) if found else {layer: torch.zeros(()) for layer in ours}
            wanted += [(ours[layer], value) for layer, value in theirs.items()]
        for shift, value in wanted:
            shift.copy_(value)


def _by_layer(shifted: nn.ParameterDict) -> dict[str, Tensor]:
    """The shifts (r,) of the one concept, by the layers' own names."""
    return {name.replace("/", "."): value[0] for name, value in shifted.items()}


def _offsets(kept: Spectra, shifted: nn.ParameterDict, strength: float) -> Offsets:
    """The weights' changes by the module's own names."""
    return Offsets(
        {f"{name}.weight": Shifted(kept[name], shifted[name.replace(".", "/")][0], strength) for name in kept.names}
    )
