"""Imagic (Kawar et al. 2023): fit the target text's embedding to one picture, then the model, then interpolate.

Three phases (Kawar et al. 2023, section 3): A fits the embedding, B the weights, C interpolates. Details follow
diffusers' community pipeline imagic_stable_diffusion.py and ShivamShrirao's train_imagic.py.
Symbols: e_tgt (states of the target text), e_opt (fitted), eta (weight of e_tgt).
Axes: K concepts (always 1 here), R rows, T text rows (77), D text width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hiperlab.base.capability import EditsPicture, Exportable
from hiperlab.base.method import Method, Step, Subject
from hiperlab.base.variants import value_of, variants_of
from hiperlab.data.batch import Batch
from hiperlab.data.edit import described
from hiperlab.errors import UserError
from hiperlab.formats import hiper as files
from hiperlab.model.conditioning import Conditioning
from hiperlab.model.noise import check_latent, posterior_noise
from hiperlab.model.offsets import Offsets, added, log_cost, parameter_names, zeros
from hiperlab.model.stack import FrozenStack
from hiperlab.model.text_cache import TextCache

log = logging.getLogger(__name__)
OPTIMIZED, TARGET, TEXT = "optimized_embeddings.pt", "target_embeddings.pt", "target_text.txt"


def interpolate(target: Tensor, optimized: Tensor, eta: float) -> Tensor:
    """Phase C's mean eta e_tgt + (1 - eta) e_opt (R, T, D) (Kawar et al. 2023, section 3).

    Args:
        target: e_tgt (R, T, D).
        optimized: e_opt, same shape.
        eta: 0 gives the picture, 1 the plain target text; published are 0.6 to 0.8.
    """
    return eta * target + (1 - eta) * optimized


class Imagic(Method, EditsPicture, Exportable):
    """Phase A fits all rows of the target text's embedding, phase B the weights of the U-Net with that embedding fixed.

    The weights are fitted as offsets that stand in for the frozen ones during a call; the stack never changes. The
    phase follows from the sample number, so a resumed run goes on in the right one. Several pictures' trainings share
    calls in phase A; in phase B each has a U-Net of its own.

    Args:
        model: the frozen stack.
        concepts: one picture with its target text.
        optimizer: parameters -> optimizer; its rate is phase A's.
        seed: of the draws.
        steps: optimizer steps of both phases together (fit.steps).
        batch_size: samples of an optimizer step (fit.batch_size).
        embedding_share: phase A's share of the steps, 0 to 1.
        model_lr: phase B's learning rate.
        weights: which U-Net weights phase B fits: "cross" (cross-attention), "attention", or "all" as published.
        latent: how often the picture's latents are drawn, see `hiperlab.model.noise`.
        eta: weight of the target text; several draw one picture for each, the first is the plain one.
    """

    stacks_concepts = False  # rows of one U-Net call share its weights
    why_no_early_stop = "an end in the embedding's phase would leave out that of the weights"
    per_target = True
    sampling_settings = ("eta",)

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
        steps: int,
        batch_size: int,
        embedding_share: float,
        model_lr: float,
        weights: str,
        latent: str,
        eta: Sequence[float],
    ) -> None:
        super().__init__(model, concepts, optimizer, seed)
        if not 0 <= embedding_share <= 1:
            raise UserError(f"method.embedding_share={embedding_share} is no share: choose 0 to 1 (0.4).")
        if not eta:
            raise UserError("method.eta=[] draws nothing. Give one weight of the target text or several, e.g. [0.7].")
        self.embedding_steps, self.batch_size = round(embedding_share * steps), batch_size
        self.model_lr, self.latent, self.eta = float(model_lr), check_latent(latent), float(eta[0])
        self.variants = variants_of("eta", eta)
        subject = concepts[0]
        self.source = subject.source or described(subject.word)
        self.target = subject.targets[0] if subject.targets else self.source
        self.encode = TextCache(model)
        self.embedding = nn.Parameter(self.encode([self.target]).float().clone())  # (1, T, D)
        self.offsets = zeros(model.unet, parameter_names(model.unet, weights))
        if weights == "all":
            log_cost(sum(value.numel() for value in self.offsets.values()), "weights=cross is far smaller.")

    def param_groups(self) -> list[dict[str, Any]]:
        """The embedding at the optimizer's rate, the weights at their own."""
        return [{"params": [self.embedding]}, {"params": list(self.offsets.values()), "lr": self.model_lr}]

    def condition(self, step: Step) -> Conditioning:
        """Training: e_opt, in phase B with the weights' offsets. Sampling: the interpolation, (1, R, T, D)."""
        optimized = self.embedding[step.concept]
        fitted = self.encode.condition([self.target] * len(step.prompts)).reading(optimized[None])
        if step.samples is not None:
            if self.fits_embedding(step.samples):
                return fitted
            return replace(fitted.reading(optimized.detach()[None]), offsets=self.weight_offsets())
        eta = value_of(step.variant, self.eta)
        texts = [self.concepts[0].with_class_noun(prompt) for prompt in step.prompts]
        plain = self.encode.condition(texts)
        # The source text asks for the picture itself: eta = 0.
        same = torch.tensor([text == self.source != self.target for text in texts], device=optimized.device)

        def between(target: Tensor, own: Tensor) -> Tensor:
            mixed = interpolate(target.to(own.dtype), own, eta)
            return torch.where(same.view(-1, *[1] * (own.dim() - 1)), own, mixed)

        pooled = None
        if plain.pooled is not None and fitted.pooled is not None:  # interpolated as the states are
            pooled = between(plain.pooled, fitted.pooled)
        states = plain.reading(between(plain.keys[0], optimized)[None])
        return replace(states, pooled=pooled, offsets=self.weight_offsets())

    def fits_embedding(self, samples: Tensor) -> bool:
        """Whether global sample numbers (R,) belong to phase A; an optimizer step takes `batch_size` of them."""
        return int(samples.min()) // self.batch_size < self.embedding_steps

    def weight_offsets(self) -> Offsets:
        """The fitted differences by the U-Net's own names."""
        return added(self.offsets)

    def posterior_noise(self, batch: Batch, shape: Sequence[int]) -> Tensor:
        """Unit normals (R, *shape), by default one draw per picture for the whole run (as in train_imagic.py)."""
        return posterior_noise(self.latent, self.seed, batch.view, batch.sample, shape)

    def on_fit_start(self) -> None:
        """Refuse several processes: in each phase half of the parameters have no gradient to share."""
        if self.trainer.world_size > 1:
            raise UserError("Imagic trains in one process (batch 1 has nothing to share): use trainer.devices=1.")

    # ---- the files of train_imagic.py --------------------------------------------------------------------------------

    def export(self, index: int, folder: Path, steps: int) -> list[Path]:
        """`optimized_embeddings.pt`, `target_embeddings.pt` and `target_text.txt`; the weights stay in our artifact."""
        text = folder / TEXT
        text.write_text(self.target, encoding="utf-8")
        target = files.write(folder / TARGET, self.encode([self.target])[0])
        return [files.write(folder / OPTIMIZED, self.embedding[index]), target, text]

    @torch.no_grad()
    def load_foreign(self, index: int, path: Path) -> None:
        """An `optimized_embeddings.pt`: what phase A found. Their fine-tuned U-Net is not read."""
        if path.name in (TARGET, TEXT):
            raise UserError(f"{path.name} holds nothing fitted. Give the {OPTIMIZED} beside it.")
        rows = files.read(path)
        if rows.shape != self.embedding[index].shape:
            raise UserError(
                f"{path.name} holds an embedding {tuple(rows.shape)}, this model reads "
                f"{tuple(self.embedding[index].shape)}. Load the base model it was made for."
            )
        log.warning("%s holds phase A only: pictures are drawn with the unchanged U-Net.", path.name)
        self.embedding[index].copy_(rows)
