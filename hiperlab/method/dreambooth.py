"""DreamBooth (Ruiz et al. 2022): the whole U-Net learns a rare word, class pictures keep the class in place.

Settings and loss follow diffusers' examples/dreambooth/train_dreambooth.py; the paper's authors released no code.
Axes: K concepts (always 1 here), R rows, N tokens, D text width, C latent channels, H, W latent sides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hiperlab.base.capability import ChangedWeights
from hiperlab.base.method import Step, Subject
from hiperlab.base.rare_token_method import RareTokenMethod, RareTokenSettings
from hiperlab.errors import UserError
from hiperlab.formats import weights as files
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.offsets import added, log_cost, parameter_names, zeros
from hiperlab.model.stack import FrozenStack
from hiperlab.model.text import check_identifier
from hiperlab.optim.weight_decay import decay_whole_weights

log = logging.getLogger(__name__)


class DreamBooth(RareTokenMethod):
    """Every weight of the U-Net gets an offset, which is fine-tuning it; prompts say "sks dog" for the placeholder.

    No call is shared with other trainings (`why_alone`): each has a U-Net of its own.

    Args:
        model: the frozen stack.
        concepts: what is personalised.
        optimizer: parameters -> optimizer; AdamW's decay acts on the whole weight, as in the published code.
        seed: of the draws.
        weights: which U-Net weights are trained: "cross" (cross-attention), "attention", or "all" as published.
        text_encoder: whether all of the text encoder is trained too.
        identifier: rare word that stands before the class noun in the placeholder's place.
        export_weights: also write the whole U-Net (and text encoder) as diffusers keeps them.
        shared: see `RareTokenSettings`.
    """

    why_alone = "all weights of its U-Net change, so that no other training can use its passes"
    published_crop = "random"  # without --center_crop
    published_flip = 0.0

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
        weights: str,
        text_encoder: bool,
        identifier: str,
        export_weights: bool,
        **shared: Unpack[RareTokenSettings],
    ) -> None:
        identifier = check_identifier(model.tokenizer, identifier)
        super().__init__(model, concepts, optimizer, seed, identifier, **shared)
        self.export_weights = export_weights
        self.unet_offsets = zeros(model.unet, parameter_names(model.unet, weights))
        every = [name for name, _ in model.text_module.named_parameters()] if text_encoder else []
        self.text_offsets = zeros(model.text_module, every)
        if weights == "all":
            log_cost(
                sum(value.numel() for value in [*self.unet_offsets.values(), *self.text_offsets.values()]),
                "weights=cross and method=lora are far smaller.",
            )

    def condition(self, step: Step) -> Conditioning:
        """The text with "sks dog" in the placeholder's place, and the offsets: (1, R, N, D)."""
        return replace(self._encode(self.texts(step)), offsets=added(self.unet_offsets))

    def changed_weights(self, variant: str) -> ChangedWeights:
        """The offsets of the U-Net and of the text encoder."""
        return ChangedWeights(added(self.unet_offsets), added(self.text_offsets))

    def negative_condition(self, text: str, variant: str, concepts: Sequence[int]) -> Conditioning:
        """The negative text (1, 1, N, D) through the trained text encoder, as in the tuned pipeline."""
        return self._encode([text])

    def _encode(self, texts: Sequence[str]) -> Conditioning:
        if not self.text_offsets:
            return self.plain_text.condition(texts)
        return self.model.condition_text(texts, added(self.text_offsets))

    def configure_optimizers(self) -> Optimizer:
        """The configured optimizer, its decay on whole weights."""
        return decay_whole_weights(super().configure_optimizers(), self._with_frozen())

    def _with_frozen(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Each offset with the weight it belongs to."""
        return [
            (offset, module.get_parameter(name.replace("/", ".")))
            for module, offsets in (
                (self.model.unet, self.unet_offsets),
                (self.model.text_module, self.text_offsets),
            )
            for name, offset in offsets.items()
        ]

    # ---- whole networks, as diffusers keeps them ---------------------------------------------------------------------

    @torch.no_grad()
    def export(self, index: int, folder: Path, steps: int) -> list[Path]:
        """With `export_weights`, `unet/` (and `text_encoder/`): put them in the base model's folder."""
        if not self.export_weights:
            return []
        unet = self.model.unet
        written = [files.write_unet(folder, unet, added(self.unet_offsets).weights(unet))]
        if self.text_offsets:
            changed = added(self.text_offsets).weights(self.model.text_module)
            for part, tower in zip(self.model.text_parts, self.model.towers, strict=True):
                own = {part.own(key): value for key, value in changed.items()}
                named = {key: value for key, value in own.items() if key is not None}
                written.append(files.write_text(folder, part.name, tower.text, named))
        return written

    @torch.no_grad()
    def load_foreign(self, index: int, path: Path) -> None:
        """A tuned `unet/diffusion_pytorch_model.safetensors`; `text_encoder/` beside it is read if that is trained."""
        parts = self.model.text_parts
        if path.parent.name in [part.name for part in parts]:
            path = path.parent.parent / files.UNET
        frozen = dict(self.model.unet.named_parameters())
        self._take(path.name, files.read(path), frozen, self.unet_offsets, "method.weights=all")
        texts = {part: path.parent.parent / part.name / files.TEXT for part in parts}
        if not self.text_offsets:
            for text in filter(Path.is_file, texts.values()):
                log.warning("%s is left aside: it is read with method.text_encoder=true.", text)
            return
        found: dict[str, Tensor] = {}
        for part, text in texts.items():
            named = {
                key if key.startswith("text_projection.") else f"{part.within}{key}": value
                for key, value in files.read(text).items()
            }
            unread = self.model.unread_text
            found |= {key: value for key, value in named.items() if not unread or not key.startswith(unread)}
        own = dict(self.model.text_module.named_parameters())
        self._take(next(iter(texts.values())).name, found, own, self.text_offsets, "")

    def _take(
        self,
        name: str,
        theirs: Mapping[str, Tensor],
        ours: Mapping[str, Tensor],
        offsets: nn.ParameterDict,
        remedy: str,
    ) -> None:
        """Fill the offsets with a file's differences.

        Raises:
            UserError: it is another network, or differs in weights without an offset.
        """
        found = files.differences(theirs, ours, name)
        fixed = [key for key, value in found.items() if key.replace(".", "/") not in offsets and value.any()]
        if fixed:
            raise UserError(f"{name} changes {fixed[0]} and {len(fixed) - 1} more weights: set {remedy}.")
        for key, offset in offsets.items():
            offset.copy_(found[key.replace("/", ".")][None])
