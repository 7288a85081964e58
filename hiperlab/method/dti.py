"""Directional Textual Inversion (Kim et al. 2026): a new word's direction is learnt, its norm is the vocabulary's.

Plain Textual Inversion lets the norm grow to fifty times the vocabulary's, and complex prompts fail. Follows the
authors' src/dti/embedding.py, src/dti/training/token_embedding_ops.py and src/dti/optim.py (kunheek/dti). Their
scripts train SDXL, SANA and Wan; what stands here is the same loop. In SDXL each text encoder has directions and a
magnitude of its own, of its own vocabulary.
Symbols: E (vocabulary), m (norm), v (unit direction), mu (the class word's direction), kappa (strength of the prior).
Axes: K concepts, V tokens of the initial words, R rows, N tokens, D text width, d a text encoder's part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from hiperlab import draws
from hiperlab.base.capability import Composable, Exportable
from hiperlab.base.method import Method, Step, Subject
from hiperlab.errors import UserError
from hiperlab.formats import embedding
from hiperlab.layer.initial_words import token_ids
from hiperlab.model.conditioning import Conditioning, Part
from hiperlab.model.stack import FrozenStack
from hiperlab.model.text import numbered_slots
from hiperlab.optim.spherical import SphericalSGD

MAGNITUDES = ("mean", "max", "min")
INITS = ("token", "random", "mean")


class DirectionalTextualInversion(Method, Composable, Exportable):
    """V rows m v per concept, |v| = 1, read by all layers at all timesteps; v is trained on the sphere, m is fixed.

    Args:
        model: the frozen stack.
        concepts: what is personalised.
        optimizer: parameters -> optimizer, a `SphericalSGD`.
        seed: of the draws.
        initializer: words whose V tokens the directions start from and are held by; None takes each class noun.
        magnitude: m, the "mean", "max" or "min" norm of the vocabulary's rows other than 0.
        init: where v starts: "token" (mu), "random", or "mean" (the mean row of the vocabulary).
        kappa: strength of the von Mises-Fisher prior around mu, 0 or more; the logged loss does not contain it.

    Raises:
        UserError: a setting is out of range, or the concepts' initial words differ in their number of tokens.
    """

    magnitude: Tensor
    prior: Tensor
    training_settings = ("optimizer", "kappa")
    published_crop = "random_cubic"  # without --center_crop
    published_flip = 0.0

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
        initializer: str | None,
        magnitude: str,
        init: str,
        kappa: float,
    ) -> None:
        super().__init__(model, concepts, optimizer, seed)
        for key, value, known in (("magnitude", magnitude, MAGNITUDES), ("init", init, INITS)):
            if value not in known:
                raise UserError(f"method.{key}={value} is unknown. Choose one of {', '.join(known)}.")
        if not 0 <= kappa < math.inf:
            raise UserError(f"method.kappa={kappa} is out of range. Choose a number, 0 or more; the paper uses 1e-4.")
        self.kappa = kappa
        ids = token_ids(model.tokenizer, [initializer or concept.word for concept in concepts])
        vocabularies = model.vocabulary().split(model.widths, dim=1)
        self.ends = tuple(f"_{number}" if number > 1 else "" for number in range(1, len(vocabularies) + 1))
        for end, vocabulary in zip(self.ends, vocabularies, strict=True):
            rows = vocabulary[ids.to(vocabulary.device)]  # (K, V, d)
            norms = vocabulary.norm(dim=1)
            m = float(getattr(norms[norms > 0], magnitude)())
            self.register_buffer(f"magnitude{end}", torch.full_like(rows[..., :1], m))  # (K, V, 1); kept
            self.register_buffer(f"prior{end}", F.normalize(rows, dim=-1))  # (K, V, d) mu; the raw row divides kappa
            if init == "random":  # the same for every concept, which must not depend on its neighbours
                drawn = draws.normal(seed, f"init{end}", range(rows.shape[1]), rows.shape[2:])
                rows = drawn.to(rows).expand_as(rows)
            elif init == "mean":
                rows = vocabulary.mean(0).expand_as(rows)
            setattr(self, f"direction{end}", nn.Parameter(F.normalize(rows, dim=-1)))  # (K, V, d) v
        self.slots = numbered_slots([concept.placeholder for concept in concepts], ids.shape[1])

    def _each(self, name: str) -> list[Tensor]:
        """Each text encoder's `direction`, `magnitude` or `prior`."""
        return [getattr(self, f"{name}{end}") for end in self.ends]

    def configure_optimizers(self) -> Optimizer:
        """The spherical optimizer, which takes the prior's gradient kappa mu along.

        Raises:
            UserError: another optimizer, which would leave the sphere and could not know the prior.
        """
        optimizer = super().configure_optimizers()
        if not isinstance(optimizer, SphericalSGD):
            raise UserError(
                f"method.optimizer={type(optimizer).__name__} leaves the sphere that dti's directions lie on. Keep "
                "hiperlab.optim.spherical.SphericalSGD; method=ti trains whole rows."
            )
        for direction, prior in zip(self._each("direction"), self._each("prior"), strict=True):
            optimizer.pulls[direction] = self.kappa * prior
        return optimizer

    def condition(self, step: Step) -> Conditioning:
        """The V rows m v stand for the word in every layer: (1, R, N, D)."""
        tokens = self.model.tokenize(step.prompts, self.slots)
        _, _, slots = tokens.occurrences()
        return self.model.condition_tokens(tokens, self.vectors().flatten(0, 1)[slots][None])

    def vectors(self) -> Tensor:
        """The rows m v (K, V, D) that the text encoders read, side by side."""
        parts = [m * v for m, v in zip(self._each("magnitude"), self._each("direction"), strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def composition_part(self, step: Step) -> Part:
        """The rows (1, 1, V, D) for the word."""
        return Part(step.prompts, self.vectors()[None, :1])

    def export(self, index: int, folder: Path, steps: int) -> list[Path]:
        """The authors' and diffusers' `learned_embeds.safetensors`, diffusers' `.bin`, A1111's `<name>.pt`: m v."""
        subject = self.concepts[index]
        parts = zip(self._each("magnitude"), self._each("direction"), strict=True)
        rows = torch.cat([m[index] * F.normalize(v[index].detach(), dim=-1) for m, v in parts], dim=-1).float().cpu()
        return embedding.write(folder, subject.name, subject.placeholder, rows, self.model.name, self.model.widths)

    @torch.no_grad()
    def load_foreign(self, index: int, path: Path) -> None:
        """Any embedding file, also of plain Textual Inversion: each row is its norm m times its direction v."""
        own, widths = self.vectors()[index], self.model.widths
        found = embedding.read_like(path, own, "method.initializer to words of {} tokens", widths)
        for m, v, rows in zip(self._each("magnitude"), self._each("direction"), found.split(widths, -1), strict=True):
            norms = rows.norm(dim=1, keepdim=True)
            if not (norms > 0).all():
                raise UserError(f"{path.name} holds a row of zeros, which has no direction. Load a trained concept.")
            m[index].copy_(norms)
            v[index].copy_(rows / norms)
