"""Methods that bind a concept to a rare token before its class noun, as DreamBooth does.

The text "a photo of sks dog" names the concept, class pictures keep "dog" what it was (Ruiz et al. 2022, sections 3.1
and 3.2). Such methods differ in which weights they train.
Axes: R rows of the batch as it came (with class rows behind them R' = 2 R), C latent channels, H, W latent sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor
from torch.optim import Optimizer

from hiperlab.base.capability import Composable, Exportable
from hiperlab.base.method import Method, Step, Subject
from hiperlab.base.prior_preservation import Prior
from hiperlab.data.batch import Batch
from hiperlab.data.concept import fill
from hiperlab.model.conditioning import Part
from hiperlab.model.stack import FrozenStack


class RareTokenMethod(Method, Composable, Exportable):
    """The published prompt for every picture, class rows behind them, and the rare token in the placeholder's place.

    Args:
        model: the frozen stack.
        concepts: one, unless a subclass has a way to give each row of a U-Net call weights of its own.
        optimizer: parameters -> optimizer.
        seed: of initialisation and draws.
        identifier: the rare token; empty for the class noun alone.
        template: the one training prompt, "{}" for the placeholder; None takes the data's templates.
        prior: class pictures that hold the class; weight 0 for none.
    """

    stacks_concepts = False
    fixed_settings: ClassVar[tuple[str, ...]] = ("identifier",)
    training_settings: ClassVar[tuple[str, ...]] = ("optimizer", "template", "prior")

    def __init__(
        self,
        model: FrozenStack,
        concepts: Sequence[Subject],
        optimizer: Callable[..., Optimizer],
        seed: int,
        identifier: str,
        template: str | None,
        prior: Prior,
    ) -> None:
        super().__init__(model, concepts, optimizer, seed)
        self.identifier, self.template, self.prior = identifier, template, prior
        self.words = tuple(" ".join(filter(None, [identifier, concept.word])) for concept in concepts)

    def texts(self, step: Step) -> list[str]:
        """The step's R prompts with the rare token and the class noun in the placeholder's place."""
        return [
            self.concepts[place].with_words(prompt, self.words[place])
            for prompt, place in zip(step.prompts, step.concept.tolist(), strict=True)
        ]

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
        return self.prior.losses(prediction, target)

    def composition_part(self, step: Step) -> Part:
        """The texts with the rare token in the placeholder's place."""
        return Part(self.texts(step))

    def on_fit_start(self) -> None:
        """Draw the class pictures before the first step."""
        for noun in dict.fromkeys(concept.word for concept in self.concepts):
            self.prior.prepare(self.model, noun, self.trainer)
