"""Custom Diffusion (Kumari et al. 2022): keys and values of the cross-attention, and a new word before the class noun.

Follows diffusers' train_custom_diffusion.py and, for `delta.bin`, the authors' src/diffusers_model_pipeline.py.
Axes: K concepts, R rows, N tokens, D text width, C latent channels, H, W latent sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hiperlab.base.capability import ChangedWeights
from hiperlab.base.method import Step, Subject
from hiperlab.base.rare_token_method import RareTokenMethod, RareTokenSettings
from hiperlab.data.batch import Batch
from hiperlab.data.crop_augmentation import Placement, drawn, latent_mask, placed, still
from hiperlab.errors import UserError
from hiperlab.formats import custom_diffusion as files
from hiperlab.model.conditioning import Conditioning, Part
from hiperlab.model.offsets import Offsets, added, parameter_names, zeros
from hiperlab.model.row_offsets import RowOffsets
from hiperlab.model.stack import FrozenStack
from hiperlab.model.text import numbered_slots
from hiperlab.optim.weight_decay import decay_whole_weights

WEIGHTS = {"kv": (".to_k.", ".to_v."), "cross": ("",)}


def masked_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """sum(mask e^2) / sum(mask) of each row (R,), as in diffusers' train_custom_diffusion.py.

    The error has four channels and the mask one, so this is four times a mean.

    Args:
        prediction: (R, C, H, W).
        target: same shape.
        mask: (R, 1, H, W) of 0 and 1.
    """
    return (mask * (prediction - target).square()).flatten(1).sum(1) / mask.flatten(1).sum(1)


class CustomDiffusion(RareTokenMethod):
    """Offsets of 16 x {to_k, to_v} and one word vector; prompts say "<cats> cat" for the placeholder.

    Args:
        model: the frozen stack.
        concepts: what is personalised; several share each pass of the frozen U-Net, see `hiperlab.model.row_offsets`.
        optimizer: parameters -> optimizer; AdamW's decay acts on the whole weight, as in the published code.
        seed: of the draws.
        weights: "kv", or "cross" for queries and outputs too (`crossattn` in the published code, for faces).
        init_word: entry of the vocabulary, rare, whose embedding the new word starts from.
        augment: place the picture smaller or larger at random, and say so in the prompt.
        compress: share of singular values kept in the exported `delta.bin` (the authors: 0.6), or None for all.
        shared: see `RareTokenSettings`.
    """

    stacks_concepts = True
    fixed_settings = ()  # its rare token is the placeholder, which the artifact keeps

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
        weights: str,
        init_word: str,
        augment: bool,
        compress: float | None,
        **shared: Unpack[RareTokenSettings],
    ) -> None:
        super().__init__(model, concepts, optimizer, seed, concepts[0].placeholder, **shared)
        if weights not in WEIGHTS:
            raise UserError(f"method.weights={weights!r} is unknown. Choose {', '.join(WEIGHTS)}.")
        if compress is not None and not 0 < compress <= 1:
            raise UserError(f"method.compress={compress} is no share: choose above 0 to 1 (0.6), or null for none.")
        names = [
            name for name in parameter_names(model.unet, "cross") if any(part in name for part in WEIGHTS[weights])
        ]
        if augment and self.loss == "dco":
            raise UserError(
                "method.loss=dco compares whole pictures with the frozen model's: add method.augment=false."
            )
        self.augment, self.compress = augment, compress
        self.words = tuple(f"{concept.placeholder} {concept.word}" for concept in concepts)
        self.slots = numbered_slots([concept.placeholder for concept in concepts])
        self.word = nn.Parameter(_start(model, init_word).repeat(len(concepts), 1))  # (K, D)
        self.kv = zeros(model.unet, names, len(concepts))

    # ---- training ----------------------------------------------------------------------------------------------------

    def instance_rows(self, batch: Batch) -> Batch:
        """The published prompt; pictures moved at random, with words that say so."""
        batch = super().instance_rows(batch)
        if not self.augment:
            return batch
        crops = [self._place(sample) for sample in batch.sample.tolist()]
        return batch._replace(
            pixels=_placed(batch.pixels, crops),
            mask=None if batch.mask is None else _placed(batch.mask, crops),
            prompts=[crop.words + prompt for prompt, crop in zip(batch.prompts, crops, strict=True)],
        )

    def _place(self, sample: int) -> Placement:
        return drawn(self.seed, sample, self.model.size) if self.augment else still(self.model.size)

    def moments(self, batch: Batch) -> Tensor:
        """The VAE's posterior (R, 2C, H, W): anew for placed pictures (no two are alike), once per class picture."""
        if not self.augment:
            return super().moments(batch)
        count = int((batch.sample >= 0).sum())  # class rows have negative numbers, behind the others
        fresh = [self.model.encode_moments(batch.pixels[row : row + 1]) for row in range(count)]
        if count == len(batch.sample):
            return torch.cat(fresh)
        return torch.cat([*fresh, super().moments(batch.after(count))])

    def losses(self, step: Step, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Losses "" and "prior", (R,) each: `masked_loss` of instance rows, weighted mean square of class rows.

        Args:
            step: of all rows that `prepare_batch` gave.
            prediction: (R', C, H, W), instance rows first; R' is 2 R with class rows, else R.
            target: same shape.
        """
        if step.reference is not None:
            return super().losses(step, prediction, target)
        assert step.samples is not None, "losses are of training rows"
        samples = [sample for sample in step.samples.tolist() if sample >= 0]
        cells = prediction.shape[-1]
        masks = torch.stack([latent_mask(self._place(sample), self.model.size, cells) for sample in samples])
        count = len(samples)
        instance = masked_loss(prediction[:count], target[:count], masks.to(prediction))
        return {**self.prior.losses(prediction, target), "": instance}

    def condition(self, step: Step) -> Conditioning:
        """The new word before the class noun, the offsets, and no gradient through token 0: (1, R, N, D)."""
        tokens = self.model.tokenize(self.texts(step), self.slots)
        _, _, slots = tokens.occurrences()
        states = self.model.condition_tokens(tokens, self.word[slots][None])
        alone = self.offsets() if len(self.concepts) == 1 else None
        changes = {name.replace("/", "."): (delta,) for name, delta in self.kv.items()}
        offsets = RowOffsets(changes, torch.ones_like(self.word[:, 0]), step.concept)
        return replace(states, offsets=alone, detach_first=True, row_offsets=offsets)

    def frozen_texts(self, step: Step) -> list[str]:
        """The step's R prompts with the class noun alone: the frozen model does not know the word."""
        return self.with_class_nouns(step)

    def composition_part(self, step: Step) -> Part:
        """The texts with the new word before the class noun, and its vector (1, 1, 1, D)."""
        return Part(self.texts(step), self.word[None, :, None])

    def changed_weights(self, variant: str) -> ChangedWeights:
        """The offsets of the keys' and values' projections."""
        return ChangedWeights(self.offsets())

    def offsets(self, index: int = 0) -> Offsets:
        """The weights' differences of concept `index` by the U-Net's own names."""
        return added(self.kv, index)

    def configure_optimizers(self) -> Optimizer:
        """The configured optimizer, its decay on whole weights."""
        frozen = self._frozen()
        pairs = [(offset, frozen[name.replace("/", ".")]) for name, offset in self.kv.items()]
        return decay_whole_weights(super().configure_optimizers(), pairs)

    def _frozen(self) -> dict[str, Tensor]:
        """The base model's weights that have offsets, by the U-Net's names."""
        names = [name.replace("/", ".") for name in self.kv]
        return {name: self.model.unet.get_parameter(name) for name in names}

    # ---- files of the authors and of diffusers -----------------------------------------------------------------------

    @torch.no_grad()
    def export(self, index: int, folder: Path, steps: int) -> list[Path]:
        """The authors' `delta.bin`; diffusers' `pytorch_custom_diffusion_weights.bin` and `<word>.bin`.

        With `compress`, `delta.bin` holds factors as the authors' src/compress.py makes them.
        """
        frozen = self._frozen()
        weights = self.offsets(index).weights(self.model.unet)
        word = self.concepts[index].placeholder
        return files.write(folder, word, self.word[index], weights, frozen, self.compress)

    @torch.no_grad()
    def load_foreign(self, index: int, path: Path) -> None:
        """A `delta.bin` (also compressed), or diffusers' files, which lie side by side."""
        found, frozen = files.read(path), self._frozen()
        word = self.concepts[index].placeholder
        if word not in found.words and len(found.words) != 1:
            raise UserError(f"{path.name} holds {', '.join(found.words)}: set data.placeholder to one of them.")
        vector = found.words.get(word, next(iter(found.words.values())))
        deltas = {name: u @ v for name, (u, v) in found.factors.items()}
        own = {name: value.detach().float().cpu() for name, value in frozen.items()}
        deltas |= {name: value - own[name] for name, value in found.weights.items() if _fits(value, own.get(name))}
        wrong = sorted(deltas.keys() ^ frozen.keys()) + sorted(found.weights.keys() - deltas.keys())
        wrong += [name for name in deltas.keys() & own.keys() if deltas[name].shape != own[name].shape]
        if wrong or vector.shape != self.word[index].shape:
            raise UserError(
                f"{path.name} does not fit ({wrong[0] if wrong else f'its word has width {len(vector)}'}). Load the "
                "base model it was made for, and set method.weights=cross if it changes queries too."
            )
        self.word[index].copy_(vector)
        for name, delta in deltas.items():
            self.kv[name.replace(".", "/")][index].copy_(delta)


def _placed(rows: Tensor, crops: Sequence[Placement]) -> Tensor:
    """Pictures or masks (R, C, S, S), each placed; same shape."""
    return torch.stack([placed(row, crop) for row, crop in zip(rows, crops, strict=True)])


def _start(model: FrozenStack, word: str) -> Tensor:
    """The embedding (D,) of a vocabulary entry, else of a word's last token.

    The authors' src/diffusers_training.py hands "ktn" to the tokenizer as a ready token: the entry 42170, which only
    occurs inside words.
    A vocabulary without it (the miniature's) splits it; its last piece then is as rare as any.
    """
    index = model.tokenizer.get_vocab().get(word)
    if index is None:
        ids = model.tokenizer(word, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(f"method.init_word={word!r} is no word. Name a rare one, e.g. ktn.")
        index = ids[-1]
    return model.vocabulary()[index].clone()


def _fits(value: Tensor, own: Tensor | None) -> bool:
    return own is not None and value.shape == own.shape
