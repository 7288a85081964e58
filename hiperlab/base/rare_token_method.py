"""Methods that bind a concept to a rare token before its class noun, as DreamBooth does.

The text "a photo of sks dog" names the concept, class pictures keep "dog" what it was (Ruiz et al. 2022, sections 3.1
and 3.2). Such methods differ in which weights they train.
Axes: R rows of the batch as it came (with class rows behind them R' = 2 R), C latent channels, H, W latent sides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import ClassVar, TypedDict, Unpack

from torch import Tensor
from torch.optim import Optimizer

from hiperlab import draws
from hiperlab.base.capability import Composable, Exportable
from hiperlab.base.method import Method, Step, Subject
from hiperlab.base.prior_preservation import Prior
from hiperlab.data.batch import Batch
from hiperlab.data.concept import fill
from hiperlab.errors import UserError, near
from hiperlab.loss.dco import DCO, advantage, consistency_loss, min_snr
from hiperlab.model.conditioning import Conditioning, Part
from hiperlab.model.stack import FrozenStack
from hiperlab.model.text_cache import TextCache

log = logging.getLogger(__name__)
LOSSES = ("denoising", "dco")


class RareTokenSettings(TypedDict):
    """What every method of this kind is built with.

    Attributes:
        template: the one training prompt, "{}" for the placeholder; None takes the data's templates.
        prior: class pictures that hold the class; weight 0 for none.
        loss: "denoising", or "dco": only errors above the frozen model's count (Lee et al. 2024), and no prior.
        dco: its settings.
        consistency: w_c of guidance by the difference of the tuned model to the frozen one; None draws with the tuned
            model alone.
    """

    template: str | None
    prior: Prior
    loss: str
    dco: DCO
    consistency: float | None


class RareTokenMethod(Method, Composable, Exportable):
    """The published prompt for every picture, class rows behind them, and the rare token in the placeholder's place.

    Args:
        model: the frozen stack.
        concepts: one, unless a subclass has a way to give each row of a U-Net call weights of its own.
        optimizer: parameters -> optimizer.
        seed: of initialisation and draws.
        identifier: the rare token; empty for the class noun alone.
        shared: see `RareTokenSettings`.

    Raises:
        UserError: an unknown loss, or one that does without class pictures beside a weight of theirs.
    """

    stacks_concepts = False
    fixed_settings: ClassVar[tuple[str, ...]] = ("identifier",)
    training_settings: ClassVar[tuple[str, ...]] = ("optimizer", "template", "prior", "loss", "dco")
    sampling_settings: ClassVar[tuple[str, ...]] = ("consistency",)

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
        identifier: str,
        **shared: Unpack[RareTokenSettings],
    ) -> None:
        super().__init__(model, concepts, optimizer, seed)
        self.identifier, self.template, self.prior = identifier, shared["template"], shared["prior"]
        self.loss, self.dco, self.consistency = shared["loss"], shared["dco"], shared["consistency"]
        if self.loss not in LOSSES:
            raise UserError(f"method.loss={self.loss!r} is unknown.{near(str(self.loss), LOSSES)}")
        if self.loss == "dco" and self.prior.weight:
            raise UserError("method.loss=dco holds the model without class pictures: add method.prior.weight=0.")
        self.plain_text = TextCache(model)
        self.words = tuple(" ".join(filter(None, [identifier, concept.word])) for concept in concepts)

    def texts(self, step: Step) -> list[str]:
        """The step's R prompts with the rare token and the class noun in the placeholder's place."""
        return [
            self.concepts[place].with_words(prompt, self.words[place])
            for prompt, place in zip(step.prompts, step.concept.tolist(), strict=True)
        ]

    def said_elsewhere(self, index: int) -> str:
        """The rare word and the class noun."""
        return self.words[index]

    def with_class_nouns(self, step: Step) -> list[str]:
        """The step's R prompts with the bare class noun in the placeholder's place."""
        pairs = zip(step.prompts, step.concept.tolist(), strict=True)
        return [self.concepts[k].with_words(prompt, self.concepts[k].word) for prompt, k in pairs]

    def instance_rows(self, batch: Batch) -> Batch:
        """The concept's own rows as they are trained on: the published prompt for each of them."""
        if self.template is None:
            return batch
        prompts = [fill(self.template, self.concepts[place].placeholder) for place in batch.concept.tolist()]
        return batch._replace(prompts=prompts)

    def prepare_batch(self, batch: Batch) -> Batch:
        """The `instance_rows`, then the class rows."""
        nouns = [concept.word for concept in self.concepts]
        return self.prior.extend(self.instance_rows(batch), self.model, nouns, self.seed)

    def losses(self, step: Step, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Losses "" and "prior", (R,) each: instance rows, and class rows by their weight (Ruiz et al. 2022, eq. 2).

        Args:
            step: of all rows that `prepare_batch` gave.
            prediction: (R', C, H, W), instance rows first; R' is 2 R with class rows, else R.
            target: same shape.
        """
        if step.reference is None:
            return self.prior.losses(prediction, target)
        gains = advantage(prediction, step.reference, target)
        if self.dco.snr_gamma is not None:
            alpha_bar = self.model.alpha_bar.to(gains)[step.timestep]
            gains = gains * min_snr(alpha_bar, self.dco.snr_gamma, self.model.prediction_type)
        return {"": consistency_loss(gains, step.concept, len(self.concepts), self.dco.beta)}

    # ---- the frozen model beside the tuned one (Lee et al. 2024) -----------------------------------------------------

    def reference_condition(self, step: Step) -> Conditioning | None:
        """The frozen model's view of the `frozen_texts`, for `loss=dco` in training and `consistency` in pictures."""
        asked = self.loss == "dco" if step.samples is not None else self.consistency is not None
        return self.plain_text.condition(self.frozen_texts(step)) if asked else None

    def frozen_texts(self, step: Step) -> list[str]:
        """The step's R prompts as the frozen model is asked them: the same, unless they hold a learnt word."""
        return self.texts(step)

    def training_noise(self, batch: Batch, shape: Sequence[int]) -> Tensor:
        """Unit normals (R, *shape), and what `dco.offset_noise` adds to whole channels."""
        noise = super().training_noise(batch, shape)
        if self.loss != "dco" or not self.dco.offset_noise:
            return noise
        whole = draws.normal(self.seed, "offset noise", batch.sample, (shape[0], 1, 1))
        return noise + self.dco.offset_noise * whole

    def composition_part(self, step: Step) -> Part:
        """The texts with the rare token in the placeholder's place."""
        if self.consistency is not None:
            log.warning("%s: concepts are drawn together without method.consistency.", self.concepts[0].name)
        return Part(self.texts(step))

    def on_fit_start(self) -> None:
        """Draw the class pictures before the first step."""
        for noun in dict.fromkeys(concept.word for concept in self.concepts):
            self.prior.prepare(self.model, noun, self.trainer)
